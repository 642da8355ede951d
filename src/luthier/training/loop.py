"""The training loop, and the one step it repeats."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from luthier.data import Example
from luthier.data.packing import Pack, pack_examples
from luthier.errors import Interrupted, NumericError
from luthier.evaluation.loss import supervised_loss
from luthier.models.packed import shares_prefixes
from luthier.training.checkpoint import prune, save_checkpoint
from luthier.training.evaluations import Evaluations
from luthier.training.events import Listener, Record
from luthier.training.frozen_cache import FrozenCache, open_frozen_cache
from luthier.training.interrupts import Interrupts, StopRequested
from luthier.training.memory import peak_rss_bytes, rss_bytes
from luthier.training.optimizer import Optimizer
from luthier.training.order import Order, derived_seed
from luthier.training.prepare import RunData, RunModel, set_training_mode
from luthier.training.rundir import FROZEN, RunDir
from luthier.training.schedule import is_due, total_examples
from luthier.training.state import Identity, TrainState

MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Job:
    """Everything a run in progress works with. `state` is the only part that the loop replaces as it goes.

    frozen: what goes into the lowest trained layer, where the run keeps that.
    """

    run: RunDir
    prepared: RunModel
    data: RunData
    identity: Identity
    optimizer: Optimizer
    evaluations: Evaluations
    listener: Listener
    interrupts: Interrupts
    state: TrainState = field(default_factory=TrainState)
    saved_step: int | None = None
    frozen: FrozenCache | None = None

    @property
    def total_steps(self) -> int:
        return self.prepared.schedule.total_steps

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether tokens that rows of a batch begin with in common are computed once, and ends without a target not at all."""
        return shares_prefixes(self.prepared.model)


@dataclass(frozen=True)
class StepOutcome:
    """What one step did. loss: mean over its supervised tokens. grad_norm: before clipping; not finite if it was skipped.
    tokens: of the batch's rows; computed_tokens: those the model saw: a beginning that rows share once, and nothing behind
    the last token that predicts a target. gradient_seconds: of `seconds`, those in forward and backward passes."""

    loss: float
    grad_norm: float
    learning_rate: float
    examples: int
    tokens: int
    computed_tokens: int
    supervised_tokens: int
    seconds: float
    gradient_seconds: float

    @property
    def applied(self) -> bool:
        return math.isfinite(self.grad_norm)


def train_loop(job: Job) -> None:
    """Train from the step in `job.state` to the last one.

    Stages of a step: draw the examples, compute gradients and apply them, record, save, evaluate. Evaluation comes
    last because it may be cut short and made up for after resuming. Raises NumericError where numbers are not finite,
    Interrupted, with everything saved, where a signal asked for it.
    """
    set_training_mode(job.prepared.model)
    order = Order(job.prepared.config.seed, len(job.data.train.examples))
    _save_if(job, job.state.step == 0)
    _keep_frozen(job)
    _evaluate_if_due(job)
    while job.state.step < job.total_steps:
        batch = _draw(job, order)
        outcome = train_step(job, batch)
        _record(job, outcome)
        _stop_if_stuck(job, outcome)
        asked_to_stop = job.interrupts.requested is not None
        _save_if(job, asked_to_stop or is_due(job.state.step, job.total_steps, job.prepared.config.save_every or 1))
        if asked_to_stop:
            raise _interrupted(job)
        _evaluate_if_due(job)


def _keep_frozen(job: Job) -> None:
    """Compute what goes into the lowest trained layer for every row, if that was asked for and steps are left."""
    prepared = job.prepared
    config = prepared.config
    if not config.cache_frozen or job.state.step >= job.total_steps:
        return

    def progress(stage: str, done: int, total: int) -> None:
        job.interrupts.check()
        job.listener.stage(stage, done, total)

    assert config.micro_batch_tokens is not None  # the plan has filled it in
    try:
        job.frozen = open_frozen_cache(
            job.run.path / FROZEN, prepared.model, job.data.train.examples,
            layer=prepared.frozen_layers, base=prepared.fingerprint, max_tokens=config.micro_batch_tokens,
            share=job.shares_prefixes, progress=progress, note=job.listener.note,
        )  # fmt: skip
    except StopRequested:
        raise _interrupted(job) from None


def _draw(job: Job, order: Order) -> list[Example]:
    """The next batch_size examples of the stream, fewer in the last step of a run measured in epochs."""
    config, start = job.prepared.config, job.state.examples
    stop = min(start + config.batch_size, total_examples(config, order.rows))
    return [job.data.train.examples[row] for row in order.row_numbers(start, stop)]


def train_step(job: Job, batch: Sequence[Example]) -> StepOutcome:
    """One optimiser step: loss = (sum of cross entropy over all supervised tokens of the batch) / (their number).

    The batch goes through the model in packs of at most micro_batch_tokens tokens whose gradients add up; how it is
    cut, and what its rows share in a pack, does not change the loss. Gradients that are not finite are not applied.
    Raises NumericError at a loss that is not.
    """
    started = time.perf_counter()
    step = job.state.step + 1
    config, optimizer = job.prepared.config, job.optimizer
    torch.default_generator.manual_seed(derived_seed("step", config.seed, step))
    assert config.micro_batch_tokens is not None  # the plan has filled it in
    packs = pack_examples(batch, max_tokens=config.micro_batch_tokens, share=job.shares_prefixes)
    supervised_tokens = sum(pack.supervised_tokens for pack in packs)
    optimizer.zero_grad()
    begun = time.perf_counter()
    loss = sum(_add_gradients(job, pack, batch, supervised_tokens) for pack in packs)
    gradient_seconds = time.perf_counter() - begun
    grad_norm = optimizer.clip()
    learning_rate = job.prepared.schedule.learning_rate(step)
    if math.isfinite(grad_norm):
        optimizer.step(learning_rate)
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    tokens, computed = sum(len(example.ids) for example in batch), sum(pack.tokens for pack in packs)
    return StepOutcome(
        loss, grad_norm, learning_rate, len(batch), tokens, computed, supervised_tokens, seconds, gradient_seconds
    )


def _add_gradients(job: Job, pack: Pack, batch: Sequence[Example], supervised_tokens: int) -> float:
    """Backward through one pack's share of the step's loss; returns that share."""
    entry = None if job.frozen is None else job.frozen.entry(pack, batch)
    share = supervised_loss(job.prepared.model, pack, entry) / max(1, supervised_tokens)
    value = float(share.detach())
    if not math.isfinite(value):
        raise _loss_error(job, value, _guilty_rows(job, [batch[row] for row in pack.rows]))
    share.backward()
    return value


def _record(job: Job, outcome: StepOutcome) -> None:
    """Bring `state` up to date and write the step's line of metrics.jsonl."""
    state = job.state
    state.step += 1
    state.examples += outcome.examples
    state.tokens += outcome.tokens
    state.computed_tokens += outcome.computed_tokens
    state.supervised_tokens += outcome.supervised_tokens
    state.seconds += outcome.seconds
    state.skipped += not outcome.applied
    state.skipped_in_a_row = 0 if outcome.applied else state.skipped_in_a_row + 1
    record: Record = {
        "kind": "step",
        "step": state.step,
        "epoch": round(state.examples / len(job.data.train.examples), 6),
        "loss": outcome.loss,
        "loss_smooth": state.add_loss(outcome.loss),
        "learning_rate": outcome.learning_rate,
        "grad_norm": outcome.grad_norm if outcome.applied else None,
        "tokens": outcome.tokens,
        "computed_tokens": outcome.computed_tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens / outcome.seconds,
        "rss_bytes": rss_bytes(),
        "skipped": state.skipped,
    }
    job.run.append_metrics(record)
    job.listener.step(record)
    if not outcome.applied:
        job.listener.note(f"step {state.step}: the gradient is not finite; the step is skipped ({state.skipped} so far).")


def _save_if(job: Job, due: bool) -> None:
    """Write a checkpoint of the present step if it is due and not there yet, then delete the oldest ones."""
    state = job.state
    if not due or job.saved_step == state.step:
        return
    state.peak_rss_bytes = max(state.peak_rss_bytes, peak_rss_bytes())
    weights = {name: parameter.detach() for name, parameter in job.prepared.trainable}
    _check_weights_finite(job, weights)
    job.run.sync_metrics()
    path = save_checkpoint(job.run.checkpoints, weights, job.optimizer.state(), state, job.identity)
    job.saved_step = state.step
    prune(job.run.checkpoints, job.prepared.config.keep_checkpoints, state.step)
    job.listener.saved(path)


def _check_weights_finite(job: Job, weights: dict[str, Tensor]) -> None:
    """Raise NumericError rather than save a weight that a finite gradient has moved to Inf."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericError(
                f"weights must be finite numbers; {name} is not after step {job.state.step}. Nothing of it was saved; "
                f"{_last_good(job)} Try a lower learning rate than {job.prepared.schedule.peak:g} (--lr)."
            )


def _evaluate_if_due(job: Job) -> None:
    """Evaluate before the first step, every eval_every steps, and after the last, unless that was done before a resume."""
    try:
        job.evaluations.evaluate_if_due(job.state.step, job.total_steps)
    except StopRequested:
        _save_if(job, True)
        raise _interrupted(job) from None


def _interrupted(job: Job) -> Interrupted:
    return Interrupted(
        f"stopped after step {job.state.step} of {job.total_steps}; everything is saved. "
        f"Go on with `luthier resume {job.run.path}`."
    )


@torch.no_grad()
def _guilty_rows(job: Job, examples: list[Example]) -> list[str]:
    """Where the rows stand whose own loss is not finite; all, if each alone is."""
    found = []
    for example in examples:
        (pack,) = pack_examples([example], max_tokens=len(example.ids))
        if not math.isfinite(supervised_loss(job.prepared.model, pack).item()):
            found.append(example.where)
    return found or [example.where for example in examples]


def _loss_error(job: Job, value: float, rows: list[str]) -> NumericError:
    listed = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    return NumericError(
        f"the loss must be a finite number; it was {value} at step {job.state.step + 1}, in {listed}. "
        f"The step was not applied; {_last_good(job)} Try a lower learning rate than {job.prepared.schedule.peak:g} (--lr)."
    )


def _stop_if_stuck(job: Job, outcome: StepOutcome) -> None:
    if job.state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    raise NumericError(
        f"gradients must be finite numbers; they were not in {job.state.skipped_in_a_row} steps in a row, the last being step "
        f"{job.state.step}. None of them was applied; {_last_good(job)} Try a lower learning rate than "
        f"{job.prepared.schedule.peak:g} (--lr)."
    )


def _last_good(job: Job) -> str:
    return f"the last good checkpoint is {job.run.checkpoints / f'step-{job.saved_step}'}."
