"""Adapters as folders in PEFT's layout: what is written here opens in PEFT, what PEFT writes opens here.

A folder holds adapter_config.json, adapter_model.safetensors and, written here, luthier_base.json, which PEFT leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.adapters.attachment import (
    check_attachable,
    copy_modules,
    count_numbers,
    install,
    make_term,
    tied_target_notes,
    untying_notes,
)
from luthier.adapters.base_record import BASE_FILE, LARGEST_DIFFERENCE, compare_base, write_base_record
from luthier.adapters.files import recover, staged_folder
from luthier.adapters.peft_config import CONFIG_FILE, PeftConfig, config_fields, find_saved, find_targets, read_config
from luthier.adapters.registry import PREFIX, Attached, AttachReport, pick, terms_of
from luthier.adapters.spec import AdapterSpec
from luthier.adapters.state import adapter_state, check_finite_tensors, misfits
from luthier.adapters.targets import Layer, inert_patterns, low_rank_layers
from luthier.errors import AdapterError, bulleted, one_line
from luthier.linear import LowRankEmbedding, LowRankTerm
from luthier.matrices import DenseMatrix

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADAPTER_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, BASE_FILE})
MODEL_CARD = frozenset({"README.md"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_adapter(model: nn.Module, folder: str | Path, *, base_name: str | None = None, name: str | None = None) -> Path:
    """Write an attached adapter as a PEFT folder, which appears whole or not at all, and return the folder.

    It stands on the base as it was loaded: where the start of its terms is taken off again, s (B A - B0 A0) is written as
    one term of rank 2r.
    base_name: how the base model is called, for PEFT's AutoPeftModel; default: the name the model carries.
    name: which adapter; not needed where only one is attached.
    Raises AdapterError if there is no such adapter or `folder` holds anything but an earlier adapter; NumericError if
    the adapter holds NaN or Inf.
    """
    adapter = pick(model, name)
    state = adapter_state(model, adapter.name)
    if adapter.taken_off:
        adapter = _with_start(model, adapter, state)
    check_finite_tensors(state, "an adapter that is saved")
    layers = low_rank_layers(model)
    state |= {
        _base_key(target): _stored(layers[target]) for target in adapter.targets if isinstance(layers[target], LowRankEmbedding)
    }
    base_name = base_name or getattr(model, "name_or_path", None) or None
    transposed = any(layers[target].matrix.transposed for target in adapter.targets)
    fields = config_fields(
        model, adapter, base_name, transposed=transposed, lora_bias=any(key.endswith(".lora_B.bias") for key in state)
    )
    target_folder = Path(folder)
    with staged_folder(target_folder, ADAPTER_FILES, MODEL_CARD) as stage:
        (stage / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(state, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        write_base_record(model, stage, base_name)
    return target_folder


def load_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, name: str = "default", other_base: bool = False
) -> AttachReport:
    """Read a PEFT folder and put its adapter on the model: LoRA, rsLoRA, DoRA, patterns, embeddings, modules_to_save.

    trainable: whether it is trained further or stays as it is. other_base=True loads an adapter whose record or saved
    embedding shows another base as long as all shapes fit, and says so in a note.
    The report's notes say what has no effect, and what could not be checked where the adapter brings no record of its base.
    Raises AdapterError for files that are missing or damaged, for what cannot be expressed, naming it, for tensors that
    are missing, too many or misshapen, all at once, and for an adapter of another base; NumericError for NaN or Inf.
    """
    folder = Path(folder)
    check_attachable(model, name)
    _check_files(folder)
    config = read_config(folder)
    state = _read_tensors(folder / WEIGHTS_FILE)
    saved_names = find_saved(model, config)
    targets = find_targets(model, config, saved_names)
    inert = inert_patterns(config.spec, targets)
    tied = config.spec.ensure_weight_tying
    if trainable and tied and targets and not saved_names:
        raise AdapterError(
            "terms on tied head and embedding cannot be trained as one. Load the adapter without trainable=True."
        )
    saved = copy_modules(model, saved_names, tied=tied)
    notes = list(config.notes)
    notes += [
        f"{CONFIG_FILE}: {label} {pattern[:80]!r} matches none of the adapter's layers and has no effect."
        for label, pattern in inert
    ]
    notes += _check_fit(model, folder, config, targets, saved_names, state, other_base)
    check_finite_tensors(state, f"{folder / WEIGHTS_FILE}")
    adapter = Attached(name, _resolved(config.spec, targets, saved_names, inert), targets)
    notes += [] if tied else untying_notes(model, saved_names)
    layers = low_rank_layers(model)
    terms = {target: _read_term(layers[target], adapter.spec, target, state) for target in targets}
    for path, module in saved.items():
        prefix = f"{PREFIX}{path}."
        module.trained.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    install(model, adapter, terms, saved)
    for part in [*terms.values(), *(module.trained for module in saved.values())]:
        part.requires_grad_(trainable)
    notes += tied_target_notes(model, targets)
    return AttachReport(targets, count_numbers(model, adapter) if trainable else 0, notes)


def _with_start(model: nn.Module, adapter: Attached, state: dict[str, Tensor]) -> Attached:
    """Put s (B A - B0 A0) = s [B, -B0] [A; A0] into `state` and return a record with the rank and alpha that belong to it.

    Twice the rank with the same s: alpha is doubled too, and multiplied by the root of 2 where s = alpha / sqrt(r). Layers
    whose start is not taken off are filled up with zeros, for their ranks follow the same patterns.
    """
    for target in adapter.targets:
        *taken, term = terms_of(model, adapter, target)
        embedding = isinstance(model.get_submodule(target), LowRankEmbedding)
        keys = [f"{PREFIX}{target}.lora_{'embedding_' * embedding}{side}{'' if embedding else '.weight'}" for side in "AB"]
        A0, B0 = (taken[0].lora_A, taken[0].lora_B) if taken else (torch.zeros_like(term.lora_A), torch.zeros_like(term.lora_B))
        state[keys[0]] = torch.cat([term.lora_A, A0]).detach().to("cpu").contiguous()
        state[keys[1]] = torch.cat([term.lora_B, B0], 1).detach().to("cpu").contiguous()
    spec = adapter.spec
    factor = math.sqrt(2) if spec.rank_stabilized else 2
    doubled = dataclasses.replace(
        spec,
        rank=2 * spec.rank,
        alpha=factor * spec.alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in spec.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in spec.alpha_pattern.items()},
    )
    return dataclasses.replace(adapter, spec=doubled)


def _check_files(folder: Path) -> None:
    try:
        recover(folder)
        present = {file for file in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE) if (folder / file).is_file()}
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise AdapterError(
            f"an adapter is a folder that can be read; {str(folder)[:200]!r}: {reason}. Check the path."
        ) from error
    if {CONFIG_FILE, WEIGHTS_FILE} <= present:
        return
    if PICKLE_FILE in present and WEIGHTS_FILE not in present:
        raise AdapterError(
            f"adapter weights must be in {WEIGHTS_FILE}; {folder} holds {PICKLE_FILE}, a pickle, which could run code and is "
            "never opened. Convert it where you trust it: load it in PEFT and call save_pretrained."
        )
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in present]
    raise AdapterError(
        f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
        f"{folder} has no {' and no '.join(missing)}. Check the path."
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} must be a whole safetensors file; {one_line(error)}. Copy the adapter again.") from error
    odd = [
        f"{key} is {str(tensor.dtype).removeprefix('torch.')}" for key, tensor in state.items() if tensor.dtype not in DTYPES
    ]
    if odd:
        raise AdapterError(f"adapter tensors must be float32, bfloat16 or float16; {path}:\n{bulleted(odd)}")
    return state


def _check_fit(
    model: nn.Module,
    folder: Path,
    config: PeftConfig,
    targets: Sequence[str],
    saved: Sequence[str],
    state: dict[str, Tensor],
    other_base: bool,
) -> list[str]:
    """Raise AdapterError unless keys and shapes are those expected and the base is the one the adapter was made on.

    Takes copies of base weights out of `state`. Returns a note where `other_base` lets a difference pass.
    """
    layers = low_rank_layers(model)
    base_weights = {name: state.pop(_base_key(name)) for name in layers if _base_key(name) in state}
    expected: dict[str, tuple[int, ...]] = {}
    for target in targets:
        expected |= _term_shapes(layers[target], config, target)
    for name in saved:
        expected |= {
            f"{PREFIX}{name}.{key}": tuple(tensor.shape) for key, tensor in model.get_submodule(name).state_dict().items()
        }
    problems = misfits(expected, state)
    for name, weight in base_weights.items():
        if tuple(weight.shape) != layers[name].matrix.shape:
            problems.append(f"{_base_key(name)} must be {layers[name].matrix.shape}; it is {tuple(weight.shape)}")
    if problems:
        made_on = f" It was made on {config.base_name!r}." if config.base_name else ""
        raise AdapterError(
            f"the adapter must fit the model; {folder}:\n{bulleted(problems)}\nLoad the base model it was made on.{made_on}"
        )
    comparison = compare_base(model, folder)
    note = _unchecked(config, base_weights) if comparison is None else comparison.note
    different = comparison.problem if comparison else None
    if different is None and (comparison is None or comparison.note is None):
        different = _different_weight(layers, base_weights)
    if different is None:
        return [note] if note else []
    if not other_base:
        raise AdapterError(
            f"an adapter works on the base model it was made on; {folder}: {different} "
            "Load that model, or pass other_base=True if you mean it."
        )
    return [f"The adapter was made on another base: {different}"]


def _unchecked(config: PeftConfig, base_weights: dict[str, Tensor]) -> str:
    """What cannot be known of an adapter that brings no record of its base."""
    made_on = f", {config.base_name!r}," if config.base_name else ""
    embedding = f", and the embedding saved with it ({', '.join(base_weights)})" if base_weights else ""
    return (
        f"The adapter brings no {BASE_FILE}: names and shapes fit{embedding}; that this is the base it was trained on{made_on} "
        "cannot be checked."
    )


def _different_weight(layers: dict[str, Layer], base_weights: dict[str, Tensor]) -> str | None:
    for name, weight in base_weights.items():
        own = layers[name].matrix.dequantize()
        difference = float((weight.to(torch.float32) - own).norm() / own.norm().clamp_min(1e-30))
        if not difference <= LARGEST_DIFFERENCE:
            return f"the weights of {name} saved with it differ by {difference:.2g} of their size."
    return None


def _term_shapes(layer: Layer, config: PeftConfig, name: str) -> dict[str, tuple[int, ...]]:
    prefix, rank = PREFIX + name, config.spec.rank_of(name)
    rows, columns = layer.matrix.shape
    if isinstance(layer, LowRankEmbedding):
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.lora_embedding_A": (rank, rows),
            f"{prefix}.lora_embedding_B": (columns, rank),
        }
    else:
        shapes = {f"{prefix}.lora_A.weight": (rank, columns), f"{prefix}.lora_B.weight": (rows, rank)}
        if config.lora_bias:
            shapes[f"{prefix}.lora_B.bias"] = (rows,)
    if config.spec.has_magnitude:
        shapes[f"{prefix}.lora_magnitude_vector"] = (columns if isinstance(layer, LowRankEmbedding) else rows,)
    return shapes


def _read_term(layer: Layer, spec: AdapterSpec, name: str, state: dict[str, Tensor]) -> LowRankTerm:
    prefix = PREFIX + name
    magnitude = state.get(f"{prefix}.lora_magnitude_vector")
    if isinstance(layer, LowRankEmbedding):
        return make_term(layer, spec, name, state[f"{prefix}.lora_embedding_A"], state[f"{prefix}.lora_embedding_B"], magnitude)
    bias = state.get(f"{prefix}.lora_B.bias")
    return make_term(layer, spec, name, state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"], magnitude, bias)


def _resolved(spec: AdapterSpec, targets: list[str], saved: list[str], inert: list[tuple[str, str]]) -> AdapterSpec:
    """The settings with whole module names in place of what matched them, without patterns that match nothing.

    Weights tied in trained modules stay tied.
    """
    return dataclasses.replace(
        spec,
        targets=targets,
        rank_pattern={key: rank for key, rank in spec.rank_pattern.items() if ("rank_pattern", key) not in inert},
        alpha_pattern={key: alpha for key, alpha in spec.alpha_pattern.items() if ("alpha_pattern", key) not in inert},
        modules_to_save=saved,
        ensure_weight_tying=spec.ensure_weight_tying and bool(saved),
    )


def _base_key(name: str) -> str:
    return f"{PREFIX}{name}.base_layer.weight"


def _stored(layer: Layer) -> Tensor:
    """The base's matrix in numbers: in its own dtype, or in float32 where it is stored in blocks."""
    matrix = layer.matrix
    return (matrix.weight.detach() if isinstance(matrix, DenseMatrix) else matrix.dequantize()).to("cpu").contiguous()
