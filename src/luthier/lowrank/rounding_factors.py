"""Factors in few bits: one is rounded on the inputs, the other fitted to what became of it and rounded in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.lowrank.factors import Factors, Pivoted, rebalanced, refit_left
from luthier.lowrank.rounding_nf4 import round_nf4
from luthier.matrices import FactoredMatrix, StoredMatrix

# (weight, moments) -> the weight as it will be stored.
Rounder = Callable[[Tensor, Tensor], StoredMatrix]


def round_factors(
    weight: Tensor, moments: Tensor, factors: Factors, rounder: Rounder = round_nf4, *, base: StoredMatrix | None = None
) -> FactoredMatrix:
    """A in the metric H of the inputs, then B = W H A^T (A H A^T)^+ for the A that is stored, in the metric A H A^T.

    Factors are balanced before, so that within a block of B no component is rounded in steps made for another; where columns
    of B are orthogonal, as `projected` gives them, rounding A in H alone is exact. weight: (out, in); moments H: (in, in).
    base: what the factors are added to; weight is then the error of it that they repair.
    """
    A = rounder(rebalanced(factors).A, moments)
    return FactoredMatrix(_fitted(weight, A, moments, rounder), A, base=base)


def round_pivoted(weight: Tensor, moments: Tensor, parts: Pivoted, rounder: Rounder = round_nf4) -> FactoredMatrix:
    """The basis in the metric H, then the coefficients fitted to the stored basis and rounded in the metric basis H basis^T.

    weight: (out, in), what the other rows are fitted to; moments H: (in, in). Raises ShapeError where every row is a pivot.
    """
    if not len(parts.others):
        raise ShapeError(f"all {len(parts.pivots)} rows are pivots, so the matrix is its own basis. Store it whole.")
    basis = rounder(parts.basis, moments)
    return FactoredMatrix(_fitted(weight[parts.others], basis, moments, rounder), basis, places=parts.places)


def _fitted(weight: Tensor, A: StoredMatrix, moments: Tensor, rounder: Rounder) -> StoredMatrix:
    stored = A.dequantize()
    wide = stored.to(torch.float64)
    return rounder(refit_left(weight, stored, moments), wide @ moments.to(torch.float64) @ wide.T)
