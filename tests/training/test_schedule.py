"""Length of a run, learning rates, and what falls on which step."""

from __future__ import annotations

import pytest

from luthier.config import RunConfig
from luthier.training.schedule import (
    default_interval,
    default_learning_rate,
    is_due,
    make_schedule,
    total_examples,
    total_steps,
)


@pytest.mark.parametrize(
    ("hidden", "method", "steps", "expected"),
    [
        (576, "lora", 100, 3.44e-3),
        (576, "lora", 20, 3.44e-3),
        (2000, "qlora", 200, 9e-4),
        (2000, "lora", 16_000, 5.05e-4),
        (576, "full", 100, 1.32e-4),
    ],
)
def test_default_learning_rate(hidden: int, method: str, steps: int, expected: float) -> None:
    assert default_learning_rate(hidden, method, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 20, 333])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
def test_every_step_has_a_rate_and_the_peak_is_reached(kind: str, steps: int, warmup_ratio: float) -> None:
    schedule = make_schedule(RunConfig(data="a", schedule=kind, warmup_ratio=warmup_ratio), 2.0, steps)
    rates = [schedule.learning_rate(step) for step in range(1, steps + 1)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) == schedule.warmup_steps
    assert rates[: schedule.warmup_steps] == sorted(rates[: schedule.warmup_steps])
    assert rates[schedule.warmup_steps :] == sorted(rates[schedule.warmup_steps :], reverse=True)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    schedule = make_schedule(RunConfig(data="a", warmup_ratio=0.0), 1.0, 100)
    assert schedule.learning_rate(51) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("length", "rows", "examples", "steps"),
    [
        ({}, 20, 20, 3),
        ({"epochs": 0.5}, 20, 10, 2),
        ({"epochs": 2}, 20, 40, 5),
        ({"steps": 4}, 20, 32, 4),
        ({"epochs": 0.001}, 20, 1, 1),
    ],
)
def test_length(length: dict[str, float], rows: int, examples: int, steps: int) -> None:
    config = RunConfig(data="a", **length)
    assert (total_examples(config, rows), total_steps(config, rows)) == (examples, steps)


def test_due() -> None:
    every = default_interval(200, 5)
    assert [step for step in range(1, 201) if is_due(step, 200, every)] == [40, 80, 120, 160, 200]
    assert default_interval(3, 10) == 1
    assert [step for step in range(1, 8) if is_due(step, 7, 3)] == [3, 6, 7]
