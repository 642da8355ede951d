"""Rows that expect one of a few labels: each label is scored as the answer, and the likeliest is the model's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from luthier.data import Example, Renderer
from luthier.errors import ConfigError, DataError, bulleted
from luthier.evaluation.bootstrap import Array
from luthier.evaluation.scores import answer_tokens, score_answers
from luthier.progress import Progress

MOST_LABELS = 1000


@dataclass(frozen=True)
class Labels:
    """The labels a model may choose from. endings: for each name, the tokens of that answer with its end of turn.

    source: where they come from, for people to read.
    """

    names: list[str]
    endings: list[list[int]]
    source: str


def read_labels(path: str) -> list[str]:
    """The labels in a file: one a line, or a JSON list of texts; white space around them is left out.

    Raises ConfigError for a file that cannot be read, fewer than two labels, more than MOST_LABELS, and one that is empty
    or stands there twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--labels needs a file that can be read; {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--labels needs a file in UTF-8; {path} has another encoding at byte {error.start}.") from error
    names = _parse(text, path)
    if not 2 <= len(names) <= MOST_LABELS:
        raise ConfigError(f"--labels needs 2 to {MOST_LABELS} labels, one a line or a JSON list; {path} has {len(names)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = f"{twice[0]!r} stands there twice" if twice else "one is empty"
        raise ConfigError(f"labels must be different texts; in {path} {what}. Remove it.")
    return names


def labels_of_file(path: str, renderer: Renderer) -> Labels:
    """The labels in a file as answers of the renderer's model. Raises as `read_labels` does, and DataError from rendering."""
    names = read_labels(path)
    rendered = [renderer.render({"prompt": "question", "completion": name}, f"{path}: label {name!r}") for name in names]
    # A template may put words of its own into every answer; they then belong to the label as they do to the row.
    spoken = [(example.completion or name).strip() for example, name in zip(rendered, names, strict=True)]
    return Labels(spoken, [answer_tokens(example) for example in rendered], path)


def labels_of_rows(examples: Sequence[Example]) -> Labels:
    """The different answers of the rows, in their order of appearance, each with the longest ending that a row gives it.

    Raises DataError where the rows are not of that kind: fewer than two different answers, more than MOST_LABELS, or as many
    as rows, which is what free text looks like.
    """
    endings: dict[str, list[int]] = {}
    for example in examples:
        own = answer_tokens(example)
        # A row that was truncated may have lost the end of its answer.
        if example.completion is not None and len(own) > len(endings.get(example.completion.strip(), [])):
            endings[example.completion.strip()] = own
    rows = len(examples)
    if not 2 <= len(endings) <= MOST_LABELS or (len(endings) == rows and rows > 20):
        raise DataError(
            f"labels taken from the rows must be 2 to {MOST_LABELS} answers that repeat; {rows} rows have {len(endings)} "
            "different ones. Give the labels with --labels FILE, or leave label out of --metrics."
        )
    return Labels(list(endings), list(endings.values()), "the different answers of the rows")


def choose_labels(
    model: PreTrainedModel, examples: Sequence[Example], labels: Labels, *, progress: Progress | None = None
) -> tuple[list[str], Array]:
    """The likeliest label for each row, and for each row log p(expected) - log p(best other label), (N,).

    A label's likelihood is that of the whole answer, its end of turn included, so that one label may begin another. Among
    labels that the model can choose from, this is what decoding constrained to them finds.
    Raises DataError naming the rows that expect no label of these, or whose own tokens for it differ.
    """
    check_labels(examples, labels)
    where = [example.where for example in examples]
    prompts = [example.prompt_ids for example in examples]
    scores = score_answers(
        model, prompts, [labels.endings] * len(examples), where, progress=progress, stage="scoring the labels"
    )
    place = {name: number for number, name in enumerate(labels.names)}
    chosen, margins = [], []
    for example, row in zip(examples, scores, strict=True):
        expected = place[(example.completion or "").strip()]
        chosen.append(labels.names[int(row.argmax())])
        margins.append(row[expected] - np.delete(row, expected).max())
    return chosen, np.asarray(margins, dtype=np.float64)


def confusion(expected: Sequence[str], chosen: Sequence[str]) -> dict[tuple[str, str], int]:
    """How often each label was taken for each: (expected, chosen) -> rows, the most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for pair in zip(expected, chosen, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _parse(text: str, path: str) -> list[str]:
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--labels takes one label a line or a JSON list of texts; {path} is neither: {error}.") from error
    if not all(isinstance(item, str) for item in content):
        raise ConfigError(f"--labels takes a JSON list of texts; {path} holds something else than text.")
    return [item.strip() for item in content]


def check_labels(examples: Sequence[Example], labels: Labels) -> None:
    """Raise DataError naming the rows that expect no label of these, or whose own tokens for it differ."""
    endings = dict(zip(labels.names, labels.endings, strict=True))
    unknown, different = [], []
    for example in examples:
        expected = (example.completion or "").strip()
        own = answer_tokens(example)
        if expected not in endings:
            unknown.append(f"{example.where} expects {expected[:80]!r}")
        elif own != endings[expected][: len(own)]:
            different.append(example.where)
    if unknown:
        raise DataError(
            f"every row must expect one of the {len(labels.names)} labels of {labels.source}; {len(unknown)} do not:\n"
            f"{bulleted(unknown)}\nAdd these labels, or leave these rows out."
        )
    if different:
        raise DataError(
            "a label must have the same tokens after every prompt, so that it can be scored after each; white space around it, "
            f"or the tokenizer, makes them others in:\n{bulleted(different)}\nMend these rows, or use exact in place of label."
        )
