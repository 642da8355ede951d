"""What a model will be before any of its weights is read: its modules, and how each matrix is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config import RunConfig
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS, NF4_BLOCK, NF4_NESTED_BLOCK
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import DenseMatrix, Matrix
from luthier.matrices.factored import FactoredKind
from luthier.matrices.nf4 import CONVERTED_ELEMENTS
from luthier.models.checkpoint import WeightSource
from luthier.models.fill import Filler
from luthier.models.load import open_weights
from luthier.models.skeleton import build_skeleton
from luthier.models.source import resolve
from luthier.models.stored import is_linear
from luthier.training.events import Listener

FLOAT_BYTES = 4
CODE_BYTES, NESTED_MAP_BYTES = 16 * 4, 256 * 4

# (name of the layer, out_features, in_features) -> the matrix that is to stand there.
MakeMatrix = Callable[[str, int, int], Matrix]


@dataclass(frozen=True)
class Blueprint:
    """A model known from its headers alone.

    skeleton: its modules, low-rank layers in their places, weights on the meta device. storages: the kind of every
    matrix by the name of its weight. matrix_bytes: all matrices as they will be stored, the tied one once; plain_bytes:
    norms, biases and whatever else is float32; loading_bytes: what converting the largest tensor takes beside them.
    """

    path: str
    config: PretrainedConfig
    skeleton: PreTrainedModel
    storages: dict[str, str]
    matrix_bytes: int
    plain_bytes: int
    loading_bytes: int

    @property
    def base_bytes(self) -> int:
        return self.matrix_bytes + self.plain_bytes

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def head_storage(self) -> str:
        """The kind of the matrix that the output head multiplies with."""
        head, embedding = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        own = self.storages.get(f"{names[id(head)]}.weight")
        return own or self.storages[f"{names[id(embedding)]}.weight"]


def read_blueprint(config: RunConfig, listener: Listener) -> Blueprint:
    """The model of `config` from its config.json and headers, or a GGUF file's metadata.

    Raises ConfigError, ModelError as loading would for what the headers already show.
    """
    source = resolve(config.model, offline=config.offline, progress=listener.stage)
    model_config, weights = open_weights(source.path)
    skeleton = build_skeleton(model_config, str(source.path))
    filler = Filler(skeleton, weights, config.storage, str(source.path), config.nf4_options)
    storages = filler.storages()
    if config.method == "full":
        storages = dict.fromkeys(storages, "f32")
    loading = max(_loading_bytes(filler, weights, key, kind) for key, kind in storages.items())
    shapes = {key: tuple(skeleton.get_parameter(key).shape) for key in storages}
    matrix_bytes = sum(stored_bytes(kind, *shapes[key], double=config.double_quant) for key, kind in storages.items())
    tied = filler.tied
    plain = sum(p.numel() for key, p in skeleton.named_parameters() if key not in storages) * FLOAT_BYTES
    put_layers(skeleton, lambda _name, rows, columns: DenseMatrix(torch.empty(rows, columns, device="meta")), tied=tied)
    return Blueprint(str(source.path), model_config, skeleton, storages, matrix_bytes, plain, loading)


def _loading_bytes(filler: Filler, weights: WeightSource, key: str, kind: str) -> int:
    """What stands beside the model while this weight is converted: its numbers as they are read, of blocks on their way to nf4
    a few rows; 0 where it is mapped."""
    name = filler.source_name(key)
    dtype = weights.dtype(name)
    if kind == weights.kind(name) or (weights.kind(name) is None and DENSE_DTYPES.get(kind) == dtype):
        return 0
    whole = prod(weights.shape(name)) * (dtype or torch.float32).itemsize
    is_in_rows = kind == "nf4" and weights.kind(name) is not None
    return min(whole, CONVERTED_ELEMENTS * FLOAT_BYTES) if is_in_rows else whole


def stored_bytes(kind: str, rows: int, columns: int, *, double: bool) -> int:
    """Bytes of a matrix (rows, columns) of that kind. double: NF4's scales are in 8 bits."""
    factored = FactoredKind.parse(kind)
    if factored is not None:
        own = rows - factored.rank if factored.pivoted else rows
        parts = [(factored.left, own, factored.rank), (factored.right, factored.rank, columns)]
        parts += [(factored.base, rows, columns)] if factored.base else []
        return sum(stored_bytes(part, *sizes, double=double) for part, *sizes in parts) + (4 * rows if factored.pivoted else 0)
    weights = rows * columns
    if kind in DENSE_DTYPES:
        return weights * DENSE_DTYPES[kind].itemsize
    if kind in GGUF_BLOCKS:
        size, block_bytes = GGUF_BLOCKS[kind]
        return weights // size * block_bytes
    blocks = -(-weights // NF4_BLOCK)
    scales = blocks + -(-blocks // NF4_NESTED_BLOCK) * FLOAT_BYTES + NESTED_MAP_BYTES if double else blocks * FLOAT_BYTES
    return -(-weights // 2) + CODE_BYTES + scales


def put_layers(model: PreTrainedModel, make: MakeMatrix, *, tied: bool) -> None:
    """Replace the token embedding and all linear layers, Conv1D among them, by low-rank ones over the matrices of `make`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    scale = getattr(embedding, "embed_scale", None)
    vocabulary, hidden_size = model.get_parameter(f"{names[id(embedding)]}.weight").shape
    table = make(names[id(embedding)], vocabulary, hidden_size)
    model.set_submodule(names[id(embedding)], LowRankEmbedding(table, None, 1.0 if scale is None else float(scale)))
    for name, module in list(model.named_modules()):
        if not is_linear(module):
            continue
        rows, columns = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        matrix = table if tied and module is head else make(name, rows, columns)
        model.set_submodule(name, LowRankLinear(matrix, module.bias))
