"""What a model does on rows it was not trained on: loss, answers beside those expected, and choices by likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Dataset, Example, Renderer
from luthier.errors import DataError, NumericError, bulleted
from luthier.evaluation import text_metrics
from luthier.evaluation.judging import Subject, add_answers, add_choices, add_labels, add_loss, check_rows
from luthier.evaluation.measures import WRITTEN, check_metrics
from luthier.evaluation.result import EvalResult
from luthier.evaluation.scores import score_examples
from luthier.evaluation.sets import Extras
from luthier.generation.generator import position_limit
from luthier.progress import Progress

DEFAULT_METRICS = ("loss", "exact")


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
    examples = dataset.examples[:rows]
    check_rows(examples, wanted)
    check_fit(model, examples)
    subject = Subject(model, tokenizer, renderer, examples, extras or Extras(), progress)
    result = EvalResult({}, len(examples))
    if "loss" in wanted:
        add_loss(result, subject)
    written = [name for name in wanted if name in WRITTEN]
    if written:
        if "loss" not in wanted:
            _check_finite(model, examples[0])
        add_answers(result, subject, written, max_new_tokens)
    if "label" in wanted:
        add_labels(result, subject)
    if "choice" in wanted:
        add_choices(result, subject)
    return result


def check_fit(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raise DataError naming the rows whose positions or tokens do not exist in the model."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
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
