"""Factors in few bits: one is rounded on the inputs, the other fitted to what became of it and rounded in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.lowrank.factors import Factors, Pivoted, rebalanced, refit_left
from luthier.lowrank.rounding_nf4 import round_nf4
from luthier.matrices import Matrix

# (weight, moments) -> the weight as it will be stored.
Rounder = Callable[[Tensor, Tensor], Matrix]


@dataclass(frozen=True, eq=False)
class RoundedFactors:
    """B A with both factors stored. A: (r, in_features); B: (out_features, r)."""

    A: Matrix
    B: Matrix

    @property
    def size_bytes(self) -> int:
        return self.A.size_bytes + self.B.size_bytes

    def product(self) -> Tensor:
        """B A, (out_features, in_features), float32."""
        return self.B.dequantize() @ self.A.dequantize()


@dataclass(frozen=True, eq=False)
class RoundedPivoted:
    """`Pivoted` with both parts stored. basis: (r, in); coefficients: (out - r, r), or None where every row is a pivot."""

    pivots: Tensor
    basis: Matrix
    coefficients: Matrix | None

    @property
    def size_bytes(self) -> int:
        """Of the two matrices; the r row numbers are not counted."""
        return self.basis.size_bytes + (0 if self.coefficients is None else self.coefficients.size_bytes)

    def pivoted(self) -> Pivoted:
        """What is stored, in float32."""
        basis = self.basis.dequantize()
        rest = torch.empty(0, len(basis)) if self.coefficients is None else self.coefficients.dequantize()
        return Pivoted(self.pivots, basis, rest)


def round_factors(weight: Tensor, moments: Tensor, factors: Factors, rounder: Rounder = round_nf4) -> RoundedFactors:
    """A in the metric H of the inputs, then B = W H A^T (A H A^T)^-1 for the A that is stored, in the metric A H A^T.

    Factors are balanced before, so that within a block of B no component is rounded in steps made for another; where columns
    of B are orthogonal, as `projected` gives them, rounding A in H alone is exact. weight: (out, in), or the error that
    factors repair; moments H: (in, in). Raises NumericError where the rounded rows of A depend on each other.
    """
    A = rounder(rebalanced(factors).A, moments)
    return RoundedFactors(A, _fitted(weight, A, moments, rounder))


def round_pivoted(weight: Tensor, moments: Tensor, parts: Pivoted, rounder: Rounder = round_nf4) -> RoundedPivoted:
    """The basis in the metric H, then the coefficients fitted to the stored basis and rounded in the metric basis H basis^T.

    weight: (out, in), what the other rows are fitted to; moments H: (in, in). Raises what `round_factors` raises.
    """
    basis = rounder(parts.basis, moments)
    if not len(parts.others):
        return RoundedPivoted(parts.pivots, basis, None)
    return RoundedPivoted(parts.pivots, basis, _fitted(weight[parts.others], basis, moments, rounder))


def _fitted(weight: Tensor, A: Matrix, moments: Tensor, rounder: Rounder) -> Matrix:
    stored = A.dequantize()
    wide = stored.to(torch.float64)
    return rounder(refit_left(weight, stored, moments), wide @ moments.to(torch.float64) @ wide.T)
