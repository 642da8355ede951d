"""Decompositions against float64 oracles: what is dropped is what is measured, and nothing of that rank is better."""

from __future__ import annotations

import pytest
import torch
from oracle import best_error, generator, layer, output_error

from luthier.errors import NumericError, ShapeError
from luthier.lowrank.decompose import projected, scaled_svd, stacked, truncated_svd, whitened_svd
from luthier.lowrank.factors import split

SHAPES = [(24, 40), (40, 24), (32, 32)]
RANKS = (1, 7, 16, 23)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_truncated_svd_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape, generator=generator(1))
    result = truncated_svd(W)
    identity = torch.eye(shape[1], dtype=torch.float64)
    assert result.dropped(rank) == pytest.approx(best_error(W, identity, rank), rel=1e-10)
    assert output_error(W, result.factors(rank).product(), identity) == pytest.approx(result.dropped(rank), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_what_whitening_drops_is_the_measured_output_error_and_the_least(shape: tuple[int, int], rank: int) -> None:
    W, X, H = layer(*shape, tokens=200)
    for result in (whitened_svd(W, H), projected(W, H)):
        measured = output_error(W, result.factors(rank).product(), X)
        assert measured == pytest.approx(result.dropped(rank), rel=2e-4)
        assert result.dropped(rank) == pytest.approx(best_error(W, X, rank), rel=1e-6)
    others = (truncated_svd(W), scaled_svd(W, X.abs().mean(0).sqrt()))
    assert all(measured < output_error(W, other.factors(rank).product(), X) for other in others)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_give_the_same_matrix_and_the_projected_is_orthonormal(shape: tuple[int, int]) -> None:
    W, _, H = layer(*shape, tokens=200)
    one, other = whitened_svd(W, H), projected(W, H)
    assert torch.allclose(one.factors(9).product(), other.factors(9).product(), atol=2e-4)
    assert torch.allclose(other.B.T @ other.B, torch.eye(other.max_rank), atol=1e-5)
    assert torch.allclose(one.factors(one.max_rank).product(), W, atol=1e-4)
    assert torch.allclose(other.factors(other.max_rank).product(), W, atol=1e-4)
    assert (other.energies.diff() <= 0).all()
    assert other.dropped(other.max_rank) == 0


def test_damping_counts_in_what_is_dropped() -> None:
    W, X, H = layer(24, 40, tokens=20)  # fewer tokens than inputs
    with pytest.raises(NumericError, match=r"positive definite moments, so as many independent tokens as inputs \(40\)"):
        whitened_svd(W, H)
    result = whitened_svd(W, H, damping=0.01)
    extra = (0.01 * H.diagonal().mean()).sqrt() * torch.eye(40, dtype=torch.float64)
    measured = output_error(W, result.factors(5).product(), torch.cat([X, extra]))
    assert result.dropped(5) == pytest.approx(measured, rel=1e-4)


def test_the_projected_form_needs_no_inverse_of_the_moments() -> None:
    W, X, H = layer(24, 40, tokens=10)
    result = projected(W, H)
    assert output_error(W, result.factors(10).product(), X) < 1e-8 * output_error(W, torch.zeros_like(W), X)
    assert output_error(W, result.factors(4).product(), X) == pytest.approx(best_error(W, X, 4), rel=1e-5)


def test_layers_that_share_an_input_share_a_factor() -> None:
    W, X, H = layer(48, 32, tokens=100)
    parts = list(W.split([32, 8, 8]))
    assert torch.equal(stacked(parts), W)
    pieces = split(projected(stacked(parts), H).factors(12), [32, 8, 8])
    assert all(piece.A is pieces[0].A for piece in pieces)
    together = sum(output_error(part, piece.product(), X) for part, piece in zip(parts, pieces, strict=True))
    assert together == pytest.approx(best_error(W, X, 12), rel=1e-4)


def test_scales_turn_a_plain_svd_to_the_inputs_that_matter() -> None:
    W, _, _ = layer(20, 30, tokens=100)
    scales = torch.logspace(0, -1, 30)
    result = scaled_svd(W, scales)
    error = ((W - result.factors(6).product()).double() * scales).square().sum()
    assert float(error) == pytest.approx(result.dropped(6), rel=1e-4)


def test_a_weight_of_low_rank_costs_nothing_at_that_rank() -> None:
    g = generator(5)
    W = torch.randn(30, 4, generator=g) @ torch.randn(4, 20, generator=g)
    _, _, H = layer(30, 20, tokens=50)
    for result in (truncated_svd(W), whitened_svd(W, H), projected(W, H)):
        assert torch.allclose(result.factors(4).product(), W, atol=1e-4)
        assert result.dropped(4) < 1e-10 * float(result.energies.sum())


def test_what_is_refused() -> None:
    W, _, H = layer(24, 40, tokens=100)
    result = truncated_svd(W)
    with pytest.raises(ShapeError, match=r"rank must be between 1 and min\(in, out\) = 24; got 25"):
        result.factors(25)
    with pytest.raises(ShapeError, match=r"rank must be between 1"):
        result.dropped(0)
    with pytest.raises(ShapeError, match=r"moments are \(in_features, in_features\) = \(40, 40\); got \(24, 24\)"):
        projected(W, H[:24, :24])
    with pytest.raises(ShapeError, match=r"scales are one an input, \(40,\)"):
        scaled_svd(W, torch.ones(24))
    with pytest.raises(NumericError, match="scales must be positive"):
        scaled_svd(W, torch.zeros(40))
    with pytest.raises(NumericError, match="moments must be finite"):
        projected(W, H * torch.nan)
    with pytest.raises(NumericError, match="a weight to decompose must be finite"):
        truncated_svd(W / 0)
    with pytest.raises(ShapeError, match="the same in_features"):
        stacked([W, W.T])
