"""What llama.cpp's rounding alone does: our own forward with the inputs of stored blocks in 8 bits, as llama.cpp takes them.

ggml multiplies a matrix in blocks with activations in its Q8_0 or Q8_1 type: each 32 of them divided by their largest
magnitude over 127, which is kept in float16, and rounded to integers (ggml-quants.c, quantize_row_q8_0_ref and q8_1_ref).
Low-rank terms are float32 files and take float32 activations, there and here. Blocks of 256 weights take Q8_K, whose scale
is of 256 activations and in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from luthier.export.compare import Reference

BLOCK, SUPERBLOCK = 32, 256


def rounded_logits(model: Any, reference: Reference) -> Iterator[Tensor]:
    """The logits of each pack of the reference, its model's activations rounded as llama.cpp rounds them."""
    from luthier.export.compare import model_logits
    from luthier.models.blocks.body import without_blocks

    with without_blocks(), rounding(model):
        yield from model_logits(model, reference)


def in_8_bits(x: Tensor, block: int) -> Tensor:
    """x, (..., features) float32, after ggml's Q8_0 (block 32) or Q8_K (block 256) and back."""
    blocks = x.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, torch.zeros(())).round()
    kept = scale.to(torch.float16).to(torch.float32) if block == BLOCK else scale
    return (codes * kept).reshape(x.shape)


@contextmanager
def rounding(model: Any) -> Iterator[None]:
    """Within it every matrix in blocks takes rounded inputs."""
    from luthier.adapters.targets import low_rank_layers
    from luthier.matrices import GGUFMatrix

    layers = [layer for layer in low_rank_layers(model).values() if isinstance(layer.matrix, GGUFMatrix)]
    before = [layer.matrix for layer in layers]
    try:
        for layer in layers:
            layer.matrix = Rounding(layer.matrix)
        yield
    finally:
        for layer, matrix in zip(layers, before, strict=True):
            layer.matrix = matrix


class Rounding(nn.Module):
    """In a layer's place of its matrix: x W^T with x in 8 bits, the term with x as it is."""

    def __init__(self, matrix: Any):
        super().__init__()
        self._matrix = [matrix]  # in a list, so that it is no module of the model
        self.shape, self.weight, self.kind, self.transposed = matrix.shape, matrix.weight, matrix.kind, False
        self._block = SUPERBLOCK if self.kind.endswith("_k") else BLOCK

    def matmul(self, x: Tensor, bias: Tensor | None = None, term: Any = None) -> Tensor:
        y = self._matrix[0].matmul(in_8_bits(x, self._block), bias)
        return y if term is None else y + term.scaling * (x @ term.A.T @ term.B.T)

    def rows(self, ids: Tensor) -> Tensor:
        return self._matrix[0].rows(ids)
