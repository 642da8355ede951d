"""Loss, perplexity and exact match of a model on rows it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Dataset, Example, Renderer
from luthier.data.packing import pack_examples
from luthier.errors import ConfigError, DataError, NumericError, bulleted, nearest
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.loss import supervised_loss
from luthier.evaluation.stops import position_limit
from luthier.models.modes import evaluation_mode
from luthier.progress import Progress

METRICS = ("loss", "exact")
PACK_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """What a row asks, what it expects and what the model gave; exact: equal once white space around both is left out."""

    prompt: str
    expected: str
    got: str
    exact: bool


@dataclass
class EvalResult:
    """metrics: loss, perplexity and tokens (the supervised tokens they are over), exact_match (a share, 0 to 1), as asked for.

    rows: how many rows were evaluated. answers: of the rows that expect one, in their order. notes: what was left out.
    """

    metrics: dict[str, float]
    rows: int
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    renderer: Renderer,
    *,
    metrics: Sequence[str] = METRICS,
    max_new_tokens: int,
    rows: int | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure a model on the first `rows` rows of a data set, or all.

    "loss" gives loss = mean of -log p over all supervised tokens, perplexity = e^loss, and tokens, their number.
    "exact" answers each prompt greedily with at most `max_new_tokens` tokens and gives exact_match, the share of answers
    equal to the expected one; rows of plain text expect none and are left out of it, which is noted.
    The model's modes and the random number generators are left as they were found.
    Raises ConfigError for an unknown metric, DataError if no row can be measured or a row has a position or a token that
    the model has not, NumericError for a loss that is not finite.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        hint = nearest(unknown[0], METRICS) if unknown else ""
        raise ConfigError(f"metrics are {' and '.join(METRICS)}; got {', '.join(map(repr, metrics)) or 'none'}.{hint}")
    examples = dataset.examples[:rows]
    if not examples:
        raise DataError("an evaluation needs at least one row; there is none.")
    _check_rows(model, examples)
    result = EvalResult({}, len(examples))
    if "loss" in metrics:
        result.metrics |= _loss(model, examples, progress)
    if "exact" in metrics:
        result.answers = _answers(model, tokenizer, renderer, examples, max_new_tokens, progress)
        if result.answers:
            result.metrics["exact_match"] = sum(answer.exact for answer in result.answers) / len(result.answers)
        elif "loss" not in metrics:
            raise DataError("exact match needs rows with an answer; all rows are plain text. Use --metrics loss.")
        result.notes += _notes(tokenizer, result, max_new_tokens)
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


def _notes(tokenizer: PreTrainedTokenizerBase, result: EvalResult, max_new_tokens: int) -> list[str]:
    """What a share of exact answers does not tell by itself."""
    notes = []
    without = result.rows - len(result.answers)
    if without:
        notes.append(f"exact match leaves out {without} rows of plain text, which expect no answer")
    expected = [answer.expected.strip() for answer in result.answers]
    long = sum(len(ids) > max_new_tokens for ids in tokenizer(expected, add_special_tokens=False).input_ids) if expected else 0
    if long:
        notes.append(
            f"{long} of {len(expected)} expected answers are longer than {max_new_tokens} tokens and count as wrong; "
            "raise --max-new-tokens"
        )
    return notes


def _loss(model: PreTrainedModel, examples: list[Example], progress: Progress | None) -> dict[str, float]:
    total, tokens, done = 0.0, 0, 0
    with torch.no_grad(), evaluation_mode(model):
        for pack in pack_examples(examples, max_tokens=PACK_TOKENS):
            total += supervised_loss(model, pack).item()
            tokens += pack.supervised_tokens
            done += len(pack.rows)
            if progress is not None:
                progress("measuring the loss", done, len(examples))
    if tokens == 0:
        raise DataError("a loss needs supervised tokens; no row has any. Check the mask with `luthier data check`.")
    loss = total / tokens
    if not math.isfinite(loss):
        raise NumericError(f"the loss must be finite; it is {loss} over {tokens} tokens. The model's weights are damaged.")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    examples: list[Example],
    max_new_tokens: int,
    progress: Progress | None,
) -> list[Answer]:
    asked = [(example, example.completion) for example in examples if example.completion is not None]
    prompts = [example.prompt_ids for example, _ in asked]
    if not asked:
        return []
    texts = generate_batch(model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress, renderer=renderer)
    return [
        Answer(example.prompt, expected, got, got.strip() == expected.strip())
        for (example, expected), got in zip(asked, texts, strict=True)
    ]
