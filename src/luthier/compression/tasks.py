"""Rows with answers that models are asked for beside the text: the loss of the answers, and whether they are given.

Few rows, so that a run stays short: intervals say what they can show and what they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.compression.reading import rows_for_task
from luthier.data import Dataset, Example, Renderer
from luthier.errors import DataError
from luthier.evaluation.bootstrap import Interval, resample
from luthier.evaluation.choice import Choice
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.labels import labels_of_rows
from luthier.evaluation.result import EvalResult
from luthier.evaluation.scores import answer_tokens
from luthier.evaluation.sets import Extras
from luthier.progress import Progress

TASK_ROWS, TASK_NEW_TOKENS = 64, 48
# More different answers than this are not scored one by one for every row.
MOST_LABELS = 32


@dataclass(frozen=True, eq=False)
class Task:
    """examples: rows with an answer, whole; metric: "choice" where rows have choices, "label" where few answers repeat, else
    "exact"."""

    renderer: Renderer
    examples: list[Example]
    metric: str
    choices: list[Choice] | None = None

    @property
    def note(self) -> str:
        """How it is measured."""
        how = {
            "choice": "each option is scored as the answer, and the likeliest is the model's",
            "label": "each answer that occurs in them is scored, and the likeliest is the model's",
            "exact": f"answers are written greedily, {TASK_NEW_TOKENS} tokens at most, and must be the expected one",
        }[self.metric]
        return f"Task figures are of {len(self.examples)} rows: the loss of the answers' tokens alone; {how}."


def task_of(
    path: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, window: int, *, offline: bool
) -> tuple[Task | None, list[Example]]:
    """The task in the first TASK_ROWS of `rows` that have an answer and fit `window`, and these rows; None where none has.

    path: the file they come from.
    """
    asked = [row for row in rows if row.completion is not None and len(row.ids) < window][:TASK_ROWS]
    if not asked:
        return None, []
    wanted = {row.where for row in asked}
    renderer, found = rows_for_task(path, tokenizer, window=window, wanted=wanted, offline=offline)
    if not found:
        return None, asked
    examples, choices = [example for example, _ in found], [choice for _, choice in found if choice is not None]
    metric = "choice" if choices else _metric(examples)
    return Task(renderer, examples, metric, choices or None), asked


def measure_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, progress: Progress | None = None
) -> EvalResult:
    """The loss of the answers, and the share of rows whose answer is right. Raises what `evaluate` raises."""
    return evaluate(
        model,
        tokenizer,
        Dataset(task.examples),
        task.renderer,
        metrics=("loss", task.metric),
        max_new_tokens=TASK_NEW_TOKENS,
        extras=Extras(choices=task.choices),
        progress=progress,
    )


def task_intervals(found: EvalResult) -> dict[str, Interval]:
    """The 95 % interval of each figure."""
    return {name: one.interval() for name, one in resample(found.figures).items()}


def task_differences(own: EvalResult, other: EvalResult) -> dict[str, tuple[float, Interval]]:
    """own - other of each figure, paired row by row, with its 95 % interval."""
    ours, theirs = resample(own.figures), resample(other.figures)
    apart = {name: one.minus(theirs[name]) for name, one in ours.items()}
    return {name: (one.value, one.interval()) for name, one in apart.items()}


def _metric(examples: Sequence[Example]) -> str:
    try:
        labels = labels_of_rows(examples)
    except DataError:  # free text
        return "exact"
    endings = dict(zip(labels.names, labels.endings, strict=True))
    # A label is scored after every prompt, so that it must be the same tokens after each.
    same = all(answer_tokens(example) == endings[(example.completion or "").strip()] for example in examples)
    return "label" if same and len(endings) <= min(MOST_LABELS, len(examples) / 2) else "exact"
