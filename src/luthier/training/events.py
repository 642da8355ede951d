"""What a run tells about itself while it goes on. The display overrides these methods; the rest of the code only calls them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.training.result import RunResult

Record = dict[str, Any]
# Keys of a step's or an evaluation's record that are not figures of the model.
NOT_METRICS = frozenset(
    {"kind", "step", "epoch", "rows", "seconds", "tokens", "computed_tokens", "supervised_tokens", "tokens_per_second"}
)


class Listener:
    """Every method does nothing. Methods are called from the thread that trains and must return soon."""

    def stage(self, name: str, done: int, total: int) -> None:
        """A stage such as loading or evaluating has done `done` of `total`; total 0 where it is not known."""

    def note(self, text: str) -> None:
        """One sentence that the person should read."""

    def start(self, info: Record) -> None:
        """Training begins. Keys: run_dir, model, method, total_steps, first_step, trainable_parameters, total_parameters,
        rows, eval_rows, batch_size, learning_rate, config."""

    def step(self, record: Record) -> None:
        """One optimiser step is done; `record` is also a line of metrics.jsonl.

        Keys: kind ("step"), step, epoch (rows seen / rows), loss (mean over the step's supervised tokens), loss_smooth,
        learning_rate, grad_norm (before clipping; None where it was not finite and the step was skipped), tokens,
        supervised_tokens, seconds (of this step), tokens_per_second, rss_bytes, skipped (steps skipped so far).
        """

    def evaluated(self, record: Record) -> None:
        """An evaluation is done; a line of metrics.jsonl with kind "eval", step, rows, seconds and its metrics."""

    def saved(self, path: Path) -> None:
        """A checkpoint is whole on disk."""

    def finish(self, result: RunResult) -> None:
        """The run is over and its directory complete."""
