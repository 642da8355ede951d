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
    """One way to store a layer. loss: the predicted rise of the mean loss, additive over layers. rank: None where the layer
    is not of low rank. name: what it is, for reports and for whoever builds it."""

    name: str
    size_bytes: int
    loss: float
    rank: int | None = None


@dataclass(frozen=True)
class Allocation:
    """chosen: of each layer the place of its choice. uniform_loss: what was predicted for the uniform allocation, if one was
    given that fits; is_uniform: whether that one was kept because nothing better was found."""

    chosen: dict[str, int]
    size_bytes: int
    loss: float
    uniform_loss: float | None = None
    is_uniform: bool = False


def allocate(
    choices: Mapping[str, Sequence[Choice]], budget_bytes: int, *, uniform: Mapping[str, int] | None = None
) -> Allocation:
    """The choice of each layer with the least predicted loss in all, within the budget; never worse than `uniform`.

    uniform: for each layer the place of a choice, compared where it fits the budget. Exact where the sizes' common divisor
    divides the budget beyond the smallest allocation into at most MAX_UNITS; else within what rounding up costs.
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
    return _no_worse(choices, chosen, budget_bytes, uniform)


def floored(choices: Mapping[str, Sequence[Choice]], uniform: Mapping[str, int]) -> dict[str, list[Choice]]:
    """The choices without those of less than half the rank that the layer has under `uniform`; others are all kept.

    A layer that the prediction calls unimportant keeps enough rank for the prediction to have been wrong. Places change, so
    find choices by name afterwards.
    """
    result = {}
    for name, options in choices.items():
        rank = options[uniform[name]].rank
        result[name] = [option for option in options if rank is None or option.rank is None or 2 * option.rank >= rank]
    return result


def rank_choices(
    energies: Tensor,
    shape: tuple[int, int],
    importance: float,
    *,
    bytes_per_number: float = 2.0,
    step: int = 8,
    pivoted: bool = False,
) -> list[Choice]:
    """One choice for every `step` ranks of a decomposition, in rising rank; loss = importance * what the rank drops.

    energies: (p,) as `Decomposition` has them; shape: (out, in). Ranks whose factors, r (out + in) numbers or pivoted
    r (out + in) - r^2, are as many as the matrix has are left out. importance: rise of the loss per unit of the error.
    """
    out_features, in_features = shape
    left = float(energies.sum()) - energies.to(torch.float64).cumsum(0)
    found = []
    for rank in range(step, len(energies) + 1, step):
        numbers = rank * (out_features + in_features) - (rank**2 if pivoted else 0)
        if numbers >= out_features * in_features:
            break
        loss = importance * max(0.0, float(left[rank - 1]))
        found.append(Choice(f"rank {rank}", math.ceil(numbers * bytes_per_number), loss, rank))
    return found


def _solved(choices: Mapping[str, Sequence[Choice]], smallest: Mapping[str, int], slack: int) -> dict[str, int]:
    """best[u] = least loss of the layers so far within u units beyond the smallest sizes; then back through what was chosen."""
    extras = {name: [option.size_bytes - smallest[name] for option in options] for name, options in choices.items()}
    unit = math.gcd(*(extra for sizes in extras.values() for extra in sizes)) or 1
    unit = max(unit, -(-slack // MAX_UNITS), 1)
    units = slack // unit
    best = torch.zeros(units + 1, dtype=torch.float64)
    picked: list[Tensor] = []
    for name, options in choices.items():
        least, which = torch.full_like(best, torch.inf), torch.zeros(units + 1, dtype=torch.int32)
        for place, (option, extra) in enumerate(zip(options, extras[name], strict=True)):
            cost = -(-extra // unit)
            if cost > units:
                continue
            total = best[: units + 1 - cost] + option.loss
            better = total < least[cost:]
            least[cost:] = torch.where(better, total, least[cost:])
            which[cost:] = torch.where(better, place, which[cost:])
        best = least
        picked.append(which)
    chosen, left = {}, units
    for name, which in reversed(list(zip(choices, picked, strict=True))):
        chosen[name] = int(which[left])
        left -= -(-extras[name][chosen[name]] // unit)
    return chosen


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


def _loss(choices: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int]) -> float:
    return math.fsum(choices[name][place].loss for name, place in chosen.items())


def _no_worse(
    choices: Mapping[str, Sequence[Choice]], chosen: dict[str, int], budget: int, uniform: Mapping[str, int] | None
) -> Allocation:
    found = Allocation(chosen, _size(choices, chosen), _loss(choices, chosen))
    if uniform is None:
        return found
    even = {name: uniform[name] for name in choices}
    size, loss = _size(choices, even), _loss(choices, even)
    if size > budget:
        return found
    if loss < found.loss:
        return Allocation(even, size, loss, loss, is_uniform=True)
    return Allocation(found.chosen, found.size_bytes, found.loss, loss)
