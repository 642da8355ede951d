"""What llama.cpp's rounding alone does: our own forward with the inputs of stored matrices rounded as llama.cpp takes them.

ggml brings what it multiplies with a matrix into a type that goes with the matrix's own: beside blocks of 32 weights into
Q8_0 or Q8_1, each 32 numbers divided by their largest magnitude over 127, which is kept in float16, and rounded to integers;
beside blocks of 256 into Q8_K, whose scale is of 256 numbers and in float32; beside float16 and bfloat16 into that dtype
(ggml-cpu.c, the vec_dot_type of each type; ggml-quants.c, quantize_row_q8_0_ref, _q8_1_ref and _q8_K_ref). Low-rank terms
are float32 in their files and take float32, there and here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier import kernels
from luthier.adapters.targets import low_rank_layers
from luthier.export.compare import Reference, model_logits
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS
from luthier.matrices import Matrix
from luthier.models.blocks.body import without_blocks

SUPERBLOCK = 256


def rounded_logits(model: PreTrainedModel, reference: Reference) -> Iterator[Tensor]:
    """The logits of each pack of the reference, its model's activations rounded as llama.cpp rounds them."""
    with without_blocks(), _rounding(model):
        yield from model_logits(model, reference)


def in_8_bits(x: Tensor, block: int) -> Tensor:
    """x, (..., features) float32, after ggml's Q8_0 (block 32) or Q8_K (block 256) and back."""
    blocks = x.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, torch.zeros(())).round()
    kept = scale if block == SUPERBLOCK else scale.to(torch.float16).to(torch.float32)
    return (codes * kept).reshape(x.shape)


def as_taken(x: Tensor, kind: str) -> Tensor:
    """x, (..., features) float32, as llama.cpp multiplies it with a matrix stored as `kind`, in float32 again."""
    if kind in DENSE_DTYPES:
        return x.to(DENSE_DTYPES[kind]).to(torch.float32)
    return in_8_bits(x, GGUF_BLOCKS[kind][0])


@contextmanager
def _rounding(model: PreTrainedModel) -> Iterator[None]:
    """Within it every matrix takes rounded inputs."""
    before = [(layer, layer.matrix) for layer in low_rank_layers(model).values()]
    try:
        for layer, matrix in before:
            layer.matrix = _Rounding(matrix)  # type: ignore[assignment]
        yield
    finally:
        for layer, matrix in before:
            layer.matrix = matrix


class _Rounding(nn.Module):
    """In a layer's place of its matrix: x W^T with x rounded, the term with x as it is."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self._matrix = [matrix]  # in a list, so that it is no module of the model
        self.shape, self.weight, self.kind, self.transposed = matrix.shape, matrix.weight, matrix.kind, False

    def matmul(self, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
        y = self._matrix[0].matmul(as_taken(x, self.kind), bias)
        return y if term is None else y + term.scaling * (x @ term.A.T @ term.B.T)

    def rows(self, ids: Tensor) -> Tensor:
        return self._matrix[0].rows(ids)
