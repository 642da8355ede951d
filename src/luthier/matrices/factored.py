"""A matrix that is not stored itself: the product of two narrow ones, each in a storage of its own.

    W = W_0 + L R        R: (rank, in_features), L: (out_features, rank), W_0: (out_features, in_features) or none

A compressed layer has no W_0; a repaired one has a W_0 in 4 bits. Layers that read the same input may share R, which is
then stored and multiplied once. In the pivoted form rank rows of W are R itself, and L gives the others out of these.
Source: SVD-LLM, arXiv:2403.07378; QERA, arXiv:2410.06040; pivoted rows: PIFA, arXiv:2501.19090.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier import kernels
from luthier.errors import ShapeError
from luthier.kernels.storage import KINDS
from luthier.matrices.frozen import FrozenMatrix, StoredMatrix

_KIND = re.compile(r"(?:([a-z0-9_]{2,5})\+)?([rp])([1-9][0-9]{0,6})/([a-z0-9_]{2,5}),([a-z0-9_]{2,5})")


@dataclass(frozen=True)
class FactoredKind:
    """How a factored matrix is stored, as text: `r128/nf4,bf16` is rank 128 with L in NF4 and R in bfloat16.

    `nf4+r32/bf16,bf16` has a W_0 in NF4; `p128/bf16,bf16` is the pivoted form.
    """

    rank: int
    left: str
    right: str
    base: str | None = None
    pivoted: bool = False

    def __str__(self) -> str:
        base = f"{self.base}+" if self.base else ""
        return f"{base}{'p' if self.pivoted else 'r'}{self.rank}/{self.left},{self.right}"

    @classmethod
    def parse(cls, text: str) -> FactoredKind | None:
        """The inverse of `str`, None for a text that names no factored storage."""
        match = _KIND.fullmatch(text)
        if match is None:
            return None
        base, form, rank, left, right = match.groups()
        known = all(kind in KINDS for kind in (left, right, *([base] if base else [])))
        if not known or (base and form == "p"):
            return None
        return cls(int(rank), left, right, base, form == "p")


def is_factored(kind: str | None) -> bool:
    """Whether `kind` names a factored storage."""
    return kind is not None and FactoredKind.parse(kind) is not None


class FactoredMatrix(FrozenMatrix):
    """W = base + left right, (out_features, in_features); every part frozen, in any storage.

    left: (out_features, rank); right: (rank, in_features); base: (out_features, in_features) or None.
    places: int32 (out_features,) or None. With it row o of W is row places[o] of `right` where that is below the rank, else
    row places[o] - rank of left right; left is then (rows that are no pivots, rank), and there is no base.
    Raises ShapeError if the parts do not fit each other.
    """

    places: Tensor | None

    def __init__(
        self, left: StoredMatrix, right: StoredMatrix, *, base: StoredMatrix | None = None, places: Tensor | None = None
    ):
        super().__init__()
        problem = _problem(left, right, base, places)
        if problem:
            raise ShapeError(problem)
        self.left, self.right, self.base = left, right, base
        self.register_buffer("places", places)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        rows = self.left.shape[0] if self.places is None else len(self.places)
        return rows, self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def weight(self) -> Tensor:
        """The stored tensor of the left factor, for code that asks where a matrix lies."""
        return self.left.weight

    @property
    def kind(self) -> str:
        """As `FactoredKind` writes it."""
        base = None if self.base is None else self.base.kind
        return str(FactoredKind(self.rank, self.left.kind, self.right.kind, base, self.places is not None))

    @property
    def size_bytes(self) -> int:
        """Of all parts, a shared right factor included."""
        return sum(part.size_bytes for part in self._parts()) + (0 if self.places is None else self.places.nbytes)

    def matmul(self, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
        """x W^T + bias + term in x's dtype, W never formed. x: (..., in_features) -> (..., out_features)."""
        left, right = self.left, self.right
        # One kernel multiplies both: float32 on the CPU, as in `product`, and factors that are stored and frozen.
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and self.base is None
        if not fits or not _is_frozen(left) or not _is_frozen(right):
            return self.matmul_after(right.matmul(x), x, bias, term)
        return self._with_term(kernels.factored_linear(x, left.storage(), right.storage(), self.places, bias), x, term)

    def matmul_after(self, inner: Tensor, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
        """`matmul` where inner = x R^T, (..., rank), is known already, from a layer that shares the right factor."""
        if self.base is not None:
            return self.base.matmul(x, bias, term) + self.left.matmul(inner)
        if self.places is None:
            y = self.left.matmul(inner, bias)
        else:
            # Torch gathers columns by int64 a third faster than by int32.
            y = torch.cat([inner, self.left.matmul(inner)], -1).index_select(-1, self.places.to(torch.int64))
            y = y if bias is None else y + bias.to(y.dtype)
        return self._with_term(y, x, term)

    @staticmethod
    def _with_term(y: Tensor, x: Tensor, term: kernels.Term | None) -> Tensor:
        if term is None:
            return y
        low_rank = F.linear(F.linear(x.to(term.A.dtype), term.A), term.B)
        return y + (term.scaling * low_rank).to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor (out_features, in_features) in `dtype`: a full copy, for merging and tests."""
        return self.row_range(0, self.shape[0]).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W as float32. ids: (...) int64 -> (..., in_features). `right` is read whole."""
        flat = ids.reshape(-1)
        right = self.right.dequantize()
        if self.places is None:
            result = self.left.rows(flat) @ right
        else:
            places = self.places[flat].to(torch.int64)
            result = right[places.clamp_max(self.rank - 1)]
            others = (places >= self.rank).nonzero().squeeze(1)
            result[others] = self.left.rows(places[others] - self.rank) @ right
        result = result if self.base is None else result + self.base.rows(flat)
        return result.reshape(*ids.shape, self.shape[1])

    def not_finite(self) -> int:
        """How many stored numbers are NaN or Inf."""
        return sum(part.not_finite() for part in self._parts())

    def _parts(self) -> list[StoredMatrix]:
        return [self.left, self.right, *([] if self.base is None else [self.base])]


def _is_frozen(part: StoredMatrix) -> bool:
    # While a compressed model heals, parts are of a kind that is none of these.
    return isinstance(part, StoredMatrix) and not part.weight.requires_grad


def _problem(left: StoredMatrix, right: StoredMatrix, base: StoredMatrix | None, places: Tensor | None) -> str | None:
    """What does not fit, or None."""
    if left.transposed or right.transposed:
        return "factors lie (out, rank) and (rank, in); got a transposed one."
    if left.shape[1] != right.shape[0]:
        return f"factors are (out, rank) and (rank, in); got {left.shape} and {right.shape}."
    if base is not None and (places is not None or base.shape != (left.shape[0], right.shape[1])):
        return f"what factors are added to is {(left.shape[0], right.shape[1])}, without pivots; got {base.shape}."
    if places is None:
        return None
    if places.dtype != torch.int32 or places.ndim != 1 or not places.numel():
        return f"places are int32 (out_features,); got {tuple(places.shape)} {places.dtype}."
    first, last, limit = int(places.min()), int(places.max()), right.shape[0] + left.shape[0]
    if first < 0 or last >= limit:
        return f"places lie in [0, {limit}), the rows of both factors; got {first} to {last}."
    return None
