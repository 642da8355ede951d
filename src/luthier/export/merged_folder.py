"""A merged model as a Transformers folder, written shard by shard: memory holds one shard beside the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.errors import ConfigError, ModelError, one_line
from luthier.export import forms
from luthier.export.merge import Merge, Part
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, NF4Matrix, StoredMatrix
from luthier.models.checkpoint import INDEX_FILE, SINGLE_FILE
from luthier.models.quantize import bitsandbytes_settings
from luthier.models.safetensors_writer import write_safetensors
from luthier.models.skeleton import CONFIG_FILE
from luthier.progress import Progress

SHARD_BYTES = 1 << 30
DTYPE_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# In which dtype the tensors stand beside 4-bit ones, and bitsandbytes computes.
BESIDE_NF4 = "bf16"


def default_kind(merge: Merge) -> str:
    """The kind that the base's matrices have where all are dense of one dtype, otherwise bf16."""
    kinds = {matrix.kind for name in merge.layers if isinstance(matrix := merge.matrix(name), DenseMatrix)}
    dense_only = all(isinstance(module, DenseMatrix) for module in merge.model.modules() if isinstance(module, StoredMatrix))
    return kinds.pop() if dense_only and len(kinds) == 1 else "bf16"


def check_kind(merge: Merge, kind: str) -> None:
    """Raise ConfigError for nf4 of a family that keeps its weights turned, as GPT-2 does."""
    if kind == "nf4" and any(layer.matrix.transposed for layer in merge.layers.values()):
        raise ConfigError(
            f"nf4 holds weights as (out, in); {merge.model.config.model_type} keeps its the other way. Try --dtype bf16."
        )


def merged_layer_kind(merge: Merge, layer: str, kind: str) -> str:
    """How one layer's matrix is stored in a model of `kind`: with nf4 only linear layers but the head are in 4 bits."""
    if kind != "nf4":
        return kind
    return "nf4" if layer != merge.head and isinstance(merge.layers[layer], LowRankLinear) else BESIDE_NF4


def _kind_of(merge: Merge, part: Part, kind: str) -> str:
    if part.layer is not None:
        return merged_layer_kind(merge, part.layer, kind)
    return BESIDE_NF4 if kind == "nf4" else kind


def write_merged(
    stage: Path, merge: Merge, tokenizer: PreTrainedTokenizerBase, kind: str, *, progress: Progress | None = None
) -> int:
    """Write weights, configuration, generation settings and tokenizer into the empty folder `stage`; the bytes of weights.

    kind: f32, bf16, f16, or nf4, which Transformers opens with bitsandbytes. Where the merge has untied head and
    embedding, both are written and config.json says tie_word_embeddings false.
    Raises NumericError naming a tensor that `kind` cannot hold, ModelError for settings of the base that Transformers refuses
    to write, and what `check_kind` raises.
    """
    check_kind(merge, kind)
    total = _write_weights(stage, merge, kind, progress)
    _write_config(stage, merge, kind)
    _write_settings(stage, merge, tokenizer)
    return total


def _write_settings(stage: Path, merge: Merge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generation settings and tokenizer, each as Transformers saves it."""
    try:
        if merge.model.can_generate():
            merge.model.generation_config.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    except ValueError as error:
        raise ModelError(
            f"the base's generation settings and tokenizer must be fit to be saved; Transformers says: {one_line(error)}. Mend "
            "them in the base's folder."
        ) from error


def _write_weights(stage: Path, merge: Merge, kind: str, progress: Progress | None) -> int:
    shards = _shards(merge, kind)
    total, done = sum(_bytes(merge, part, kind) for shard in shards for part in shard), 0
    weight_map: dict[str, str] = {}
    written = 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in shard:
            tensors |= _tensors(merge, part, kind)
            done += _bytes(merge, part, kind)
            if progress is not None:
                progress("merging", done, total)
        write_safetensors(stage / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        written += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": written}, "weight_map": weight_map}
        (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


@torch.no_grad()
def _tensors(merge: Merge, part: Part, kind: str) -> dict[str, Tensor]:
    """The part as it is written: one tensor, or those that bitsandbytes keeps for a matrix."""
    value, own = merge.value(part), _kind_of(merge, part, kind)
    if own != "nf4":
        return {part.name: forms.dense(merge.stored(part, value), own, part.name)}
    matrix = forms.as_kind(value, "nf4", part.name)
    assert isinstance(matrix, NF4Matrix)
    matrix.dtype = torch.bfloat16
    stem = part.name.removesuffix("weight")
    return {f"{stem}{key}": tensor.detach() for key, tensor in matrix.tensors().items()}


def _shards(merge: Merge, kind: str) -> list[list[Part]]:
    """The parts in order, cut where a shard would grow beyond SHARD_BYTES."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in merge.parts():
        own = _bytes(merge, part, kind)
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += own
    return shards


def _bytes(merge: Merge, part: Part, kind: str) -> int:
    return forms.size_bytes(part.shape, _kind_of(merge, part, kind))


def _write_config(stage: Path, merge: Merge, kind: str) -> None:
    model = merge.model
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    content.pop("_name_or_path", None)
    content |= {
        "architectures": [type(model).__name__],
        "dtype": DTYPE_NAMES[kind if kind in DTYPE_NAMES else BESIDE_NF4],
        "tie_word_embeddings": merge.tied,
    }
    if kind == "nf4":
        kept = [part.layer for part in _linear_parts(merge) if part.layer and _kind_of(merge, part, kind) != "nf4"]
        names = kept if not merge.tied else [*kept, merge.head]
        content["quantization_config"] = bitsandbytes_settings(names, double=True, dtype=DTYPE_NAMES[BESIDE_NF4])
    (stage / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _linear_parts(merge: Merge) -> Iterator[Part]:
    return (part for part in merge.parts() if part.layer and isinstance(merge.layers[part.layer], LowRankLinear))
