"""What a model does on rows it was not trained on: loss, answers beside those expected, and choices by likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Dataset, Example, Renderer
from luthier.errors import DataError, NumericError, bulleted
from luthier.evaluation import text_metrics
from luthier.evaluation.answers import Answer, mark_answers
from luthier.evaluation.bootstrap import Array, Figure, mean_of, ratio
from luthier.evaluation.choice import Choice, choose
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.json_match import FieldCount
from luthier.evaluation.labels import choose_labels, labels_of_rows
from luthier.evaluation.measures import WRITTEN, check_metrics
from luthier.evaluation.pieces import text_of
from luthier.evaluation.scores import score_examples, supervised_count
from luthier.evaluation.sets import Extras
from luthier.generation import Constraint
from luthier.generation.generator import position_limit
from luthier.generation.schema import SchemaConstraint
from luthier.progress import Progress

DEFAULT_METRICS = ("loss", "exact")
LARGEST_EXPONENT = 700.0
# Of a row of plain text, for people to read.
SHOWN_TOKENS = 256
_WRITTEN_TITLES = {"exact": "exact match", "json": "JSON match", "bleu": "BLEU", "chrf": "chrF", "rouge": "ROUGE"}


@dataclass(frozen=True, eq=False)
class Judged:
    """What a metric says of each row it could judge. rows: their places among the rows evaluated.

    scores: (N,), higher is better; perfect: the best score there is, None where there is none. got: "" where nothing is given.
    """

    metric: str
    rows: list[int]
    scores: Array
    perfect: float | None
    prompt: list[str]
    expected: list[str]
    got: list[str]
    where: list[str]


@dataclass
class EvalResult:
    """metrics: the figures and counts asked for, by the names in `measures.GIVES`; shares are 0 to 1.

    rows: how many rows were evaluated. answers: of the rows that expect one, in their order. notes: what was left out.
    figures: what intervals are made from. judged: what each metric says of each row. fields: of JSON answers, by their path.
    """

    metrics: dict[str, float]
    rows: int
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list, compare=False, repr=False)
    judged: list[Judged] = field(default_factory=list, compare=False, repr=False)
    fields: dict[str, FieldCount] = field(default_factory=dict)

    def add(self, figures: Sequence[Figure], judged: Judged) -> None:
        self.metrics |= {figure.name: figure.value for figure in figures}
        self.figures += figures
        self.judged.append(judged)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    renderer: Renderer,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    max_new_tokens: int,
    rows: int | None = None,
    extras: Extras | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure a model on the first `rows` rows of a data set, or all.

    "loss" gives loss = mean of -log p over all supervised tokens, perplexity = e^loss, and tokens, their number.
    "exact", "json", "bleu", "chrf" and "rouge" answer each prompt greedily with at most `max_new_tokens` tokens and compare
    the answer with the expected one, the last three with the row's references where extras has them; a schema of extras
    leaves only answers that it allows. Rows of plain text expect none and are left out, which is noted. "label" scores every
    label as the answer, those of extras or else the rows' own; "choice" scores the options of extras.
    The model's modes and the random number generators are left as they were found.
    Raises ConfigError for an unknown metric, a missing library and a schema that cannot be followed; DataError if no row can
    be measured or a row has a position or a token that the model has not; NumericError for logits that are not finite.
    """
    wanted = check_metrics(metrics)
    text_metrics.require(wanted)
    extras = extras or Extras()
    examples = dataset.examples[:rows]
    if not examples:
        raise DataError("an evaluation needs at least one row; there is none.")
    _check_rows(model, examples)
    result = EvalResult({}, len(examples))
    if "loss" in wanted:
        _add_loss(result, model, tokenizer, examples, progress)
    written = [name for name in wanted if name in WRITTEN]
    if written:
        if "loss" not in wanted:
            _check_finite(model, examples[0])
        constraint = None if extras.schema is None else SchemaConstraint(tokenizer, extras.schema)
        prepared = _answers(model, tokenizer, renderer, examples, max_new_tokens, constraint, progress)
        _add_answers(result, examples, prepared, written, extras.references, alone=len(written) == len(wanted))
        result.notes += _notes(tokenizer, result, max_new_tokens, written)
    if "label" in wanted:
        _add_labels(result, model, examples, extras, progress)
    if "choice" in wanted:
        _add_choices(result, model, examples, extras.choices, progress)
    return result


def _check_rows(model: PreTrainedModel, examples: list[Example]) -> None:
    """Raise DataError naming the rows whose positions or tokens do not exist in the model."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    limit = position_limit(model) or math.inf
    problems = []
    for example in examples:
        length, largest = max(len(example.ids), len(example.prompt_ids)), max(*example.ids, *example.prompt_ids, 0)
        if length > limit:
            problems.append(f"{example.where} has {length} tokens")
        if largest >= vocabulary:
            problems.append(f"{example.where} has token {largest}")
    if problems:
        positions = "" if limit == math.inf else f" {limit} positions and"
        raise DataError(
            f"rows must fit the model's{positions} vocabulary of {vocabulary}; these do not:\n{bulleted(problems)}\n"
            "Leave long rows out with --max-length and --on-long drop, and use the tokenizer that came with the model."
        )


def _check_finite(model: PreTrainedModel, example: Example) -> None:
    """Raise NumericError if the model gives NaN: the greedy token would be any, and every figure a matter of chance."""
    score = float(score_examples(model, [example])[0])
    if not math.isfinite(score):
        raise NumericError(
            f"logits must be finite; the log-likelihood of {example.where} is {score}. The model's weights are damaged."
        )


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


def _add_loss(
    result: EvalResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    progress: Progress | None,
) -> None:
    scores = score_examples(model, examples, progress=progress, stage="measuring the loss")
    tokens = np.asarray([supervised_count(example) for example in examples], dtype=np.float64)
    if not tokens.any():
        raise DataError("a loss needs supervised tokens; no row has any. Check the mask with `luthier data check`.")
    kept = np.flatnonzero(tokens)
    terms = np.stack([-scores, tokens], 1)[kept]
    loss = Figure("loss", terms, ratio)
    if not math.isfinite(loss.value):
        total = f"{tokens.sum():.0f} tokens"
        raise NumericError(f"the loss must be finite; it is {loss.value} over {total}. The model's weights are damaged.")
    figures = [loss, Figure("perplexity", terms, _perplexity)]
    rows = [examples[row] for row in kept]
    texts = (
        [example.prompt or text_of(tokenizer, example.ids[:SHOWN_TOKENS]) for example in rows],
        [example.completion or "" for example in rows],
        [""] * len(rows),
    )
    result.add(figures, Judged("loss", kept.tolist(), -ratio(terms), None, *texts, [example.where for example in rows]))
    result.metrics["tokens"] = int(tokens.sum())


def _perplexity(sums: Array) -> Array:
    return np.exp(np.minimum(ratio(sums), LARGEST_EXPONENT))


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    examples: list[Example],
    max_new_tokens: int,
    constraint: Constraint | None,
    progress: Progress | None,
) -> list[Answer]:
    asked = [(example, example.completion) for example in examples if example.completion is not None]
    prompts = [example.prompt_ids for example, _ in asked]
    if not asked:
        return []
    texts = generate_batch(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress, renderer=renderer, constraint=constraint
    )
    return [
        Answer(example.prompt, expected, got, got.strip() == expected.strip())
        for (example, expected), got in zip(asked, texts, strict=True)
    ]


def _add_answers(
    result: EvalResult,
    examples: list[Example],
    answers: list[Answer],
    metrics: list[str],
    references: Sequence[list[str]] | None,
    *,
    alone: bool,
) -> None:
    title = _WRITTEN_TITLES[metrics[0]]
    if not answers:
        if alone:
            raise DataError(f"{title} needs rows with an answer; all rows are plain text. Use --metrics loss.")
        return
    rows = [row for row, example in enumerate(examples) if example.completion is not None]
    where = [examples[row].where for row in rows]
    marks = mark_answers(answers, metrics, [references[row] for row in rows] if references is not None else None, where)
    result.answers, result.fields = answers, marks.fields
    texts = ([one.prompt for one in answers], [one.expected for one in answers], [one.got for one in answers])
    result.add(marks.figures, Judged(marks.scored_by, rows, marks.scores, 1.0, *texts, where))
    result.metrics |= marks.counts


def _add_labels(
    result: EvalResult, model: PreTrainedModel, examples: list[Example], extras: Extras, progress: Progress | None
) -> None:
    rows = [row for row, example in enumerate(examples) if example.completion is not None]
    if not rows:
        raise DataError("label accuracy needs rows that expect a label; all rows are plain text. Leave label out of --metrics.")
    if len(rows) < len(examples):
        result.notes.append(f"label accuracy leaves out {len(examples) - len(rows)} rows of plain text, which expect no label")
    asked = [examples[row] for row in rows]
    labels = extras.labels or labels_of_rows(asked)
    if extras.labels is None:
        result.notes.append(f"the labels are the {len(labels.names)} different answers of the rows; --labels FILE gives others")
    chosen, margins = choose_labels(model, asked, labels, progress=progress)
    expected = [(example.completion or "").strip() for example in asked]
    right = [float(one == other) for one, other in zip(chosen, expected, strict=True)]
    where = [example.where for example in asked]
    judged = Judged("label", rows, margins, None, [example.prompt for example in asked], expected, chosen, where)
    result.add([mean_of("label_accuracy", right)], judged)


def _add_choices(
    result: EvalResult,
    model: PreTrainedModel,
    examples: list[Example],
    choices: Sequence[Choice] | None,
    progress: Progress | None,
) -> None:
    if choices is None:
        raise DataError("multiple choice needs rows with choices; these have none. Leave choice out of --metrics.")
    choices = choices[: len(examples)]
    chosen = choose(model, examples, choices, progress=progress)
    right = [choice.right for choice in choices]
    figures = [
        mean_of("choice_accuracy", [float(one == other) for one, other in zip(chosen.whole, right, strict=True)]),
        mean_of("choice_accuracy_per_token", [float(one == other) for one, other in zip(chosen.per_token, right, strict=True)]),
    ]
    prompts, where = [example.prompt for example in examples], [example.where for example in examples]
    expected = [choice.options[choice.right] for choice in choices]
    got = [choice.options[picked] for choice, picked in zip(choices, chosen.per_token, strict=True)]
    result.add(figures, Judged("choice", list(range(len(examples))), chosen.margins, None, prompts, expected, got, where))
