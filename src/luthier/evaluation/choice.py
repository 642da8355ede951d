"""Multiple choice by likelihood: the option that the model finds likeliest as the answer is its choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from luthier.data import Example, Renderer
from luthier.data.forms import RowError
from luthier.evaluation.bootstrap import Array
from luthier.evaluation.scores import answer_tokens, score_answers
from luthier.progress import Progress

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_OPTIONS = len(LETTERS)
_ANSWERED = frozenset({"completion", "output", "messages", "conversations", "text"})


@dataclass(frozen=True)
class Choice:
    """The options of one row and which is right. endings: for each, the tokens of that answer with its end of turn."""

    options: list[str]
    endings: list[list[int]]
    right: int

    def longest_answer(self, example: Example) -> int:
        """Tokens of the row's prompt with the longest option behind it."""
        return len(example.prompt_ids) + max(map(len, self.endings))


@dataclass(frozen=True)
class Chosen:
    """What a model chose, as an index of the options: by the likelihood of the whole answer, and by its mean a token.

    margins: (N,) log-likelihood a token of the right option less that of the best other.
    """

    whole: list[int]
    per_token: list[int]
    margins: Array


def is_choice_row(value: Any) -> bool:
    """Whether a row asks for one of several options, and is of no form that training takes."""
    return isinstance(value, dict) and value.get("choices") is not None and not _ANSWERED & value.keys()


def render_choice(row: Mapping[str, Any], where: str, renderer: Renderer) -> tuple[Example, Choice]:
    """A row as an example that expects the right option, and its options as answers.

    Forms: {"prompt" or "question": text, "choices": [texts], "answer": index from 0, an option's text, or its letter}; and
    {"question": text, "choices": {"text": [texts], "label": [names]}, "answerKey": name}, as in ARC. "system" may stand beside.
    Raises RowError for a row of another form, DataError if it cannot be rendered.
    """
    prompt, options, right = parse_choice(row)
    asked = {"prompt": prompt} | ({"system": row["system"]} if row.get("system") else {})
    examples = [renderer.render({**asked, "completion": option}, where) for option in options]
    if any(example.prompt_ids != examples[0].prompt_ids for example in examples):
        raise RowError("the prompt must have the same tokens whatever option follows; this tokenizer gives it different ones.")
    endings = [answer_tokens(example) for example in examples]
    return examples[right], Choice(options, endings, right)


def parse_choice(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """(prompt, options, index of the right one). Raises RowError that says which rule was broken."""
    prompt = row.get("prompt", row.get("question"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError("a row with choices needs a prompt or a question that is text.")
    choices: Any = row["choices"]
    names, answer = None, row.get("answer")
    if isinstance(choices, dict):
        choices, names, answer = choices.get("text"), choices.get("label"), row.get("answerKey", answer)
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise RowError("choices must be a list of texts that are not empty.")
    if not 2 <= len(choices) <= MOST_OPTIONS or len(set(choices)) < len(choices):
        raise RowError(f"choices must be 2 to {MOST_OPTIONS} different texts; got {len(choices)}.")
    return prompt, choices, _right(answer, choices, names)


def choose(
    model: PreTrainedModel,
    examples: Sequence[Example],
    choices: Sequence[Choice],
    *,
    progress: Progress | None = None,
) -> Chosen:
    """Score every option of every row as the answer, its end of turn included, and take the likeliest.

    whole: the largest sum of log p over the option's tokens. per_token: the largest mean, which does not favour options of
    few tokens. Raises as `score_answers` does.
    """
    scores = score_answers(
        model,
        [example.prompt_ids for example in examples],
        [choice.endings for choice in choices],
        [example.where for example in examples],
        progress=progress,
        stage="scoring the options",
    )
    means = [row / np.asarray([len(e) for e in choice.endings]) for row, choice in zip(scores, choices, strict=True)]
    margins = [mean[choice.right] - np.delete(mean, choice.right).max() for mean, choice in zip(means, choices, strict=True)]
    whole, per_token = [int(row.argmax()) for row in scores], [int(mean.argmax()) for mean in means]
    return Chosen(whole, per_token, np.asarray(margins, dtype=np.float64))


def _right(answer: Any, options: list[str], names: Any) -> int:
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        raise RowError("a row with choices needs an answer: the index of the right one from 0, its text, or its letter.")
    if isinstance(answer, int):
        if not 0 <= answer < len(options):
            raise RowError(f"the answer must be an index from 0 to {len(options) - 1}, or the text of a choice; got {answer}.")
        return answer
    known = names if isinstance(names, list) and len(names) == len(options) else list(LETTERS[: len(options)])
    for list_of in (options, known):
        if answer in list_of:
            return list_of.index(answer)
    raise RowError(f"the answer must be an index from 0, the text of a choice, or its letter; got {answer[:80]!r}.")
