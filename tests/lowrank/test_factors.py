"""Factors: balanced, refitted, pivoted; each against the product or the optimum it must keep."""

from __future__ import annotations

import pytest
import torch
from oracle import best_error, generator, layer, output_error

from luthier.errors import NumericError, ShapeError
from luthier.lowrank.decompose import projected
from luthier.lowrank.factors import PIVOT_BOUND, Factors, _lu_rows, pivoted, rebalanced, refit_left, split
from luthier.matrices import NF4Matrix


def make(out: int, inputs: int, rank: int, seed: int = 0) -> Factors:
    g = generator(seed)
    sizes = torch.logspace(0, -3, rank)
    return Factors(sizes[:, None] * torch.randn(rank, inputs, generator=g), torch.randn(out, rank, generator=g))


def test_balance_keeps_the_product_and_evens_the_norms() -> None:
    factors = make(20, 30, 8)
    result = rebalanced(factors)
    assert torch.allclose(result.product(), factors.product(), atol=1e-6)
    assert torch.allclose(result.A.norm(dim=1), result.B.norm(dim=0), rtol=1e-5)
    empty = rebalanced(Factors(torch.zeros(2, 3), torch.ones(4, 2)))
    assert torch.equal(empty.product(), torch.zeros(4, 3))


def test_balanced_factors_quantise_better() -> None:
    """A column of B that is a thousandth of its neighbours is lost among them in blocks that run along rows."""
    factors = make(64, 64, 8)
    spread = Factors(factors.A / torch.logspace(0, -3, 8)[:, None], factors.B * torch.logspace(0, -3, 8))
    lopsided = Factors(spread.A, spread.B * torch.logspace(0, -3, 8))
    reference = lopsided.product()

    def error(f: Factors) -> float:
        rounded = Factors(NF4Matrix.quantize(f.A).dequantize(), NF4Matrix.quantize(f.B).dequantize())
        return float((rounded.product() - reference).norm() / reference.norm())

    assert error(rebalanced(lopsided)) < error(lopsided)


def test_refits_are_least_squares() -> None:
    W, X, H = layer(24, 40, tokens=100)
    rounded = projected(W, H).factors(8)
    A = NF4Matrix.quantize(rounded.A).dequantize()
    B = refit_left(W, A, H)
    oracle = torch.linalg.lstsq(X @ A.double().T, X @ W.double().T).solution.T
    assert torch.allclose(B.double(), oracle, atol=1e-3)
    assert output_error(W, B @ A, X) < output_error(W, rounded.B @ A, X)


@pytest.mark.parametrize("twins", [1, 3])
def test_rows_that_no_input_tells_apart_share_what_they_give(twins: int) -> None:
    """Against the pseudo-inverse of the outputs of A: the optimum still, and of the many that reach it the least."""
    W, X, H = layer(24, 40, tokens=100)
    A = projected(W, H).factors(8).A
    A = torch.cat([A, A[:twins], torch.zeros(1, 40)])
    scale = 1 / (X @ A.double().T).norm(dim=0)[:-1]
    B = refit_left(W, A, H)
    seen = X @ A[:-1].double().T * scale
    oracle = (torch.linalg.pinv(seen, rcond=1e-7) @ (X @ W.double().T)).T * scale
    assert torch.allclose(B[:, :-1].double(), oracle, atol=1e-4 * float(oracle.abs().max()))
    assert torch.equal(B[:, -1], torch.zeros(24))
    assert torch.allclose(B[:, :twins], B[:, 8 : 8 + twins], rtol=1e-4)
    assert output_error(W, B @ A, X) == pytest.approx(best_error(W, X, 8), rel=1e-4)


def test_without_inputs_a_refit_is_zero() -> None:
    assert torch.equal(refit_left(torch.ones(3, 5), torch.ones(2, 5), torch.zeros(5, 5)), torch.zeros(3, 2))


@pytest.mark.parametrize(("out", "inputs", "rank"), [(40, 24, 12), (24, 40, 23), (30, 30, 30), (16, 50, 1)])
def test_pivots_lose_nothing_and_save_a_square(out: int, inputs: int, rank: int) -> None:
    factors = make(out, inputs, rank, seed=rank)
    result = pivoted(factors)
    reference = factors.B.double() @ factors.A.double()
    assert torch.allclose(result.factors().product().double(), reference, atol=2e-5)
    assert torch.allclose(result.basis.double(), reference[result.pivots], atol=1e-6)
    assert torch.allclose((result.coefficients @ result.basis).double(), reference[result.others], atol=2e-5)
    assert result.numbers == rank * (out + inputs) - rank**2
    assert sorted([*result.pivots.tolist(), *result.others.tolist()]) == list(range(out))
    assert not result.coefficients.numel() or float(result.coefficients.abs().max()) <= PIVOT_BOUND + 1e-6


def test_pivots_are_swapped_until_no_coefficient_is_large() -> None:
    """Kahan's matrix: partial pivoting keeps its order, and coefficients grow like 2^rank."""
    rank = 12
    B = torch.cat([torch.eye(rank) - torch.ones(rank, rank).tril(-1), torch.ones(3, rank)])
    assert float(_lu_rows(B.double())[1].abs().max()) > 100
    result = pivoted(Factors(torch.eye(rank), B))
    assert float(result.coefficients.abs().max()) <= PIVOT_BOUND + 1e-6
    assert torch.allclose(result.factors().product(), B, atol=1e-5)


def test_the_pivots_do_not_depend_on_how_the_product_is_split() -> None:
    factors = make(40, 24, 10)
    mixing = torch.randn(10, 10, generator=generator(9))
    other = Factors(torch.linalg.solve(mixing, factors.A), factors.B @ mixing)
    assert torch.allclose(pivoted(other).factors().product(), pivoted(factors).factors().product(), atol=1e-4)


def test_what_is_refused() -> None:
    factors = make(20, 30, 8)
    with pytest.raises(ShapeError, match=r"sizes must add up to the 20 rows of B; got \[4, 4\]"):
        split(factors, [4, 4])
    with pytest.raises(ShapeError, match="rank 8 of 4 rows"):
        pivoted(Factors(factors.A, factors.B[:4]))
    with pytest.raises(NumericError, match="pivots need 8 independent columns"):
        pivoted(Factors(factors.A, factors.B[:, :1].expand(-1, 8)))
