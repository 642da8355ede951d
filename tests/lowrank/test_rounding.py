"""Rounding in a metric: the sums it stands on, what it may never do worse, and that files stay what their readers expect."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from oracle import generator, layer, metric_error, output_error
from torch import Tensor

from luthier.errors import ConfigError, NumericError, ShapeError
from luthier.kernels.quantize import quantize_gguf
from luthier.lowrank import rounding
from luthier.lowrank.rounding import Grid, damped, fit_steps, round_in_metric, search_steps
from luthier.lowrank.rounding_gguf import round_gguf
from luthier.lowrank.rounding_nf4 import round_nf4
from luthier.matrices import GGUFMatrix, NF4Matrix
from luthier.matrices.nf4 import STATE_KEY
from luthier.training.live_bytes import LiveBytes

LEVELS = torch.arange(-8.0, 8.0)


def grid_of(W: Tensor, groups: int = 1) -> Grid:
    largest = W.view(len(W), groups, -1).abs().amax(2)
    return Grid(LEVELS, largest / 8)


def slow_feedback(W: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """GPTQ as its paper writes it, in float64: errors go to later columns through the inverse of what is left of H."""
    order = H.diagonal().argsort(descending=True)
    left, H = W.double()[:, order].clone(), H.double()[order][:, order].clone()
    step = grid.step.double().repeat_interleave(W.shape[1] // grid.step.shape[1], 1)[:, order]
    levels, codes = grid.levels.double(), torch.empty(W.shape, dtype=torch.int64)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        codes[:, j] = ((left[:, j, None] / step[:, j, None]) - levels).abs().argmin(1)
        error = (left[:, j] - levels[codes[:, j]] * step[:, j]) / inverse[0, 0]
        left[:, j:] -= error[:, None] * inverse[0]
    return codes[:, order.argsort()]


@pytest.mark.parametrize("columns", [24, 100])
def test_feedback_is_that_of_the_paper(columns: int) -> None:
    W, _, H = layer(12, columns, tokens=300)
    H = damped(H)
    codes, left = round_in_metric(W, H, grid_of(W), passes=1)
    assert (codes.long() == slow_feedback(W, H, grid_of(W))).float().mean() > 0.99  # near ties may fall either way
    assert torch.allclose(left, W - grid_of(W).values(codes), atol=1e-6)


def test_the_error_is_the_sum_that_feedback_lowers_term_by_term() -> None:
    W, X, H = layer(6, 20, tokens=60)
    E = W.double() - grid_of(W).values(grid_of(W).nearest(W)).double()
    U = rounding._unit_lower(H, 0.0, torch.arange(20)).T.double()
    D = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1).diagonal().square()
    assert torch.allclose(U * D @ U.T, H, atol=1e-5 * float(H.max()))
    assert float((D * (E @ U).square()).sum()) == pytest.approx(output_error(W, W.double() - E, X), rel=1e-4)
    assert metric_error(W, W.double() - E, H) == pytest.approx(output_error(W, W.double() - E, X), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_every_pass_lowers_the_error_and_descent_ends_where_no_single_code_can(seed: int) -> None:
    W, _, H = layer(16, 96, tokens=200, seed=seed)
    H, grid = damped(H), grid_of(W, groups=3)
    nearest = grid.nearest(W)
    errors = [metric_error(W, grid.values(nearest), H)]
    errors += [metric_error(W, grid.values(round_in_metric(W, H, grid, passes=p)[0]), H) for p in (1, 2, 4)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[3] <= errors[2] <= errors[1]
    codes, _ = round_in_metric(W, H, grid, passes=40)
    least = metric_error(W, grid.values(codes), H)
    for row, column in itertools.product((0, 7), (0, 31, 95)):
        for other in range(16):
            tried = codes.clone()
            tried[row, column] = other
            assert metric_error(W, grid.values(tried), H) >= least * (1 - 1e-5)


def test_no_row_beats_the_optimum_of_a_small_case_and_all_come_near() -> None:
    W, _, H = layer(8, 3, tokens=40, seed=4)
    grid = Grid(torch.tensor([-1.0, -0.5, 0.5, 1.0]), torch.ones(8, 1))
    grid = Grid(torch.cat([grid.levels, torch.arange(10.0, 22.0)]), grid.step)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.uint8)
    values = grid.levels[every.long()].double()
    costs = torch.stack([((w.double() - values) @ H * (w.double() - values)).sum(1) for w in W])
    codes, _ = round_in_metric(W.clamp(-1.2, 1.2), damped(H, 0.0), grid, passes=6)
    got = ((W.double() - grid.values(codes).double()) @ H * (W.double() - grid.values(codes).double())).sum(1)
    assert float(got.sum()) < 1.3 * float(costs.amin(1).sum())
    assert (got >= costs.amin(1) * (1 - 1e-9)).all()


def test_the_identity_as_metric_is_nearest_rounding() -> None:
    W = torch.randn(10, 70, generator=generator(1))
    codes, _ = round_in_metric(W, torch.eye(70), grid_of(W), passes=3)
    assert torch.equal(codes, grid_of(W).nearest(W))


def test_going_on_from_codes_gives_what_one_run_gives() -> None:
    W, _, H = layer(16, 96, tokens=200)
    H, grid = damped(H), grid_of(W, groups=3)
    once, _ = round_in_metric(W, H, grid, passes=3)
    first, _ = round_in_metric(W, H, grid, passes=1)
    again, left = round_in_metric(W, H, grid, passes=2, codes=first)
    assert (once == again).float().mean() > 0.995
    assert torch.allclose(left, W - grid.values(again), atol=1e-6)


@pytest.mark.parametrize("numbers", [1 << 22, 32])
def test_fitted_steps_are_least_squares(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SYSTEM_NUMBERS", numbers)  # all rows at once; two at a time
    W, X, H = layer(5, 64, tokens=100)
    grid = grid_of(W, groups=4)
    codes, _ = round_in_metric(W, damped(H), grid, passes=1)
    fitted = fit_steps(W, H, grid, codes)
    levels = LEVELS[codes.long()].double()
    for row in range(5):
        columns = torch.stack([X[:, 16 * b : 16 * b + 16] @ levels[row, 16 * b : 16 * b + 16] for b in range(4)], 1)
        oracle = torch.linalg.lstsq(columns, X @ W[row].double()).solution
        assert torch.allclose(fitted[row].double(), oracle, rtol=1e-2)
    assert metric_error(W, Grid(LEVELS, fitted).values(codes), H) < metric_error(W, grid.values(codes), H)


def test_steps_without_a_level_stay() -> None:
    grid = Grid(LEVELS, torch.ones(2, 2))
    codes = torch.full((2, 8), 8, dtype=torch.uint8)
    assert torch.equal(fit_steps(torch.randn(2, 8, generator=generator(0)), torch.eye(8), grid, codes), torch.ones(2, 2))


def test_searched_steps_beat_the_largest_weight() -> None:
    W = torch.randn(50, 32, generator=generator(2))
    largest, shares = W.abs().amax(1, keepdim=True) / 8, torch.linspace(0.7, 1.0, 7)
    found = search_steps(W, torch.ones_like(W), LEVELS, largest, shares)
    costs = [
        (W - Grid(LEVELS, step).values(Grid(LEVELS, step).nearest(W))).square().sum(1) for step in (largest * s for s in shares)
    ]
    assert torch.allclose((found / largest)[:, 0], shares[torch.stack(costs).argmin(0)])


@pytest.mark.parametrize("kind", ["nf4", "q4_0"])
def test_rounding_holds_two_copies_of_wide_moments(kind: str) -> None:
    """In the order of columns, and the root of that; what is as large as the weight is small beside them."""
    W, H = torch.randn(32, 1024, generator=generator(3)), torch.eye(1024, dtype=torch.float64)
    (round_nf4(W, H) if kind == "nf4" else round_gguf(W, H, kind))  # tables that are made once
    with LiveBytes() as live:
        (round_nf4(W, H) if kind == "nf4" else round_gguf(W, H, kind))
    assert 2 * H.nbytes <= live.peak < 2 * H.nbytes + 12 * W.nbytes


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(32, 128), (24, 100), (7, 33)])
def test_nf4_is_an_ordinary_bitsandbytes_matrix_with_a_smaller_error(shape: tuple[int, int], double: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    W, _, H = layer(*shape, tokens=300)
    matrix, plain = round_nf4(W, H, double=double), NF4Matrix.quantize(W, double=double)
    assert matrix.size_bytes == plain.size_bytes
    assert metric_error(W, matrix.dequantize(), H) < 0.7 * metric_error(W, plain.dequantize(), H)
    ours = matrix.tensors()
    assert {k: (t.dtype, t.shape) for k, t in ours.items() if k != STATE_KEY} == {
        k: (t.dtype, t.shape) for k, t in plain.tensors().items() if k != STATE_KEY
    }
    parts = {key.removeprefix("weight."): tensor for key, tensor in ours.items() if key != "weight"}
    state = theirs.QuantState.from_dict(parts, torch.device("cpu"))
    assert torch.equal(theirs.dequantize_4bit(matrix.weight.detach(), state), matrix.dequantize())


def test_a_round_of_fitted_scales_never_raises_the_error() -> None:
    W, _, H = layer(64, 128, tokens=300)
    errors = [metric_error(W, round_nf4(W, H, rounds=rounds).dequantize(), damped(H)) for rounds in (1, 2, 4)]
    assert errors[2] <= errors[1] * (1 + 1e-6) <= errors[0] * (1 + 1e-6)
    assert errors[2] < errors[0]


@pytest.mark.parametrize(("kind", "columns"), [("q4_0", 96), ("q4_k", 256)])
def test_gguf_blocks_are_read_by_gguf_and_have_a_smaller_error(kind: str, columns: int) -> None:
    W, _, H = layer(24, columns, tokens=400)
    matrix, plain = round_gguf(W, H, kind), GGUFMatrix(quantize_gguf(W, kind.upper()), kind)
    assert matrix.size_bytes == plain.size_bytes
    assert metric_error(W, matrix.dequantize(), H) < 0.7 * metric_error(W, plain.dequantize(), H)
    read = gguf.quants.dequantize(matrix.weight.detach().numpy(), getattr(gguf.GGMLQuantizationType, kind.upper()))
    assert np.array_equal(read, matrix.dequantize().numpy())


def test_what_lies_on_the_grid_stays() -> None:
    W, _, H = layer(8, 256, tokens=400)
    for kind in ("q4_0", "q4_k"):
        on_grid = GGUFMatrix(quantize_gguf(W, kind.upper()), kind).dequantize()
        again = GGUFMatrix(quantize_gguf(on_grid, kind.upper()), kind).dequantize()
        result = round_gguf(on_grid, H, kind).dequantize()
        assert metric_error(on_grid, result, H) <= metric_error(on_grid, again, H) * (1 + 1e-6) + 1e-6


def test_zeros_stay_zero() -> None:
    W, _, H = layer(8, 256, tokens=100)
    W[:, :128] = 0
    W[3] = 0
    for matrix in (round_nf4(W, H), round_gguf(W, H, "q4_0"), round_gguf(W, H, "q4_k")):
        assert torch.equal(matrix.dequantize()[3], torch.zeros(256))
        assert matrix.dequantize().isfinite().all()


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    W = torch.randn(8, 64, generator=generator(1))
    matrix = round_nf4(W, torch.zeros(64, 64), double=False)
    assert float((W - matrix.dequantize()).abs().max()) < 0.2 * float(W.abs().max())


def test_what_is_refused() -> None:
    W, _, H = layer(8, 64, tokens=100)
    with pytest.raises(ConfigError, match="kinds that are rounded in a metric are q4_0, q4_k; got 'q4_1'"):
        round_gguf(W, H, "q4_1")
    with pytest.raises(ShapeError, match="Q4_K holds rows in blocks of 256"):
        round_gguf(W, H, "q4_k")
    with pytest.raises(ShapeError, match=r"moments are \(in_features, in_features\); got \(8, 8\)"):
        round_nf4(W, H[:8, :8])
    with pytest.raises(NumericError, match="must be a finite matrix"):
        round_nf4(W / 0, H)
    with pytest.raises(NumericError, match="not negative on the diagonal"):
        round_nf4(W, -H)
    with pytest.raises(NumericError, match="positive definite moments"):
        round_in_metric(W, torch.zeros(64, 64), grid_of(W))
    with pytest.raises(ShapeError, match="at least one pass"):
        round_nf4(W, H, passes=0)
    with pytest.raises(ShapeError, match="at least one round; got 0"):
        round_gguf(W, H, "q4_0", rounds=0)
    with pytest.raises(NumericError, match="float16, at most 65504"):
        round_gguf(W * 1e7, H, "q4_0")
