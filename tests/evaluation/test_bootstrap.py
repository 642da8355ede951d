"""Intervals: what resampling by hand gives, what theory says, and pairs taken on the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.errors import ShapeError
from luthier.evaluation import bootstrap
from luthier.evaluation.bootstrap import Figure, Resampled, mean_of, ratio, resample


def some_values(rows: int = 60, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).exponential(2.0, rows)


def test_draws_are_means_of_rows_drawn_with_replacement() -> None:
    values = some_values(20)
    found = resample([mean_of("mean", values)], resamples=50, seed=3)["mean"]
    generator = np.random.default_rng(3)
    picks = generator.integers(0, 20, (50, 20))
    assert np.allclose(found.draws, values[picks].mean(1))
    assert np.allclose(found.left_out, [np.delete(values, row).mean() for row in range(20)])
    assert found.value == pytest.approx(values.mean())


def test_pieces_of_draws_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = mean_of("mean", some_values())
    whole = resample([figure])["mean"]
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 700)
    assert np.allclose(resample([figure])["mean"].draws, whole.draws)
    assert len(whole.draws) == 2000


def test_an_interval_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = resample([mean_of("mean", values)])["mean"].interval()
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_a_skewed_figure_has_a_skewed_interval() -> None:
    found = resample([mean_of("mean", some_values(40))])["mean"]
    low, high = found.interval()
    assert high - found.value > 1.1 * (found.value - low)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(200):
        rows = np.random.default_rng(1000 + seed).random(80) < 0.3
        low, high = resample([mean_of("share", rows)], resamples=400)["share"].interval()
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 198


def test_bca_by_its_formula() -> None:
    """b and a by the definitions; ends are quantiles of the draws at the levels that follow."""
    from statistics import NormalDist

    found = resample([mean_of("mean", some_values(30))])["mean"]
    normal = NormalDist()
    bias = normal.inv_cdf(float(np.mean(found.draws < found.value)))
    centred = found.left_out.mean() - found.left_out
    skew = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    ends = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        level = normal.cdf(bias + (bias + z) / (1 - skew * (bias + z)))
        ends.append(np.quantile(found.draws, level))
    assert found.interval() == pytest.approx(tuple(ends))


def test_rows_that_agree_and_single_rows_have_no_width() -> None:
    assert resample([mean_of("share", [1.0] * 9)])["share"].interval() == (1.0, 1.0)
    assert resample([mean_of("share", [0.25])])["share"].interval() == (0.25, 0.25)


def test_pairs_are_taken_on_the_same_rows() -> None:
    values = some_values(100)
    first = resample([mean_of("one", values)])["one"]
    # In another call, beside another figure, the rows drawn are the same.
    second = resample([mean_of("other", some_values(100, 2)), mean_of("two", values + 0.5)])["two"]
    difference = second.minus(first)
    assert np.allclose(difference.draws, 0.5)
    assert difference.interval() == pytest.approx((0.5, 0.5))
    alone = first.interval()
    assert alone[1] - alone[0] > 0.3


def test_a_ratio_is_of_sums_and_nothing_is_divided_by_zero() -> None:
    terms = np.asarray([[3.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
    assert Figure("loss", terms, ratio).value == 1.0
    assert ratio(np.zeros((2, 2))).tolist() == [0.0, 0.0]
    found = resample([Figure("loss", terms, ratio)])["loss"]
    assert np.isfinite(found.draws).all()
    assert found.left_out.tolist() == [1 / 3, 3.0, 1.0]


def test_figures_over_different_rows_are_no_pair() -> None:
    first = Resampled(1.0, np.zeros(4), np.zeros(3))
    with pytest.raises(ShapeError, match="a paired difference needs the same rows on both sides; got 3 and 5"):
        first.minus(Resampled(1.0, np.zeros(4), np.zeros(5)))


def test_extreme_skew_ends_at_the_ends_of_the_draws() -> None:
    left_out = np.asarray([0.0] + [1.0] * 3)
    found = Resampled(0.0, np.linspace(-1, 1, 201), left_out * -1e6)
    low, high = found.interval()
    assert -1 <= low <= high <= 1
