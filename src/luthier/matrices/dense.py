"""A matrix stored in float32, bfloat16 or float16 and multiplied in the activations' precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import kernels
from luthier.errors import ShapeError
from luthier.kernels.storage import DENSE_DTYPES
from luthier.matrices.frozen import StoredMatrix

# Numbers that are checked at the same time: what stands beside them is a few bytes each.
CHECKED_AT_ONCE = 2**18


class DenseMatrix(StoredMatrix):
    """W: (out_features, in_features), float32, bfloat16 or float16.

    `transposed=True` says that the tensor is laid out (in_features, out_features), as GPT-2's Conv1D stores it;
    the tensor is kept as it came, and only its use is turned.
    Raises ShapeError for a tensor that is not a matrix or is of another dtype.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, transposed: bool = False):
        super().__init__()
        if weight.ndim != 2 or weight.dtype not in DENSE_DTYPES.values():
            raise ShapeError(
                f"a dense matrix has two dimensions in f32, bf16 or f16; got {tuple(weight.shape)} {weight.dtype}."
            )
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def kind(self) -> str:
        """f32, bf16 or f16."""
        return next(name for name, dtype in DENSE_DTYPES.items() if dtype == self.weight.dtype)

    def storage(self) -> kernels.Storage:
        """The stored tensor as the kernels take it; no copy."""
        return kernels.Storage.dense(self.weight.detach(), transposed=self.transposed)

    def oriented(self) -> Tensor:
        """The stored tensor seen as (out_features, in_features); no copy."""
        return self.weight.T if self.transposed else self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor (out_features, in_features) in `dtype`; the stored tensor itself where that is already so."""
        return self.oriented().to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W as float32. ids: (...) int64 -> (..., in_features)."""
        return F.embedding(ids, self.oriented()).to(torch.float32)

    def row_range(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as float32, (stop - start, in_features)."""
        return self.oriented()[start:stop].to(torch.float32)

    def float32_copy(self) -> DenseMatrix:
        """The same matrix in float32, laid out the same way, its memory its own."""
        return DenseMatrix(self.weight.detach().to(torch.float32, copy=True).contiguous(), self.transposed)

    @torch.no_grad()
    def not_finite(self) -> int:
        """How many weights are NaN or Inf."""
        few = max(1, CHECKED_AT_ONCE // max(1, self.weight.shape[1]))
        return sum(int((~torch.isfinite(rows)).sum()) for rows in self.weight.split(few))
