"""A matrix that keeps the blocks of a GGUF file as they are: what is trained on is what llama.cpp will serve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.errors import ShapeError, nearest
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.matrices.frozen import StoredMatrix

# Where in a block its float16 scale, and its float16 minimum if it has one, stand.
SCALE_OFFSETS = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}


class GGUFMatrix(StoredMatrix):
    """W: (out_features, in_features) in blocks of one GGUF type, each row a whole number of them.

    blocks: uint8 (out_features, bytes a row), taken as it is, mapped memory included; kind: q4_0, q4_1, q5_0, q5_1, q8_0,
    q4_k, q5_k or q6_k. f32, bf16 and f16 tensors of a GGUF file are a DenseMatrix.
    Raises ShapeError for another kind, or rows that are not whole blocks.
    """

    kind: str
    weight: nn.Parameter

    def __init__(self, blocks: Tensor, kind: str):
        super().__init__()
        if kind not in GGUF_BLOCKS:
            raise ShapeError(f"blocks are one of {', '.join(GGUF_BLOCKS)}; got {kind!r}.{nearest(kind, list(GGUF_BLOCKS))}")
        size = GGUF_BLOCKS[kind][1]
        if blocks.ndim != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % size or not blocks.numel():
            raise ShapeError(f"{kind} rows are whole blocks of {size} bytes, uint8; got {tuple(blocks.shape)} {blocks.dtype}.")
        self.kind = kind
        self.weight = nn.Parameter(blocks.contiguous(), requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        weights, size = GGUF_BLOCKS[self.kind]
        return self.weight.shape[0], self.weight.shape[1] // size * weights

    def storage(self) -> kernels.Storage:
        """The blocks as the kernels take them; no copy."""
        return kernels.Storage(self.kind, self.shape, self.weight.detach())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W as float32. ids: (...) int64 -> (..., in_features). Only the blocks of these rows are read."""
        return self._dequantized(self.weight[ids.reshape(-1)]).reshape(*ids.shape, self.shape[1])

    def row_range(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as float32, (stop - start, in_features)."""
        return self._dequantized(self.weight[start:stop])

    def _dequantized(self, blocks: Tensor) -> Tensor:
        if len(blocks) == 0:
            return torch.empty(0, self.shape[1], device=blocks.device)
        return kernels.dequantize(kernels.Storage(self.kind, (len(blocks), self.shape[1]), blocks.detach()))

    def not_finite(self) -> int:
        """How many weights are NaN or Inf: those of blocks whose scale or minimum is; all else are integers."""
        weights, size = GGUF_BLOCKS[self.kind]
        blocks = self.weight.detach().reshape(-1, size)
        bad = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
        for at in SCALE_OFFSETS[self.kind]:
            bad |= ~blocks[:, at : at + 2].contiguous().view(torch.float16).isfinite().squeeze(1)
        return int(bad.sum()) * weights
