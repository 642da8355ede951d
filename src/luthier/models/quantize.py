"""Write a model as a folder with its linear layers in NF4, which Transformers opens with bitsandbytes and `load` opens here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import NF4Options
from luthier.errors import ConfigError, PreflightError
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import GGUFMatrix, NF4Matrix
from luthier.models.cache import publish
from luthier.models.checkpoint import INDEX_FILE
from luthier.models.load import Loaded, check_finite, load
from luthier.models.safetensors_writer import write_safetensors
from luthier.models.skeleton import CONFIG_FILE
from luthier.progress import Progress

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class QuantizeReport:
    """What was written: where, how many matrices went to NF4, which linear layers did not, the weights' bytes now and what
    they would be in 16 bits; and what loading had to say."""

    folder: str
    quantized: int
    kept: list[str]
    size_bytes: int
    size_bytes_in_16_bits: int
    notes: list[str] = field(default_factory=list)


def quantize(
    model: str,
    folder: str | Path,
    *,
    nf4: NF4Options,
    offline: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write `model` (named as for `load`) to the new folder `folder` with linear layers in NF4, tokenizer included.

    The head, embeddings and `nf4.skip_modules` stay as they are; GGUF blocks among them are written in float32. Weights
    that are in NF4 already are never rounded again: they keep codes and scales, and a note says so. The folder
    appears whole or not at all. Memory: the quantised model and one tensor. Raises ConfigError if the folder exists,
    PreflightError where it cannot be written, or a weight that stays as it is holds NaN or Inf, and what `load` raises.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists():
        raise ConfigError(f"a quantized model goes to a new folder; {target} exists. Choose another --out, or remove it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"{target.parent} must be a folder that can be written to; {error.strerror}.") from error
    loaded = load(model, base="nf4", nf4=nf4, offline=offline, progress=progress)
    check_finite(loaded.model)
    try:
        with publish(target) as stage:
            state = write_quantized(stage, loaded.model, loaded.tokenizer, progress)
    except OSError as error:
        raise PreflightError(
            f"{target} could not be written: {error.strerror or error}. Check the disk's free space."
        ) from error
    return _report(loaded, target, state)


def write_quantized(
    stage: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Fill the empty folder `stage` with a model whose linear layers are in NF4; the tensors that were written."""
    state, dtype = _plain_state(model)
    files = write_weights(stage, state, progress)
    write_index(stage, files, sum(_size(tensor) for tensor in state.values()))
    _write_settings(stage, model, tokenizer, str(dtype).removeprefix("torch."))
    return state


def narrowest(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16, else in float16, where that holds every number of it exactly; else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if tensor.is_floating_point() and torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def _plain_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], torch.dtype]:
    """All tensors under the names that Transformers gives them, a tied head left out, and the dtype of the plain ones.

    Transformers computes in the dtype it finds beside 4-bit weights, so there is one: what the weights had before, or
    float32 where that could not hold all plain tensors exactly.
    """
    state = {key: tensor for key, tensor in model.state_dict().items() if ".terms." not in key}
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if not isinstance(module, (LowRankLinear, LowRankEmbedding)):
            continue
        if tied and module is model.get_output_embeddings():
            del state[f"{name}.weight"]
        elif isinstance(module.matrix, GGUFMatrix):
            state[f"{name}.weight"] = module.matrix.dequantize()
    weights = _nf4_weights(model)
    plain = {key: tensor for key, tensor in state.items() if not _belongs_to_nf4(key, weights)}
    dtype = _dtype_before(model)
    if any(not torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in plain.values()):
        dtype = torch.float32
    return state | {key: tensor.to(dtype) for key, tensor in plain.items()}, dtype


def _nf4_weights(model: PreTrainedModel) -> set[str]:
    """The names of the weights in NF4, without those of their parts."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    return {f"{name}.weight" for name, layer in layers if isinstance(layer.matrix, NF4Matrix)}


def _belongs_to_nf4(key: str, weights: set[str]) -> bool:
    """Whether `key` is one of the weights or a part of one, `<weight>.absmax` and the like."""
    stem, part, _ = key.partition(".weight.")
    return (f"{stem}.weight" if part else key) in weights


def _dtype_before(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the weights had before: that of the first matrix in NF4."""
    return next((module.dtype for module in model.modules() if isinstance(module, NF4Matrix)), torch.float32)


def write_weights(
    stage: Path, state: dict[str, Tensor], progress: Progress | None, *, stem: str = "model"
) -> dict[str, list[str]]:
    """The tensors as one file `<stem>.safetensors`, or as numbered shards; the names of the tensors in each file."""
    total, done = sum(_size(tensor) for tensor in state.values()), 0

    def written(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress("writing", done, total)

    shards = _shards(state)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = dict(zip(names, shards, strict=True)) if len(shards) > 1 else {f"{stem}.safetensors": shards[0]}
    for file, own in files.items():
        write_safetensors(stage / file, {name: state[name] for name in own}, written=written)
    return files


def write_index(stage: Path, files: dict[str, list[str]], total_bytes: int) -> None:
    """Transformers' index beside shards; nothing where there is one file."""
    if len(files) == 1:
        return
    weight_map = {name: file for file, own in files.items() for name in own}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(state: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, cut where a shard would grow beyond SHARD_BYTES; a weight and its scales stay together."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        begins_weight = ".weight." not in name
        if begins_weight and shards[-1] and size + _size(tensor) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _size(tensor)
    return shards


def _write_settings(stage: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    double = any(module.double_quant for module in model.modules() if isinstance(module, NF4Matrix))
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    content |= {
        "architectures": [type(model).__name__],
        "dtype": dtype,
        "quantization_config": bitsandbytes_settings(_kept(model), double=double, dtype=dtype),
    }
    (stage / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(stage)
    tokenizer.save_pretrained(stage)


def bitsandbytes_settings(kept: list[str], *, double: bool, dtype: str) -> dict[str, Any]:
    """The quantization_config that Transformers writes for a model it quantised with bitsandbytes.

    kept: the linear layers that are not in NF4, by their whole names; dtype: of what is computed, as torch names it.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _kept(model: PreTrainedModel) -> list[str]:
    """The linear layers that are not in NF4, by their whole names; routers too, which bitsandbytes would take for linear."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, LowRankLinear) and not isinstance(module.matrix, NF4Matrix)) or isinstance(module, nn.Linear)
    ]


def _report(loaded: Loaded, folder: Path, state: dict[str, Tensor]) -> QuantizeReport:
    model = loaded.model
    quantized = [module for module in model.modules() if isinstance(module, NF4Matrix)]
    weights = _nf4_weights(model)
    apart = sum(tensor.numel() for name, tensor in state.items() if not _belongs_to_nf4(name, weights))
    numbers = apart + sum(matrix.shape[0] * matrix.shape[1] for matrix in quantized)
    size_bytes = sum(_size(tensor) for tensor in state.values())
    return QuantizeReport(str(folder), len(quantized), _kept(model), size_bytes, 2 * numbers, loaded.notes)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
