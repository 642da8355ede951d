"""How long a run is, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from luthier.config import RunConfig

DEFAULT_EPOCHS = 1.0
EVALUATIONS_A_RUN = 5
CHECKPOINTS_A_RUN = 10
SHORT_RUN_GAIN, SHORT_RUN_STEPS = 1.6, 100


def default_learning_rate(hidden_size: int, method: Literal["lora", "qlora", "full"], steps: int) -> float:
    """lr = 5e-5 * k * (2000 / hidden_size)^0.781; three digits kept. k = 1 for all weights; for low-rank terms
    k = 10 (1 + 1.6 min(1, 100 / steps)): 26 in a run of up to 100 steps, 11.6 in one of 1,000.

    Holds for s = alpha / r with alpha = 32 and then does not depend on the rank. The exponent was found on
    Llama-like models; it is used for every family, and for the other variants as it is.
    Source: LoRA Without Regret (2025) for the exponent, for 10 in long runs, and for more in runs of about 100 steps (15 there;
    26 was better than 10 on both data sets of docs/log.md, 2026-11-28).
    """
    factor = 1.0 if method == "full" else 10 * (1 + SHORT_RUN_GAIN * min(1.0, SHORT_RUN_STEPS / steps))
    rate = 5e-5 * factor * (2000 / hidden_size) ** 0.781
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then cosine, linear or constant, over `total_steps` steps numbered from 1.

    Step k of the w warm-up steps has peak * k / (w + 1); step w + 1 has the peak; later ones peak * f(p) with
    p = (k - 1 - w) / (total_steps - w) and f(p) = (1 + cos(pi p)) / 2, 1 - p, or 1. No step has rate 0.
    """

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        if step <= self.warmup_steps:
            return self.peak * step / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = (step - 1 - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.peak * ((1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress)


def total_examples(config: RunConfig, rows: int) -> int:
    """Examples the run draws: steps * batch_size, or epochs * rows (rounded, at least one)."""
    if config.steps is not None:
        return config.steps * config.batch_size
    return max(1, round((config.epochs or DEFAULT_EPOCHS) * rows))


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimiser steps of the run; the last may have fewer examples than batch_size."""
    return math.ceil(total_examples(config, rows) / config.batch_size)


def make_schedule(config: RunConfig, peak: float, steps: int) -> Schedule:
    """The schedule of `steps` steps; at least one step is left after the warm-up."""
    return Schedule(config.schedule, peak, min(round(config.warmup_ratio * steps), steps - 1), steps)


def default_interval(steps: int, times_a_run: int) -> int:
    """Steps between things that are done `times_a_run` times in a run of `steps` steps."""
    return max(1, steps // times_a_run)


def is_due(step: int, steps: int, every: int) -> bool:
    """Whether something done every `every` steps and at the end falls on `step`, counted from 1."""
    return step % every == 0 or step == steps
