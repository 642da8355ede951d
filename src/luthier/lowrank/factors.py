"""A matrix as a product of two: W ~ B A, how its factors are balanced, refitted, split, and stored with fewer numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError

# No coefficient of a pivoted factorisation is larger: fewer swaps than for 1, and still of one size for a quantiser.
PIVOT_BOUND = 2.0
# Rows are taken to depend on each other where what is left of one beside the others is this small a share of it, squared.
DEPENDENT = 1e-12


class Factors(NamedTuple):
    """B A. A: (r, in_features); B: (out_features, r); float32."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def numbers(self) -> int:
        """r (m + n)."""
        return self.A.numel() + self.B.numel()

    def product(self) -> Tensor:
        """B A, (out_features, in_features), float32."""
        return self.B @ self.A


def rebalanced(factors: Factors) -> Factors:
    """(B D^-1) (D A), the same product, with |row k of A| = |column k of B| for every k.

    Then no block of either factor holds numbers of very different size because of how the product was split, and errors of
    the same relative size in the two factors weigh the same. A component that is zero stays zero.
    """
    a, b = factors.A.to(torch.float64).norm(dim=1), factors.B.to(torch.float64).norm(dim=0)
    d = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0).nan_to_num(nan=1.0, posinf=1.0)
    d = d.to(torch.float32)
    return Factors(factors.A * d[:, None], factors.B / d)


def split(factors: Factors, sizes: Sequence[int]) -> list[Factors]:
    """The factors of each of several layers that were stacked on rows: one A for all, the rows of B cut by `sizes`.

    Raises ShapeError if the sizes are not those of B's rows.
    """
    if sum(sizes) != factors.B.shape[0]:
        raise ShapeError(f"sizes must add up to the {factors.B.shape[0]} rows of B; got {list(sizes)}.")
    return [Factors(factors.A, B) for B in factors.B.split(list(sizes))]


def refit_left(weight: Tensor, A: Tensor, moments: Tensor) -> Tensor:
    """The B that minimises tr((W - B A) H (W - B A)^T) for a given A: W H A^T (A H A^T)^+.

    For A that was rounded to few bits. Where rows of A cannot be told apart by the inputs, many B are as good: then, with the
    rows of A scaled to A H A^T of diagonal 1, it is that of the least norm, and what those rows have in common is shared out
    evenly; a row that no input reaches gets 0.
    weight: (out, in); A: (r, in); moments H: (in, in), positive semidefinite; -> (out, r) float32, computed in float64.
    """
    W, A64, H = weight.to(torch.float64), A.to(torch.float64), moments.to(torch.float64)
    seen = A64 @ H
    square = seen @ A64.T
    sizes = square.diagonal().clamp(min=0).sqrt()
    scale = torch.where(sizes > 0, 1.0 / sizes, 0.0)
    B = _solved(square * scale * scale[:, None], (seen @ W.T) * scale[:, None]) * scale[:, None]
    return B.T.to(torch.float32).contiguous()


def _solved(square: Tensor, right: Tensor) -> Tensor:
    """square^+ right: by Cholesky where the rank is full, else by eigenvectors. square: diagonal of ones, or 0 for a dead row.

    Eigenvalues below DEPENDENT of the largest count as zero, as does a pivot of Cholesky below its root as a sign of them.
    """
    root, failed = torch.linalg.cholesky_ex(square)
    if not int(failed) and float(root.diagonal().min()) > DEPENDENT**0.5:
        return torch.cholesky_solve(right, root)
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    inverse = torch.where(values > DEPENDENT * values[-1], 1.0 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


@dataclass(frozen=True, eq=False)
class Pivoted:
    """A matrix of rank r as r of its own rows, and every other row as a combination of those.

    W[pivots] = basis; W[others] = coefficients basis. pivots: (r,) int64, ascending; basis: (r, in) float32;
    coefficients: (out - r, r) float32, at most PIVOT_BOUND in size. r (m + n) - r^2 numbers, where two factors have r (m + n).
    Source: PIFA, arXiv:2501.19090.
    """

    pivots: Tensor
    basis: Tensor
    coefficients: Tensor

    @property
    def places(self) -> Tensor:
        """(out,) int32: of each row its place among the pivots, or behind them among the others."""
        rank = len(self.pivots)
        places = torch.empty(rank + len(self.coefficients), dtype=torch.int32)
        places[self.pivots] = torch.arange(rank, dtype=torch.int32)
        places[self.others] = torch.arange(rank, len(places), dtype=torch.int32)
        return places

    @property
    def others(self) -> Tensor:
        """(out - r,) int64, ascending: the rows that are combinations."""
        rest = torch.ones(len(self.basis) + len(self.coefficients), dtype=torch.bool)
        rest[self.pivots] = False
        return rest.nonzero()[:, 0]

    @property
    def numbers(self) -> int:
        """r (m + n) - r^2; the r row numbers are not counted."""
        return self.basis.numel() + self.coefficients.numel()

    def factors(self) -> Factors:
        """The same matrix as two factors: A is the basis, B has the identity in the pivots' rows."""
        B = torch.empty(len(self.basis) + len(self.coefficients), len(self.basis))
        B[self.pivots] = torch.eye(len(self.basis))
        B[self.others] = self.coefficients
        return Factors(self.basis, B)


def pivoted(factors: Factors) -> Pivoted:
    """B A as some of its own rows and coefficients: nothing is lost but float32 rounding.

    The pivots come from an LU factorisation of B with partial pivoting. Then, while a coefficient exceeds PIVOT_BOUND, its
    row takes the place of the pivot it belongs to; each swap multiplies the volume |det B_pivots| by that coefficient, so
    swaps end. Which rows span best does not depend on how the product is split into factors.
    Raises ShapeError if B has fewer rows than columns, NumericError if its columns depend on each other.
    Source of the swaps: Goreinov et al., How to find a good submatrix, 2010 (maxvol).
    """
    out_features, rank = factors.B.shape
    if rank > out_features:
        raise ShapeError(f"pivots are rows, so the rank is at most their number; got rank {rank} of {out_features} rows.")
    order, coefficients = _lu_rows(factors.B.to(torch.float64))
    order = _swapped(order, coefficients)
    pivots, where = order[:rank].sort()
    _, place = order[rank:].sort()
    basis = factors.B[pivots].to(torch.float64) @ factors.A.to(torch.float64)
    kept = coefficients[place][:, where]
    return Pivoted(pivots, basis.to(torch.float32), kept.to(torch.float32).contiguous())


def _lu_rows(B: Tensor) -> tuple[Tensor, Tensor]:
    """(rows in pivot order (out,), coefficients (out - r, r)) with B[order[r:]] = coefficients B[order[:r]]."""
    rank = B.shape[1]
    packed, pivots, _ = torch.linalg.lu_factor_ex(B)
    diagonal = packed.diagonal().abs()
    if not bool((diagonal > 1e-12 * diagonal.amax().clamp(min=1e-300)).all()):
        raise NumericError(f"pivots need {rank} independent columns of B; some depend on the others. Lower the rank.")
    P, L, _ = torch.lu_unpack(packed, pivots, unpack_data=True)
    order = P.T.argmax(1)
    coefficients = torch.linalg.solve_triangular(L[:rank], L[rank:], upper=False, left=False, unitriangular=True)
    return order, coefficients


def _swapped(order: Tensor, coefficients: Tensor) -> Tensor:
    """Swap pivots with other rows until no coefficient exceeds PIVOT_BOUND; `coefficients` is updated in place."""
    rank = coefficients.shape[1]
    order = order.clone()
    while coefficients.numel():
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        largest = float(coefficients[row, column])
        if abs(largest) <= PIVOT_BOUND:
            break
        # x_row = c . basis, solved for the pivot that leaves: pivot = (x_row - rest) / largest.
        leaving, coming = coefficients[:, column].clone(), coefficients[row].clone()
        coming[column] -= 1
        leaving[row] += 1
        coefficients -= leaving[:, None] * (coming / largest)
        order[[column, rank + row]] = order[[rank + row, column]]
    return order
