"""Write a compressed model: its tensors, compression.json, configuration and tokenizer; or, where nothing in it is of a kind
that others do not know, the folder that they open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.disk import sha256_of
from luthier.errors import ConfigError
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import DenseMatrix, FactoredMatrix, Matrix, NF4Matrix, StoredMatrix
from luthier.models.compressed_description import DESCRIPTION_FILE, VERSION, Description, FileEntry, LayerEntry
from luthier.models.nf4_checkpoint import COMPRESSED_METHOD
from luthier.models.quantize import narrowest, write_quantized, write_weights
from luthier.models.skeleton import CONFIG_FILE
from luthier.progress import Progress

WEIGHTS_STEM = "compressed"


def write_compressed(
    stage: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    origin: str,
    progress: Progress | None = None,
) -> str:
    """Fill the empty folder `stage` with the model as its matrices are stored. Returns "bitsandbytes" or "luthier".

    A model whose linear layers are in NF4 or dense and whose embedding is dense is written as bitsandbytes' folder, which
    Transformers opens, where all that is plain fits the embedding's dtype exactly, since that folder has one dtype for all; the
    matrices in NF4 then record it as theirs. Any other has a compression.json. Tensors are written as they lie in memory.
    Raises ConfigError while adapters are attached, OSError where the disk refuses.
    """
    if any(len(layer.terms) for layer in _layers(model).values()):
        raise ConfigError("a model is compressed without adapters on it; merge or detach them first.")
    if is_bitsandbytes(model) and _fits_one_dtype(model):
        _record_dtype(model, _table_dtype(model))
        write_quantized(stage, model, tokenizer, progress)
        return "bitsandbytes"
    state, entries = stored_state(model)
    paths = [stage / file for file in write_weights(stage, state, progress, stem=WEIGHTS_STEM)]
    files = {path.name: FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths}
    description = Description(format="luthier-compressed", version=VERSION, origin=origin, files=files, layers=entries)
    (stage / DESCRIPTION_FILE).write_text(description.to_text(), encoding="utf-8")
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    content.pop("_name_or_path", None)
    content |= {
        "architectures": [type(model).__name__],
        "quantization_config": {"quant_method": COMPRESSED_METHOD, "version": VERSION},
    }
    (stage / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    return "luthier"


def is_bitsandbytes(model: PreTrainedModel) -> bool:
    """Whether others can open the model as it is: linear layers in NF4 or dense, at least one in NF4, embeddings dense."""
    layers = _layers(model)
    kinds = (DenseMatrix, NF4Matrix)
    linear = [layer.matrix for layer in layers.values() if isinstance(layer, LowRankLinear)]
    tables = [layer.matrix for layer in layers.values() if isinstance(layer, LowRankEmbedding)]
    some = any(isinstance(matrix, NF4Matrix) for matrix in linear)
    head = model.get_output_embeddings()
    plain_head = not isinstance(head, LowRankLinear) or isinstance(head.matrix, DenseMatrix)
    fits = all(isinstance(matrix, kinds) for matrix in linear) and all(isinstance(matrix, DenseMatrix) for matrix in tables)
    return some and fits and plain_head


def _table_dtype(model: PreTrainedModel) -> torch.dtype:
    return next(layer.matrix.weight.dtype for layer in _layers(model).values() if isinstance(layer, LowRankEmbedding))


def _fits_one_dtype(model: PreTrainedModel) -> bool:
    """Whether the embedding's dtype holds every plain number exactly."""
    state, dtype = stored_state(model)[0], _table_dtype(model)
    plain = [tensor for key, tensor in state.items() if tensor.is_floating_point() and ".weight." not in key]
    return all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in plain)


def _record_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for layer in _layers(model).values():
        if isinstance(layer.matrix, NF4Matrix):
            layer.matrix.dtype = dtype


def stored_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, LayerEntry]]:
    """Every tensor by the name that compression.json gives it, and the description of each matrix. Nothing is copied.

    A tied head is left out; a right factor that layers share stands once, under the first of them. What is no matrix is
    written in 16 bits where that holds it exactly.
    """
    layers = _layers(model)
    head = model.get_output_embeddings()
    state: dict[str, Tensor] = {}
    entries: dict[str, LayerEntry] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if name in layers:
            layer = layers[name]
            if layer is head and model.config.tie_word_embeddings:
                continue
            state |= matrix_tensors(name, layer.matrix, owners)
            entries[name] = _entry(name, layer.matrix, owners)
            if isinstance(layer, LowRankLinear) and layer.bias is not None:
                state[f"{name}.bias"] = narrowest(layer.bias.detach())
        elif not any(name.startswith(f"{outer}.") for outer in layers):
            own = module.state_dict(keep_vars=True)
            state |= {f"{name}.{key}": narrowest(tensor.detach()) for key, tensor in own.items() if "." not in key}
    return state, entries


def stored_bytes(model: PreTrainedModel) -> int:
    """The bytes of all tensors that `write_compressed` would write, head and embedding included, shared ones once."""
    state, _ = stored_state(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def matrix_tensors(name: str, matrix: Matrix, owners: dict[int, str]) -> dict[str, Tensor]:
    """The tensors of one matrix. owners: under which layer a right factor stands; grows by those that are new."""
    if not isinstance(matrix, FactoredMatrix):
        return _tensors(f"{name}.weight", matrix)
    found = {} if matrix.base is None else _tensors(f"{name}.weight", matrix.base)
    found |= _tensors(f"{name}.left.weight", matrix.left)
    if owners.setdefault(id(matrix.right), name) == name:
        found |= _tensors(f"{name}.right.weight", matrix.right)
    if matrix.places is not None:
        found[f"{name}.places"] = matrix.places
    return found


def _tensors(key: str, matrix: StoredMatrix) -> dict[str, Tensor]:
    if isinstance(matrix, NF4Matrix):
        return {f"{key}{part.removeprefix('weight')}": tensor.detach() for part, tensor in matrix.tensors().items()}
    return {key: matrix.weight.detach()}


def _entry(name: str, matrix: Matrix, owners: dict[int, str]) -> LayerEntry:
    owner = owners[id(matrix.right)] if isinstance(matrix, FactoredMatrix) else name
    shape = matrix.shape[::-1] if matrix.transposed else matrix.shape  # dense tensors are described as they lie
    return LayerEntry(shape=list(shape), kind=matrix.kind, right_of=None if owner == name else owner)


def _layers(model: PreTrainedModel) -> dict[str, LowRankLinear | LowRankEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear | LowRankEmbedding)}
