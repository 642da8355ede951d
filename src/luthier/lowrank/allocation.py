"""One byte budget spent over layers: for each, one of its choices of rank and bits, so that the predicted loss is least.

    minimise sum_l loss_l(c_l)  subject to  sum_l size_bytes_l(c_l) <= budget

A multiple-choice knapsack, solved by dynamic programming over bytes in units of their greatest common divisor, exactly, or
where that gives more than MAX_UNITS units, of the budget cut into that many, sizes rounded up and what is left over spent on
the best single upgrades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import PreflightError, ShapeError

MAX_UNITS = 1 << 14


@dataclass(frozen=True)
class Choice:
    """One way to store a layer. loss: the predicted rise of the mean loss, additive over layers. name: what it is, for
    reports and for whoever builds it."""

    name: str
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """chosen: of each layer the place of its choice; size_bytes, loss: their sums."""

    chosen: dict[str, int]
    size_bytes: int
    loss: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> Allocation:
    """The choice of each layer with the least predicted loss in all, within the budget.

    Exact where the sizes' common divisor divides the budget beyond the smallest allocation into at most MAX_UNITS; else within
    what rounding up costs.
    Raises PreflightError where even the smallest choices exceed the budget, ShapeError for a layer without choices or a
    loss that is not finite.
    """
    empty = [name for name, options in choices.items() if not options]
    odd = [name for name, options in choices.items() if not all(math.isfinite(option.loss) for option in options)]
    if empty or odd or not choices:
        raise ShapeError(f"every layer needs choices with a finite loss; got none or others for {(empty or odd)[:5]}.")
    smallest = {name: min(option.size_bytes for option in options) for name, options in choices.items()}
    slack = budget_bytes - sum(smallest.values())
    if slack < 0:
        raise PreflightError(
            f"a budget of {budget_bytes} bytes must hold every layer at its smallest, {budget_bytes - slack} bytes. "
            "Raise the budget or allow fewer bits or lower ranks."
        )
    chosen = _upgraded(choices, _solved(choices, smallest, slack), budget_bytes)
    loss = math.fsum(choices[name][place].loss for name, place in chosen.items())
    return Allocation(chosen, _size(choices, chosen), loss)


def _solved(choices: Mapping[str, Sequence[Choice]], smallest: Mapping[str, int], slack: int) -> dict[str, int]:
    """best[u] = least loss of the layers so far within u units beyond the smallest sizes; then back through what was chosen."""
    extras = {name: [option.size_bytes - smallest[name] for option in options] for name, options in choices.items()}
    unit = math.gcd(*(extra for sizes in extras.values() for extra in sizes)) or 1
    unit = max(unit, -(-slack // MAX_UNITS), 1)
    costs = {name: [-(-extra // unit) for extra in sizes] for name, sizes in extras.items()}
    best = torch.zeros(slack // unit + 1, dtype=torch.float64)
    picked: list[Tensor] = []
    for name, options in choices.items():
        best, which = _with_layer(best, [option.loss for option in options], costs[name])
        picked.append(which)
    chosen, left = {}, slack // unit
    for name, which in reversed(list(zip(choices, picked, strict=True))):
        chosen[name] = int(which[left])
        left -= costs[name][chosen[name]]
    return chosen


def _with_layer(best: Tensor, losses: Sequence[float], costs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(least loss within each number of units, with one more layer; which of its choices gives that), both as long as best."""
    least, which = torch.full_like(best, torch.inf), torch.zeros(len(best), dtype=torch.int32)
    for place, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        if cost >= len(best):
            continue
        total = best[: len(best) - cost] + loss
        better = total < least[cost:]
        least[cost:] = torch.where(better, total, least[cost:])
        which[cost:] = torch.where(better, place, which[cost:])
    return least, which


def _upgraded(choices: Mapping[str, Sequence[Choice]], chosen: dict[str, int], budget: int) -> dict[str, int]:
    """Spend what rounding left over: again and again the upgrade that saves most loss for a byte and still fits."""
    chosen = dict(chosen)
    left = budget - _size(choices, chosen)
    while True:
        best: tuple[float, str, int] | None = None
        for name, options in choices.items():
            now = options[chosen[name]]
            for place, option in enumerate(options):
                extra, saved = option.size_bytes - now.size_bytes, now.loss - option.loss
                if extra <= left and saved > 0 and (best is None or saved / max(extra, 1) > best[0]):
                    best = (saved / max(extra, 1), name, place)
        if best is None:
            return chosen
        _, name, place = best
        left -= choices[name][place].size_bytes - choices[name][chosen[name]].size_bytes
        chosen[name] = place


def _size(choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int]) -> int:
    return sum(choices[name][place].size_bytes for name, place in chosen.items())
