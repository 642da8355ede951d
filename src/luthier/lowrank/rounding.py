"""Rounding to a fixed grid so that the error is small where inputs are large: error feedback, then coordinate descent.

For E = W - Q and a metric H (in_features, in_features) the error is tr(E H E^T). With H = U D U^T, U unit upper triangular,

    tr(E H E^T) = sum_j D_j |E_j + sum_{k<j} U_kj E_k|^2        E_j: column j of E

so columns are rounded in turn, each to the value nearest to W_j + sum_{k<j} U_kj E_k: what was rounded before is made up for.
A later pass takes each column as if all others were settled: Q_j goes to the value nearest to Q_j + (E H)_j / H_jj, which
never raises the error. Grids do not change meanwhile, so their scales are chosen before (`fit_steps`, and each format's file).
Sources: GPTQ, arXiv:2210.17323; its form without an inverse, LDLQ, arXiv:2307.13304 (QuIP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError

BLOCK = 64  # columns that are rounded one by one before what they did reaches the others as one product
DAMPING = 0.01
SYSTEM_NUMBERS = 1 << 19  # of the linear systems that are solved at once when steps are fitted, 4 MB
SEARCHED_NUMBERS = 1 << 17  # of a weight whose steps are searched at once, so that what is made of them stays near
SHARES = torch.linspace(0.7, 1.05, 15)  # of the step that just reaches a group's largest weight

Stored = TypeVar("Stored")


@dataclass(frozen=True, eq=False)
class Grid:
    """What each weight may become: levels[code] step - offset.

    levels: (16,) float32, ascending. step: (out, in) or (out, in / width) float32, of either sign; 0 stands for a weight that
    is 0 whatever its code. offset: the shape of step, or None.
    """

    levels: Tensor
    step: Tensor
    offset: Tensor | None = None

    def values(self, codes: Tensor) -> Tensor:
        """codes: (out, in) uint8 -> (out, in) float32."""
        columns = codes.shape[1]
        scaled = self.levels[codes.to(torch.int64)] * _spread(self.step, columns)
        return scaled if self.offset is None else scaled - _spread(self.offset, columns)

    def nearest(self, weight: Tensor) -> Tensor:
        """The code whose value is nearest to each weight, (out, in) uint8."""
        columns = weight.shape[1]
        shifted = weight if self.offset is None else weight + _spread(self.offset, columns)
        return _codes(shifted * _inverse(_spread(self.step, columns)), self.levels)


def _spread(per_group: Tensor, columns: int) -> Tensor:
    return per_group.repeat_interleave(columns // per_group.shape[1], 1)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, 1.0 / step)


def _codes(scaled: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def damped(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """H + damping mean(diag H) I in float64, its inputs that are always zero given the damping alone.

    It keeps rounding from trusting directions that calibration text of finite length left empty. Where all of H is zero it is
    the identity. Raises NumericError for moments that are not finite or negative on the diagonal.
    """
    return with_added(moments, damping_of(moments, damping), torch.float64)


def damping_of(moments: Tensor, damping: float = DAMPING) -> float:
    """What `damped` adds to the diagonal. Raises what that raises."""
    diagonal, (least, most) = moments.diagonal().to(torch.float64), moments.aminmax()
    if not bool(least.isfinite() and most.isfinite() and (diagonal >= 0).all()):
        raise NumericError("moments must be finite and not negative on the diagonal. Check the calibration text and the model.")
    mean = float(diagonal.mean())
    return damping * mean if mean > 0 else 1.0


def with_added(moments: Tensor, added: float, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """H + added I, the sum in float64 and then in `dtype`; with `order` its rows and columns in that. Its own memory."""
    moments = moments.detach()
    diagonal = moments.diagonal().to(torch.float64) + added
    if order is None:
        H = moments.to(dtype, copy=True)
    else:
        H, diagonal = torch.empty_like(moments, dtype=dtype), diagonal[order]
        for first in range(0, len(H), BLOCK):
            H[first : first + BLOCK] = moments[order[first : first + BLOCK, None], order]
    H.diagonal().copy_(diagonal)
    return H


def round_in_metric(
    weight: Tensor, moments: Tensor, grid: Grid, *, passes: int = 2, codes: Tensor | None = None, added: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(codes uint8, what is left E = W - Q float32), both (out, in): one pass of feedback and `passes - 1` of descent.

    weight: (out, in); moments H: (in, in); the metric is H + added I, positive definite, so that moments are usually `damped`
    or `added` is their `damping_of`. Columns are taken in falling order of H_jj. codes: where to go on from; then all passes
    are descent. Products are float32 over blocks of 64 columns, sums for what a column makes up for are exact to about 1e-6 of
    the weights, so that a near tie may fall either way. Memory: two copies of H in float64.
    Raises ShapeError for moments of another shape or less than one pass, NumericError where H is not positive definite.
    """
    if moments.shape != (weight.shape[1],) * 2:
        raise ShapeError(f"moments are (in_features, in_features); got {tuple(moments.shape)} for {tuple(weight.shape)}.")
    if passes < 1:
        raise ShapeError(f"rounding takes at least one pass; got {passes}.")
    order = (moments.diagonal().to(torch.float64) + added).argsort(descending=True)
    if codes is None:
        lower = _unit_lower(moments, added, order)  # needs the most memory, so before all else is made
        work = _Columns(weight, grid, order)
        _feedback(work, lower)
        passes -= 1
        del lower
    else:
        work = _Columns(weight, grid, order)
        work.start(codes[:, order])
    if passes > 0:
        metric = with_added(moments, added, torch.float32, order)
        for _ in range(passes):
            _descend(work, metric)
    back = order.argsort()
    return work.codes.T[:, back].contiguous(), work.error.T[:, back].contiguous()


class _Columns:
    """Columns of W in the order they are rounded in, each contiguous: everything is (in, out)."""

    def __init__(self, weight: Tensor, grid: Grid, order: Tensor):
        columns = weight.shape[1]
        self.target = weight.to(torch.float32).T[order].contiguous()
        self.step = _spread(grid.step, columns).T[order].contiguous()
        self.inverse = _inverse(self.step)
        self.offset = None if grid.offset is None else _spread(grid.offset, columns).T[order].contiguous()
        self.levels = grid.levels
        self.edges = (grid.levels[1:] + grid.levels[:-1]) / 2
        self.codes = torch.zeros(self.target.shape, dtype=torch.uint8)
        self.error = torch.zeros_like(self.target)

    def start(self, codes: Tensor) -> None:
        self.codes.copy_(codes.T)
        values = self.levels[self.codes.to(torch.int64)] * self.step
        self.error = self.target - (values if self.offset is None else values - self.offset)

    def round(self, j: int, wanted: Tensor) -> Tensor:
        """Give column j the codes nearest to `wanted` (out,); -> what is then left of it, W_j - Q_j."""
        shifted = wanted if self.offset is None else wanted + self.offset[j]
        codes = torch.bucketize(shifted * self.inverse[j], self.edges, out_int32=True)
        self.codes[j] = codes
        values = self.levels[codes] * self.step[j]
        return self.target[j] - values if self.offset is None else self.target[j] - values + self.offset[j]


def _unit_lower(moments: Tensor, added: float, order: Tensor) -> Tensor:
    """U^T of H + added I = U D U^T with rows and columns in `order`, U unit upper triangular, float32: from the Cholesky
    factor of that read backwards."""
    root, failed = torch.linalg.cholesky_ex(with_added(moments, added, torch.float64, order.flip(0)))
    if int(failed):
        raise NumericError("rounding needs positive definite moments; these are not. Give them a damping.")
    root /= root.diagonal().clone()  # in place: for a wide layer each copy takes as much as its moments
    return root.to(torch.float32).T.flip(0, 1).contiguous()


def _feedback(work: _Columns, lower: Tensor) -> None:
    """lower: U^T, (in, in)."""
    E = work.error
    for first in range(0, len(E), BLOCK):
        last = min(first + BLOCK, len(E))
        wanted = torch.addmm(work.target[first:last], lower[first:last, :first], E[:first])
        for j in range(first, last):
            E[j] = work.round(j, torch.addmv(wanted[j - first], E[first:j].T, lower[j, first:j]))


def _descend(work: _Columns, H: Tensor) -> None:
    E, diagonal = work.error, H.diagonal().tolist()
    for first in range(0, len(E), BLOCK):
        last = min(first + BLOCK, len(E))
        pull = H[first:last] @ E
        change = torch.zeros_like(pull)
        for j in range(first, last):
            i = j - first
            pulled = torch.addmv(pull[i], change[:i].T, H[j, first:j]) / diagonal[j]
            change[i] = work.round(j, work.target[j] - E[j] + pulled) - E[j]
        E[first:last] += change


def round_with_steps(
    weight: Tensor,
    moments: Tensor,
    levels: Tensor,
    first: Tensor,
    store: Callable[[Tensor], tuple[Stored, Tensor]],
    *,
    passes: int,
    rounds: int,
    added: float = 0.0,
) -> tuple[Stored, Tensor]:
    """(steps as they are stored, codes (out, in) uint8): codes chosen for steps, then steps fitted to codes, in turns.

    first: steps to begin with, (out, groups), or (out, in) where groups do not divide a row, whose steps are never fitted;
    store: steps -> what the format keeps of them, and the steps that it gives back; added: as in `round_in_metric`. The first
    round takes `passes` passes of that, each of `rounds - 1` more fits the steps and takes as many of descent. The round with
    the least error is returned, since what a format keeps of a step may be worse than the step before. Raises what
    `round_in_metric` raises, and ShapeError for less than one round.
    """
    if rounds < 1:
        raise ShapeError(f"rounding takes at least one round; got {rounds}.")
    stored, steps = store(first)
    best: tuple[float, Stored, Tensor] | None = None
    codes: Tensor | None = None
    for index in range(rounds):
        grid = Grid(levels, steps)
        codes, left = round_in_metric(weight, moments, grid, passes=passes, codes=codes, added=added)
        error = float(((left @ with_added(moments, added, torch.float32)) * left).sum(dtype=torch.float64))
        if best is None or error < best[0]:
            best = (error, stored, codes)
        if index + 1 == rounds or steps.shape == weight.shape:
            break
        stored, steps = store(fit_steps(weight, with_added(moments, added, torch.float32), grid, codes))
    assert best is not None
    return best[1], best[2]


def search_steps(weight: Tensor, diagonal: Tensor, levels: Tensor, largest: Tensor, shares: Tensor = SHARES) -> Tensor:
    """For each group the share of `largest` that as step gives the least sum_j H_jj (w_j - q_j)^2 at nearest codes.

    weight: (groups, width) float32; diagonal: H_jj laid out the same; largest: (groups, 1), the step that just reaches the
    largest weight; shares: (S,), tried in turn. -> (groups, 1) float32.
    """
    groups = max(1, SEARCHED_NUMBERS // weight.shape[1])
    parts = zip(weight.split(groups), diagonal.split(groups), largest.split(groups), strict=True)
    return torch.cat([_searched(W, own, levels, most, shares) for W, own, most in parts])


def _searched(weight: Tensor, diagonal: Tensor, levels: Tensor, largest: Tensor, shares: Tensor) -> Tensor:
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in shares.tolist():
        step = largest * share
        error = weight - levels[_codes(weight * _inverse(step), levels).to(torch.int64)] * step
        cost = (diagonal * error.square()).sum(1, keepdim=True)
        best = torch.where(cost < least, step, best)
        least = torch.minimum(cost, least)
    return best


def fit_steps(weight: Tensor, moments: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """The steps that minimise tr(E H E^T) while the codes stay: for each row one linear system over its groups.

    With c_b the levels of group b, zero elsewhere: sum_b' (c_b^T H c_b') s_b' = c_b^T H w. weight: (out, in); grid.step:
    (out, groups), without offset; -> (out, groups) float32. A group whose levels are all 0 keeps its step, and so does one
    whose new step is not finite or of the other sign. Solved in float64; 1e-6 of the diagonal holds each step to the old one.
    """
    groups = grid.step.shape[1]
    H = moments.to(torch.float32)
    rows = max(1, SYSTEM_NUMBERS // groups**2)
    parts = zip(weight.split(rows), codes.split(rows), grid.step.split(rows), strict=True)
    return torch.cat([_fitted_rows(W, H, grid.levels[own.to(torch.int64)], old) for W, own, old in parts])


def _fitted_rows(W: Tensor, H: Tensor, levels: Tensor, step: Tensor) -> Tensor:
    old = step.to(torch.float64)
    groups, width = old.shape[1], W.shape[1] // old.shape[1]
    grouped = levels.view(len(W), groups, width)
    right = ((W.to(torch.float32) @ H).view_as(grouped) * grouped).sum(2).to(torch.float64)
    system = torch.empty(len(W), groups, groups, dtype=torch.float64)
    for b in range(groups):
        rows = H[b * width : (b + 1) * width]
        system[:, b] = ((grouped[:, b] @ rows).view_as(grouped) * grouped).sum(2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    held = 1e-6 * diagonal
    held = torch.where(held > 0, held, 1.0)
    diagonal += held
    new, failed = torch.linalg.solve_ex(system, right + held * old)
    keeps = (failed != 0)[:, None] | ~new.isfinite() | (new * old <= 0)
    return torch.where(keeps, old, new).to(torch.float32)
