"""The knapsack: the optimum of small cases by trying everything, and what holds for large ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import generator

from luthier.errors import PreflightError, ShapeError
from luthier.lowrank import allocation as module
from luthier.lowrank.allocation import Choice, allocate


def problem(layers: int, options: int, seed: int, unit: int = 1) -> dict[str, list[Choice]]:
    """Sizes and losses at random: dominated and non-convex choices among them."""
    g = generator(seed)
    sizes = torch.randint(1, 50, (layers, options), generator=g) * unit
    losses = torch.rand(layers, options, generator=g, dtype=torch.float64)
    return {
        f"layer {i}": [Choice(str(j), int(sizes[i, j]), float(losses[i, j])) for j in range(options)] for i in range(layers)
    }


def brute_force(choices: dict[str, list[Choice]], budget: int) -> float:
    totals = (
        (sum(c.size_bytes for c in picked), sum(c.loss for c in picked)) for picked in itertools.product(*choices.values())
    )
    return min(loss for size, loss in totals if size <= budget)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_small_cases_are_exact(seed: int, share: float) -> None:
    choices = problem(5, 5, seed, unit=1000)
    least = sum(min(c.size_bytes for c in options) for options in choices.values())
    most = sum(max(c.size_bytes for c in options) for options in choices.values())
    budget = int(least + share * (most - least))
    result = allocate(choices, budget)
    assert result.size_bytes <= budget
    assert result.loss == pytest.approx(brute_force(choices, budget), rel=1e-12)
    assert result.size_bytes == sum(choices[name][place].size_bytes for name, place in result.chosen.items())


@pytest.mark.parametrize("seed", range(4))
def test_in_coarse_units_it_fits_and_comes_near(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = problem(6, 4, seed, unit=997)
    budget = int(1.6 * sum(min(c.size_bytes for c in options) for options in choices.values()))
    exact = brute_force(choices, budget)
    monkeypatch.setattr(module, "MAX_UNITS", 40)
    result = allocate(choices, budget)
    assert result.size_bytes <= budget
    assert exact * (1 - 1e-12) <= result.loss <= exact + 0.35


def test_a_large_problem_beats_treating_all_alike() -> None:
    g = generator(3)
    choices = {}
    for i in range(120):
        energies = float(torch.rand((), generator=g)) * torch.rand(64, generator=g, dtype=torch.float64).sort().values ** 4
        choices[f"layer {i}"] = [Choice(f"rank {r}", 384 * r, float(energies[: 64 - r].sum())) for r in range(4, 44, 4)]
    even = 4
    budget = sum(options[even].size_bytes for options in choices.values())
    result = allocate(choices, budget)
    assert result.size_bytes <= budget
    assert result.loss < 0.9 * sum(options[even].loss for options in choices.values())


def test_what_is_refused() -> None:
    choices = problem(3, 2, 0)
    with pytest.raises(PreflightError, match="a budget of 1 bytes must hold every layer at its smallest"):
        allocate(choices, 1)
    with pytest.raises(ShapeError, match="every layer needs choices"):
        allocate({"a": []}, 10)
    with pytest.raises(ShapeError, match="finite loss"):
        allocate({"a": [Choice("x", 1, float("nan"))]}, 10)
