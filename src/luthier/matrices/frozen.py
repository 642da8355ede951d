"""What every frozen matrix does, however it is stored: rows in float32, products, norms. Storage itself is each kind's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.matrices.products import product

if TYPE_CHECKING:
    from luthier.matrices.dense import DenseMatrix

BLOCK_ELEMENTS = 1 << 20


class FrozenMatrix(nn.Module, ABC):
    """W: (out_features, in_features). Each kind has properties, `rows`, `dequantize`, `matmul` and `not_finite` of its own."""

    transposed: bool = False

    if TYPE_CHECKING:  # attributes of some kinds, computed by others

        @property
        def shape(self) -> tuple[int, int]: ...

        @property
        def kind(self) -> str: ...

        @property
        def size_bytes(self) -> int: ...

        @property
        def weight(self) -> Tensor: ...

    def __init__(self) -> None:
        super().__init__()
        self._kept_norms: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W as float32. ids: (...) int64 -> (..., in_features)."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor (out_features, in_features) in `dtype`: a full copy, for merging and tests."""

    @abstractmethod
    def not_finite(self) -> int:
        """How many stored numbers are NaN or Inf."""

    def row_range(self, start: int, stop: int) -> Tensor:
        """Rows start to stop as float32, (stop - start, in_features)."""
        return self.rows(torch.arange(start, stop, device=self.weight.device))

    def row_blocks(self, elements: int = BLOCK_ELEMENTS, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in float32), a few at a time, so that W is never whole in float32.

        elements: about so many numbers at a time; multiple: each block but the last has a multiple of so many rows.
        """
        rows, columns = self.shape
        step = max(1, elements // columns // multiple) * multiple
        for start in range(0, rows, step):
            yield start, self.row_range(start, min(start + step, rows))

    def float32_copy(self) -> DenseMatrix:
        """The same numbers as a dense matrix in float32 that can train, its memory its own."""
        from luthier.matrices.dense import DenseMatrix  # one of these itself

        return DenseMatrix(self.dequantize())

    def row_norms_squared(self) -> Tensor:
        """|w_o|^2 of each row, (out_features,), float64; computed once for as long as the weight stays as it is."""
        return self._norms_squared(1)

    def column_norms_squared(self) -> Tensor:
        """|w_i|^2 of each column, (in_features,), float64; computed once for as long as the weight stays as it is."""
        return self._norms_squared(0)

    @torch.no_grad()
    def _norms_squared(self, dim: int) -> Tensor:
        state = (self.weight.data_ptr(), self.weight._version)
        kept = self._kept_norms.get(dim)
        if kept is None or kept[0] != state:
            pieces = [rows.to(torch.float64).square().sum(dim) for _, rows in self.row_blocks()]
            kept = (state, torch.cat(pieces) if dim == 1 else torch.stack(pieces).sum(0))
            self._kept_norms[dim] = kept
        return kept[1]

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.kind}"


class StoredMatrix(FrozenMatrix):
    """A matrix that holds its numbers itself, as the kernels know them (`storage`)."""

    @abstractmethod
    def storage(self) -> kernels.Storage:
        """The stored tensors as the kernels take them; no copy."""

    @property
    def size_bytes(self) -> int:
        return self.storage().size_bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor (out_features, in_features) in `dtype`: a full copy, for merging and tests."""
        return kernels.dequantize(self.storage()) if dtype == torch.float32 else self._widened(dtype)

    def _widened(self, dtype: torch.dtype) -> Tensor:
        result = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        for start, rows in self.row_blocks():
            result[start : start + len(rows)] = rows
        return result

    def matmul(self, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
        """x W^T + bias + term in x's dtype. x: (..., in_features) -> (..., out_features)."""
        return product(self, x, bias, term)
