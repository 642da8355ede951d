"""Luthier's side of training.py: the step that `luthier train` repeats, over batches that were made beforehand."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common import peak_rss_bytes
from race_data import Batch, read_batches
from race_prepare import HELD_OUT, RANK

# Shorter than any row, so that each example is a pack of its own and shares nothing.
ONE_EXAMPLE_TOKENS = 8
PLAN_KEYS = ("micro_batch_tokens", "recompute_layers", "keeps_freed_memory", "peak_bytes")


@dataclass
class Side:
    """A job of the training loop as `luthier train` makes it, and its examples batch by batch. It has no run directory."""

    job: Any
    batches: list[list[Any]]
    plan: Any


def run_luthier(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, then pass `job["passes"]` times over the measured batches; one record a step, of all passes.

    job: task, method, seed, warmup, passes; plain: Transformers' modules one by one, each example alone. Seconds are
    those from the drawn examples to the end of the update: packing, finding shared prefixes and the optimiser are in.
    """
    import torch

    from luthier.models.blocks import without_blocks
    from luthier.training.optimizer import flushed_denormals

    side = make_side(work, job)
    with without_blocks() if job.get("plain") else nullcontext(), flushed_denormals(), torch.random.fork_rng(devices=[]):
        warm = [measured_step(side, number) for number in range(job["warmup"])]
        numbers = range(job["warmup"], len(side.batches))
        steps = [measured_step(side, number) | {"pass": one} for one in range(job["passes"]) for number in numbers]
    memory = peak_rss_bytes()
    held_out = held_out_loss(work, side) if job.get("held_out") else None
    attention = attention_seconds(job["shape"], side.batches[-1]) if job.get("attention") else None
    plan = {key: getattr(side.plan, key) for key in PLAN_KEYS}
    return {
        "warmup": warm,
        "steps": steps,
        "peak_rss_bytes": memory,
        "plan": plan,
        "held_out_loss": held_out,
        "attention_seconds": attention,
    }


def make_side(work: Path, job: dict[str, Any]) -> Side:
    """Plan the run, load the model and attach the adapter, as training.run.train does."""
    from luthier.config import make_config
    from luthier.data import Dataset, Renderer
    from luthier.models.load import load_tokenizer
    from luthier.training.events import Listener
    from luthier.training.interrupts import Interrupts
    from luthier.training.loop import Job
    from luthier.training.optimizer import Optimizer
    from luthier.training.plan import make_plan
    from luthier.training.prepare import RunData, identity_of, read_model, set_training_mode
    from luthier.training.recompute import set_recomputed

    batches = [examples_of(batch) for batch in read_batches(work / f"{job['task']}.json")]
    base, listener = str(work / "base"), Listener()
    config = make_config(
        {"data": job["task"], "model": base, "method": job["method"], "rank": RANK, "steps": len(batches),
         "batch_size": len(batches[0]), "seed": job["seed"], "offline": True},
        {"micro_batch_tokens": ONE_EXAMPLE_TOKENS} if job.get("plain") else {},
    )  # fmt: skip
    renderer = Renderer(load_tokenizer(base, offline=True), max_length=config.max_length)
    every = [example for batch in batches for example in batch]
    data = RunData(renderer, Dataset(every, {"sha256": job["task"]}), None)
    plan = make_plan(config, data, listener)
    plan.require_fit()
    prepared = read_model(plan.applied(config), data, listener)
    set_recomputed(prepared.model, plan.recompute_layers)
    set_training_mode(prepared.model)
    nothing = cast(Any, None)  # no run directory and no evaluations: the step touches neither
    identity, optimizer = identity_of(prepared, data), Optimizer(prepared.trainable, prepared.config)
    return Side(Job(nothing, prepared, data, identity, optimizer, nothing, listener, Interrupts()), batches, plan)


def examples_of(batch: Batch) -> list[Any]:
    from luthier.data import Example

    return [Example(row.ids, row.supervised, [], "", None, f"row {n}") for n, row in enumerate(batch, 1)]


def measured_step(side: Side, number: int) -> dict[str, Any]:
    """One step over batch `number` at the learning rate of that step; the multiply-add peak is probed before and after."""
    from luthier.training.loop import train_step

    side.job.state.step = number
    before = probed_peak()
    started = time.perf_counter()
    outcome = train_step(side.job, side.batches[number])
    seconds = time.perf_counter() - started
    return {
        "batch": number,
        "seconds": seconds,
        "loss": outcome.loss,
        "computed_tokens": outcome.computed_tokens,
        "overhead_seconds": outcome.seconds - outcome.gradient_seconds,
        "fma_peak": mean_peak(before, probed_peak()),
    }


def probed_peak() -> float | None:
    """Flops a second in registers, the median of three probes of 3 ms; None where the native kernels are not in use."""
    from luthier.errors import ConfigError
    from luthier.kernels.probe import fma_peak

    try:
        return sorted(fma_peak() for _ in range(3))[1]
    except ConfigError:
        return None


def mean_peak(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else (before + after) / 2


def held_out_loss(work: Path, side: Side) -> float:
    """Loss after training on the rows that were kept back, measured with fused blocks whichever way the training went."""
    from luthier.data import Dataset
    from luthier.evaluation.evaluate import evaluate

    prepared = side.job.prepared
    (batch,) = read_batches(work / f"{HELD_OUT}.json")
    found = evaluate(
        prepared.model, prepared.tokenizer, Dataset(examples_of(batch)), side.job.data.renderer,
        metrics=("loss",), max_new_tokens=1,
    )  # fmt: skip
    return found.metrics["loss"]


def attention_seconds(shape: dict[str, int], batch: list[Any]) -> float:
    """Seconds of attention alone, forward and backward in every layer, over the rows of a batch: the least of two tries."""
    import torch

    from luthier.kernels.attention import packed_attention

    lengths = [len(example.ids) for example in batch]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    size = shape["head_size"]
    q, k, v = (
        torch.randn(sum(lengths), heads, size, requires_grad=True)
        for heads in (shape["heads"], shape["key_heads"], shape["key_heads"])
    )
    upstream = torch.randn_like(q)
    tries = []
    for _ in range(3):
        started = time.perf_counter()
        packed_attention(q, k, v, starts, size**-0.5).backward(upstream)
        tries.append(time.perf_counter() - started)
    return shape["layers"] * min(tries[1:])
