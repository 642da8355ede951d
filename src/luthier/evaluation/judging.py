"""One metric after another on the rows: loss, written answers, labels and multiple choice, each added to the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Example, Renderer
from luthier.errors import DataError, NumericError
from luthier.evaluation.answers import Answer, mark_answers
from luthier.evaluation.bootstrap import Array, Figure, mean_of, ratio
from luthier.evaluation.choice import Choice, choose
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.labels import choose_labels, labels_of_rows
from luthier.evaluation.measures import WRITTEN
from luthier.evaluation.pieces import text_of
from luthier.evaluation.result import EvalResult, Judged
from luthier.evaluation.scores import score_examples, supervised_count
from luthier.evaluation.sets import Extras
from luthier.generation.schema import SchemaConstraint
from luthier.progress import Progress

LARGEST_EXPONENT = 700.0
# Of a row of plain text, for people to read.
SHOWN_TOKENS = 256
_WRITTEN_TITLES = {"exact": "exact match", "json": "JSON match", "bleu": "BLEU", "chrf": "chrF", "rouge": "ROUGE"}


@dataclass(frozen=True)
class Subject:
    """The model that is measured, the rows, and what these hold beside prompt and answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    examples: list[Example]
    extras: Extras
    progress: Progress | None


def check_rows(examples: Sequence[Example], metrics: Sequence[str]) -> None:
    """Raise DataError where there are no rows, or none that a metric can judge."""
    if not examples:
        raise DataError("an evaluation needs at least one row; there is none.")
    if "loss" in metrics and not any(supervised_count(example) for example in examples):
        raise DataError("a loss needs supervised tokens; no row has any. Check the mask with `luthier data check`.")
    if _answering(examples):
        return
    if "label" in metrics:
        raise DataError("label accuracy needs rows that expect a label; all rows are plain text. Leave label out of --metrics.")
    if set(metrics) <= set(WRITTEN):
        title = _WRITTEN_TITLES[metrics[0]]
        raise DataError(f"{title} needs rows with an answer; all rows are plain text. Use --metrics loss.")


def add_loss(result: EvalResult, subject: Subject) -> None:
    """Loss and perplexity over all supervised tokens, of which there are some. Raises NumericError for a loss that is not
    finite."""
    examples = subject.examples
    scores = score_examples(subject.model, examples, progress=subject.progress, stage="measuring the loss")
    tokens = np.asarray([supervised_count(example) for example in examples], dtype=np.float64)
    kept = np.flatnonzero(tokens)
    terms = np.stack([-scores, tokens], 1)[kept]
    loss = Figure("loss", terms, ratio)
    if not math.isfinite(loss.value):
        total = f"{tokens.sum():.0f} tokens"
        raise NumericError(f"the loss must be finite; it is {loss.value} over {total}. The model's weights are damaged.")
    rows = [examples[row] for row in kept]
    prompts = [example.prompt or text_of(subject.tokenizer, example.ids[:SHOWN_TOKENS]) for example in rows]
    expected, got = [example.completion or "" for example in rows], [""] * len(rows)
    where = [example.where for example in rows]
    judged = Judged("loss", kept.tolist(), -ratio(terms), None, prompts, expected, got, where)
    result.add([loss, Figure("perplexity", terms, _perplexity)], judged)
    result.metrics["tokens"] = int(tokens.sum())


def add_answers(result: EvalResult, subject: Subject, metrics: list[str], max_new_tokens: int) -> None:
    """What `metrics` say of greedily written answers, by `mark_answers`; a note alone where no row expects one."""
    rows = _answering(subject.examples)
    if rows:
        answers = _write_answers(subject, rows, max_new_tokens)
        references, where = subject.extras.references, [subject.examples[row].where for row in rows]
        marks = mark_answers(answers, metrics, [references[row] for row in rows] if references is not None else None, where)
        result.answers, result.fields = answers, marks.fields
        texts = ([one.prompt for one in answers], [one.expected for one in answers], [one.got for one in answers])
        result.add(marks.figures, Judged(marks.scored_by, rows, marks.scores, 1.0, *texts, where))
        result.metrics |= marks.counts
    result.notes += _notes(subject.tokenizer, result, max_new_tokens, metrics)


def add_labels(result: EvalResult, subject: Subject) -> None:
    """Label accuracy: the likeliest of the labels of extras, or of the rows' own, of which some expect one."""
    rows = _answering(subject.examples)
    left_out = len(subject.examples) - len(rows)
    if left_out:
        result.notes.append(f"label accuracy leaves out {left_out} rows of plain text, which expect no label")
    asked = [subject.examples[row] for row in rows]
    labels = subject.extras.labels or labels_of_rows(asked)
    if subject.extras.labels is None:
        result.notes.append(f"the labels are the {len(labels.names)} different answers of the rows; --labels FILE gives others")
    chosen, margins = choose_labels(subject.model, asked, labels, progress=subject.progress)
    expected = [(example.completion or "").strip() for example in asked]
    prompts, where = [example.prompt for example in asked], [example.where for example in asked]
    judged = Judged("label", rows, margins, None, prompts, expected, chosen, where)
    result.add([mean_of("label_accuracy", _equal(chosen, expected))], judged)


def add_choices(result: EvalResult, subject: Subject) -> None:
    """Multiple choice among the options of extras. Raises DataError where there are none."""
    examples = subject.examples
    if subject.extras.choices is None:
        raise DataError("multiple choice needs rows with choices; these have none. Leave choice out of --metrics.")
    choices = subject.extras.choices[: len(examples)]
    chosen = choose(subject.model, examples, choices, progress=subject.progress)
    right = [choice.right for choice in choices]
    figures = [
        mean_of("choice_accuracy", _equal(chosen.whole, right)),
        mean_of("choice_accuracy_per_token", _equal(chosen.per_token, right)),
    ]
    prompts, where = [example.prompt for example in examples], [example.where for example in examples]
    expected, got = _options(choices, right), _options(choices, chosen.per_token)
    result.add(figures, Judged("choice", list(range(len(examples))), chosen.margins, None, prompts, expected, got, where))


def _answering(examples: Sequence[Example]) -> list[int]:
    """The rows that expect an answer; plain text expects none."""
    return [row for row, example in enumerate(examples) if example.completion is not None]


def _write_answers(subject: Subject, rows: Sequence[int], max_new_tokens: int) -> list[Answer]:
    asked = [subject.examples[row] for row in rows]
    schema = subject.extras.schema
    texts = generate_batch(
        subject.model, subject.tokenizer, [example.prompt_ids for example in asked], max_new_tokens=max_new_tokens,
        progress=subject.progress, renderer=subject.renderer,
        constraint=None if schema is None else SchemaConstraint(subject.tokenizer, schema),
    )  # fmt: skip
    expected = [example.completion or "" for example in asked]
    return [
        Answer(example.prompt, wanted, got, got.strip() == wanted.strip())
        for example, wanted, got in zip(asked, expected, texts, strict=True)
    ]


def _notes(tokenizer: PreTrainedTokenizerBase, result: EvalResult, max_new_tokens: int, metrics: Sequence[str]) -> list[str]:
    """What a comparison of written answers does not tell by itself."""
    notes = []
    without = result.rows - len(result.answers)
    if without:
        title = _WRITTEN_TITLES[metrics[0]]
        notes.append(f"{title} leaves out {without} rows of plain text, which expect no answer")
    expected = [answer.expected.strip() for answer in result.answers]
    long = sum(len(ids) > max_new_tokens for ids in tokenizer(expected, add_special_tokens=False).input_ids) if expected else 0
    if long:
        fate = "count as wrong" if {"exact", "json"} & set(metrics) else "cannot be given whole"
        notes.append(
            f"{long} of {len(expected)} expected answers are longer than {max_new_tokens} tokens and {fate}; "
            "raise --max-new-tokens"
        )
    invalid = result.metrics.get("json_invalid")
    if invalid:
        notes.append(f"{invalid:.0f} of {len(result.answers)} answers are not JSON, and match nothing")
    return notes


def _equal(chosen: Sequence[object], right: Sequence[object]) -> list[float]:
    return [float(one == other) for one, other in zip(chosen, right, strict=True)]


def _options(choices: Sequence[Choice], picked: Sequence[int]) -> list[str]:
    return [choice.options[place] for choice, place in zip(choices, picked, strict=True)]


def _perplexity(sums: Array) -> Array:
    return np.exp(np.minimum(ratio(sums), LARGEST_EXPONENT))
