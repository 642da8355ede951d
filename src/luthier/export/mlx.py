"""Adapters in mlx-lm's layout, written and read.

A folder with adapter_config.json (fine_tune_type, num_layers, lora_parameters: rank, scale, dropout, keys) and
adapters.safetensors: `<module>.lora_a` (in, r), `<module>.lora_b` (r, out), and in DoRA `<module>.m` (out,), where
y = x W^T + scale (x a) b. On an embedding lora_a is (vocabulary, r). Source: mlx-lm, tuner/lora.py, dora.py, utils.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from luthier.adapters.base_record import BASE_FILE, write_base_record
from luthier.adapters.peft_config import CONFIG_FILE
from luthier.adapters.peft_format import WEIGHTS_FILE
from luthier.adapters.registry import PREFIX, pick, term_of
from luthier.adapters.state import check_finite_tensors
from luthier.adapters.targets import low_rank_layers, tied_to
from luthier.errors import AdapterError, bulleted
from luthier.linear import LowRankEmbedding, LowRankTerm

MLX_WEIGHTS = "adapters.safetensors"
# Families whose modules mlx-lm calls as Transformers does.
SAME_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")


def is_mlx(folder: Path) -> bool:
    """Whether the folder holds an adapter of mlx-lm."""
    return (folder / MLX_WEIGHTS).is_file() and not (folder / WEIGHTS_FILE).is_file()


def mlx_base_name(folder: Path) -> str | None:
    """The model that mlx-lm's settings name as the base, if they do."""
    name = _settings(folder).get("model")
    return name if isinstance(name, str) and name else None


def write_mlx(stage: Path, model: PreTrainedModel, base_name: str) -> list[str]:
    """Write the model's one adapter into the folder `stage`, and a record of its base, which mlx-lm passes over; returns notes.

    mlx-lm has one scale and one rank a file: the largest rank is written, smaller ones are filled up with zeros, and what
    a layer's own scale differs by is folded into its b. Raises AdapterError naming what cannot be expressed.
    """
    adapter = pick(model, None)
    terms = {target: term_of(model, adapter, target) for target in adapter.targets}
    problems = _problems(model, terms, list(adapter.saved))
    if problems:
        raise AdapterError(f"mlx-lm's adapters cannot express:\n{bulleted(problems)}\nTry --to peft or --to merged.")
    scale = next(iter(terms.values())).scaling
    rank = max(term.rank for term in terms.values())
    tensors: dict[str, Tensor] = {}
    for target, term in terms.items():
        tensors |= _mlx_tensors(target, term, rank, scale)
    keys = sorted({match[2] if (match := _LAYER.fullmatch(target)) else target for target in terms})
    settings = {
        "model": base_name,
        "fine_tune_type": "dora" if adapter.spec.has_magnitude else "lora",
        "num_layers": model.config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.spec.dropout, "keys": keys},
    }
    (stage / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, stage / MLX_WEIGHTS, metadata={"format": "mlx"})
    write_base_record(model, stage, base_name)
    folded = sum(term.scaling != scale or term.rank != rank for term in terms.values())
    return [f"mlx-lm has one rank and scale a file: {folded} layers were filled up or scaled to these."] if folded else []


def _mlx_tensors(target: str, term: LowRankTerm, rank: int, scale: float) -> dict[str, Tensor]:
    """A term with zeros up to `rank`, its scaling in `scale` and what it differs by in lora_b."""
    missing = rank - term.rank
    tensors = {
        f"{target}.lora_a": pad(term.lora_A.detach().T, (0, missing)).contiguous(),
        f"{target}.lora_b": pad(term.lora_B.detach().T * (term.scaling / scale), (0, 0, 0, missing)).contiguous(),
    }
    if term.magnitude is not None:
        tensors[f"{target}.m"] = term.magnitude.detach().contiguous()
    return tensors


def to_peft_folder(folder: Path, model: PreTrainedModel, target: Path) -> Path:
    """Write the mlx-lm adapter in `folder` in PEFT's layout to the new folder `target`, which is returned.

    alpha = scale r, r the rank of each layer's tensors. A record of the base goes along where there is one.
    Raises AdapterError for settings or tensors that are missing, of another kind of tuning, or of layers that `model` has
    not, NumericError for NaN or Inf.
    """
    settings = _settings(folder)
    scale, dropout, dora = _parameters(folder, settings)
    tensors = _tensors(folder / MLX_WEIGHTS)
    layers = low_rank_layers(model)
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    check_finite_tensors(tensors, str(folder / MLX_WEIGHTS))
    problems = _misfits(names, tensors, set(layers), dora)
    if problems:
        raise AdapterError(
            f"{folder / MLX_WEIGHTS} must hold pairs for layers of the base:\n{bulleted(problems)}\nGive its base with --model."
        )
    ranks = {name: tensors[f"{name}.lora_a"].shape[1] for name in names}
    state: dict[str, Tensor] = {}
    for name in names:
        state |= _peft_tensors(name, tensors, isinstance(layers[name], LowRankEmbedding))
    content = _peft_settings(settings.get("model"), ranks, scale, dropout, dora)
    target.mkdir(parents=True)
    (target / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(state, target / WEIGHTS_FILE, metadata={"format": "pt"})
    if (folder / BASE_FILE).is_file():
        shutil.copyfile(folder / BASE_FILE, target / BASE_FILE)
    return target


def _misfits(names: list[str], tensors: Mapping[str, Tensor], layers: Collection[str], dora: bool) -> list[str]:
    """What is wrong with the tensors of an mlx-lm adapter, names those of its layers."""
    if not names:
        return ["lora_a tensors are missing"]
    ends = (".lora_a", ".lora_b", *((".m",) if dora else ()))
    expected = {f"{name}{end}" for name in names for end in ends}
    problems = [f"{name} is not a layer of the model" for name in names if name not in layers]
    problems += [f"{name} is missing" for name in sorted(expected - tensors.keys())]
    problems += [f"{name} has no place in an adapter" for name in sorted(tensors.keys() - expected)]
    for name in sorted(expected & tensors.keys()):
        dimensions = 1 if name.endswith(".m") else 2
        if tensors[name].dim() != dimensions:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, where {dimensions} dimensions are expected")
        if not tensors[name].is_floating_point():
            problems.append(f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}")
    return problems


def _peft_settings(base_name: Any, ranks: Mapping[str, int], scale: float, dropout: float, dora: bool) -> dict[str, Any]:
    """adapter_config.json as PEFT has it. ranks: by layer; alpha = scale r for each."""
    rank = max(ranks.values())
    others = {re.escape(name): own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": dropout,
        "use_dora": dora,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: scale * own for name, own in others.items()},
    }


def _peft_tensors(name: str, tensors: Mapping[str, Tensor], embedding: bool) -> dict[str, Tensor]:
    A, B = tensors[f"{name}.lora_a"].T.contiguous(), tensors[f"{name}.lora_b"].T.contiguous()
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    state = {f"{PREFIX}{name}.{kinds[0]}": A, f"{PREFIX}{name}.{kinds[1]}": B}
    if f"{name}.m" in tensors:
        state[f"{PREFIX}{name}.lora_magnitude_vector"] = tensors[f"{name}.m"].contiguous()
    return state


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} must be readable JSON; {error}. Copy the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must hold one JSON object; it holds a {type(content).__name__}. Copy the adapter again.")
    return content


def _parameters(folder: Path, settings: Mapping[str, Any]) -> tuple[float, float, bool]:
    """scale, dropout and whether it is a DoRA."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"an mlx-lm adapter is read as lora or dora; {folder} is {kind!r}, which has no low-rank terms.")
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale, dropout = parameters.get("scale"), parameters.get("dropout", 0.0)
    for label, number in (("scale", scale), ("dropout", dropout)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise AdapterError(f"lora_parameters.{label} must be a number; {folder / CONFIG_FILE} has {number!r}.")
    assert scale is not None
    if scale <= 0 or not 0 <= dropout < 1:
        raise AdapterError(
            f"lora_parameters.scale must be above 0, dropout at least 0 and below 1; {folder / CONFIG_FILE} has {scale} and "
            f"{dropout}."
        )
    return float(scale), float(dropout), kind == "dora"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} must be a whole safetensors file; {error}. Copy the adapter again.") from error


def _problems(model: PreTrainedModel, terms: Mapping[str, LowRankTerm], saved: list[str]) -> list[str]:
    problems = [f"{name} trained whole (modules_to_save)" for name in saved]
    if model.config.model_type not in SAME_NAMES:
        problems.append(f"the layers of {model.config.model_type}, which it calls otherwise")
    tied = tied_to(model)
    for target, term in terms.items():
        embedding = isinstance(model.get_submodule(target), LowRankEmbedding)
        if term.lora_B_bias is not None:
            problems.append(f"the bias of the term on {target} (lora_bias)")
        if embedding and term.magnitude is not None:
            problems.append(f"the magnitude of {target}: its DoRA of embeddings has one a token")
        if target in tied:
            problems.append(f"a term on {target} alone, which shares its matrix with {', '.join(tied[target])}")
    return problems
