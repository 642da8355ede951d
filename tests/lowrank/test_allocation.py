"""The knapsack: the optimum of small cases by trying everything, and what holds for large ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import generator, layer

from luthier.errors import PreflightError, ShapeError
from luthier.lowrank import allocation as module
from luthier.lowrank.allocation import Choice, allocate, floored, rank_choices
from luthier.lowrank.decompose import projected


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


def test_it_is_never_worse_than_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {f"layer {i}": [Choice("small", 10, 1.0), Choice("large", 13, 0.0)] for i in range(3)}
    result = allocate(choices, 39, uniform=dict.fromkeys(choices, 1))
    assert (result.loss, result.uniform_loss, result.is_uniform) == (0.0, 0.0, False)
    monkeypatch.setattr(module, "MAX_UNITS", 1)
    monkeypatch.setattr(module, "_upgraded", lambda choices, chosen, budget: chosen)
    result = allocate(choices, 39, uniform=dict.fromkeys(choices, 1))
    assert (result.loss, result.is_uniform, set(result.chosen.values())) == (0.0, True, {1})
    too_large = allocate(choices, 38, uniform=dict.fromkeys(choices, 1))
    assert too_large.uniform_loss is None


def test_a_large_problem_beats_uniform() -> None:
    g = generator(3)
    choices, uniform = {}, {}
    for i in range(120):
        energies = torch.rand(64, generator=g, dtype=torch.float64).sort(descending=True).values ** 4
        choices[f"layer {i}"] = rank_choices(energies, (128, 64), float(torch.rand((), generator=g)), step=4)
        uniform[f"layer {i}"] = 4
    budget = sum(options[4].size_bytes for options in choices.values())
    result = allocate(choices, budget, uniform=uniform)
    assert result.size_bytes <= budget
    assert result.uniform_loss is not None
    assert result.loss < 0.9 * result.uniform_loss


def test_a_layer_keeps_half_the_uniform_rank() -> None:
    energies = torch.ones(32, dtype=torch.float64)
    choices = {"low": [*rank_choices(energies, (64, 64), 1e-9, step=4), Choice("dense", 64 * 64 * 2, 0.0)]}
    uniform = {"low": next(i for i, c in enumerate(choices["low"]) if c.rank == 20)}
    assert [c.rank for c in floored(choices, uniform)["low"]] == [12, 16, 20, 24, 28, None]
    assert [c.rank for c in floored(choices, {"low": len(choices["low"]) - 1})["low"]] == [4, 8, 12, 16, 20, 24, 28, None]


def test_rank_choices_say_what_the_decomposition_says() -> None:
    W, _, H = layer(24, 40, tokens=100)
    result = projected(W, H)
    plain, pivots = rank_choices(result.energies, (24, 40), 0.5), rank_choices(result.energies, (24, 40), 0.5, pivoted=True)
    assert [(c.rank, c.size_bytes) for c in plain] == [(8, 8 * 64 * 2)]
    assert [(c.rank, c.size_bytes) for c in pivots] == [(8, (8 * 64 - 64) * 2), (16, (16 * 64 - 256) * 2)]
    assert [c.loss for c in pivots] == pytest.approx([0.5 * result.dropped(8), 0.5 * result.dropped(16)], rel=1e-9)


def test_what_is_refused() -> None:
    choices = problem(3, 2, 0)
    with pytest.raises(PreflightError, match="a budget of 1 bytes must hold every layer at its smallest"):
        allocate(choices, 1)
    with pytest.raises(ShapeError, match="every layer needs choices"):
        allocate({"a": []}, 10)
    with pytest.raises(ShapeError, match="finite loss"):
        allocate({"a": [Choice("x", 1, float("nan"))]}, 10)
