"""One row as token ids with its mask, and a whole file of them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(r"\S+")


@dataclass
class Example:
    """A row ready to train on.

    ids: the tokens of the whole row. supervised: as long as ids; supervised[t] says that token t is a target,
    predicted from the tokens before it; the first token never is.
    prompt_ids: the tokens before the last assistant answer, generation prompt included; [] for plain text.
    prompt: the last user turn, for people to read. completion: the text the model should answer with; None for plain text.
    where: file and line. key: equal for two rows that ask the same, see `text_key`.
    """

    ids: list[int]
    supervised: list[bool]
    prompt_ids: list[int]
    prompt: str
    completion: str | None
    where: str
    key: str = ""


@dataclass
class Dataset:
    """The examples of one file, in its order, and the manifest that says where they came from and what was left out.

    manifest: path, sha256, form, rows, kept, dropped, truncated, tokens, supervised_tokens, longest, notes, cache.
    """

    examples: list[Example]
    manifest: dict[str, Any] = field(default_factory=dict)


def text_key(*texts: str) -> str:
    """A short hash of `texts` that ignores case and white space."""
    digest = hashlib.sha256()
    for text in texts:
        # Word by word: a list of the words of a very long text takes far more memory than the text.
        for word in _WORD.finditer(text.casefold()):
            digest.update(word[0].encode() + b" ")
        digest.update(b"\x1e")
    return digest.hexdigest()[:24]


def overlap(train: Dataset, held_out: Dataset) -> int:
    """How many rows of `held_out` ask what a row of `train` asks too, case and white space ignored.

    Rows of dialogue are compared by everything before the last answer, rows of plain text by the whole text.
    """
    known = {example.key for example in train.examples}
    return sum(example.key in known for example in held_out.examples)
