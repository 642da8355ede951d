"""How far a figure would move with other rows of the same kind: 95 % intervals by resampling rows.

Every figure is a function of a sum over rows: loss is (sum of losses) / (sum of tokens), BLEU a function of summed counts.
A resample then is one product of row counts with the rows' terms, and 2,000 of them take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from luthier.errors import ShapeError

RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
DRAWS_AT_ONCE = 1 << 22

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Figure:
    """A number about N rows: of_sums(terms.sum(0)).

    terms: (N, k) float64, what each row adds. of_sums: (R, k) -> (R,), the figure for each of R sums.
    """

    name: str
    terms: Array
    of_sums: Callable[[Array], Array]

    @property
    def value(self) -> float:
        return float(self.of_sums(self.terms.sum(0, keepdims=True))[0])


@dataclass(frozen=True, eq=False)
class Resampled:
    """A figure with its values on other choices of rows. draws: (R,), on resamples; left_out: (N,), without each row."""

    value: float
    draws: Array
    left_out: Array

    def minus(self, other: Resampled, factor: float = 1.0) -> Resampled:
        """self - factor x other, paired: both are taken on the same resamples of the same rows.

        Raises ShapeError for figures over different numbers of rows.
        """
        if len(self.left_out) != len(other.left_out):
            raise ShapeError(
                f"a paired difference needs the same rows on both sides; got {len(self.left_out)} and {len(other.left_out)}."
            )
        return Resampled(
            self.value - factor * other.value,
            self.draws - factor * other.draws,
            self.left_out - factor * other.left_out,
        )

    def interval(self) -> Interval:
        """The bias-corrected and accelerated 95 % interval (BCa; Efron, Better Bootstrap Confidence Intervals, 1987).

        Its ends are quantiles of the draws at Phi(b + (b + z) / (1 - a (b + z))), z = -1.96 and 1.96, where b is the normal
        quantile of the share of draws below the value, and a the skewness of the values without each row, over 6.
        A single row, or rows that all say the same, give the value twice.
        """
        if len(self.left_out) < 2 or float(np.ptp(self.draws)) == 0:
            return self.value, self.value
        normal = NormalDist()
        below = float(np.mean(self.draws < self.value) + np.mean(self.draws == self.value) / 2)
        edge = 1 / (len(self.draws) + 1)
        bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
        centred = self.left_out.mean() - self.left_out
        spread = float((centred**2).sum() ** 1.5)
        skew = float((centred**3).sum()) / (6 * spread) if spread > 0 else 0.0
        levels = []
        for tail in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
            moved = bias + normal.inv_cdf(tail)
            # Beyond this skewness the formula has no finite value; the quantile is then at the end of the draws.
            levels.append(normal.cdf(bias + moved / max(1 - skew * moved, 1e-9)))
        low, high = np.quantile(self.draws, levels)
        return float(low), float(high)


def resample(figures: Sequence[Figure], *, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Resampled]:
    """Each figure by name with its values on `resamples` draws of rows with replacement, and without each row.

    Figures over the same number of rows are taken on the same draws, in this call and in any other with the same seed:
    two models measured on the same rows are compared row by row.
    """
    by_rows: dict[int, list[Figure]] = {}
    for figure in figures:
        by_rows.setdefault(len(figure.terms), []).append(figure)
    found: dict[str, Resampled] = {}
    for group in by_rows.values():
        terms = np.concatenate([figure.terms for figure in group], 1)
        drawn, without = _drawn_sums(terms, resamples, seed), terms.sum(0) - terms
        first = 0
        for figure in group:
            columns = slice(first, first + figure.terms.shape[1])
            first = columns.stop
            left_out = figure.of_sums(without[:, columns]) if len(terms) > 1 else np.full(1, figure.value)
            found[figure.name] = Resampled(figure.value, figure.of_sums(drawn[:, columns]), left_out)
    return {figure.name: found[figure.name] for figure in figures}


def _drawn_sums(terms: Array, resamples: int, seed: int) -> Array:
    """(resamples, k): the sum of N rows of `terms` (N, k) drawn with replacement, again and again."""
    generator = np.random.default_rng(seed)
    rows = len(terms)
    at_once = max(1, min(resamples, DRAWS_AT_ONCE // rows))
    sums = np.empty((resamples, terms.shape[1]))
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        sums[first : first + count] = times.astype(np.float64) @ terms
    return sums


def mean_of(name: str, values: Sequence[float] | Array) -> Figure:
    """The mean of one value a row."""
    column = np.asarray(values, dtype=np.float64)
    return Figure(name, np.stack([column, np.ones_like(column)], 1), ratio)


def ratio(sums: Array) -> Array:
    """First column over second, 0 where the second is 0. (R, 2) -> (R,)"""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)
