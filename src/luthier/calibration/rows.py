"""What a model is calibrated on: a person's rows, or windows of plain text, laid end to end in packs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from luthier.data import Example
from luthier.data.packing import Pack, pack_examples
from luthier.errors import DataError

# Of a text so many characters for each token are tried first. Where it is cut, the last tokens are others than in the whole
# text: so many are not used.
CHARACTERS_A_TOKEN, CUT_TOKENS = 6, 64


def row_packs(examples: Sequence[Example], *, tokens: int, max_tokens: int) -> list[Pack]:
    """Packs of whole rows, evenly spread over `examples`, of about `tokens` tokens in all, at most `max_tokens` in one.

    Without sharing of beginnings, so that every token of every row counts. A function of its arguments alone: the rows are
    those at i n / k for the k that their mean length asks for. Raises DataError where there are no rows.
    """
    if not examples:
        raise DataError("calibration needs rows; there are none. Give data with at least one row.")
    total = sum(len(example.ids) for example in examples)
    wanted = min(len(examples), max(1, round(tokens * len(examples) / total)))
    chosen = [examples[number * len(examples) // wanted] for number in range(wanted)]
    return pack_examples(chosen, max_tokens=max_tokens)


def text_packs(
    tokenizer: PreTrainedTokenizerBase, text: str, *, windows: int, length: int, max_tokens: int = 2048
) -> list[Pack]:
    """The first `windows` windows of `length` tokens of a text, each a segment of its own in packs of at most `max_tokens`.

    Every token but a window's first is supervised. A text that is shorter gives fewer windows, the last one cut.
    Raises DataError for a text of fewer than two tokens.
    """
    ids = torch.tensor(_first_tokens(tokenizer, text, windows * length), dtype=torch.int64)
    cut = [window for window in ids.split(length) if len(window) > 1]
    if not cut:
        raise DataError(f"calibration needs a text of at least two tokens; got {len(ids)}. Give a longer one.")
    a_pack = max(1, max_tokens // length)
    return [_text_pack(cut[first : first + a_pack]) for first in range(0, len(cut), a_pack)]


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """The first `count` tokens of a text, or all; as much of it is tokenised as CHARACTERS_A_TOKEN says, twice that where it
    gives too few, and so on. The whole text's tokens wherever a cut changes no more than CUT_TOKENS before it."""
    characters = CHARACTERS_A_TOKEN * (count + CUT_TOKENS)
    while True:
        ids = tokenizer.encode(text[:characters], add_special_tokens=False)
        if characters >= len(text) or len(ids) >= count + CUT_TOKENS:
            return ids[:count]
        characters *= 2


def _text_pack(windows: Sequence[torch.Tensor]) -> Pack:
    ids = torch.cat(list(windows))
    starts = torch.tensor([0, *(len(window) for window in windows)]).cumsum(0)
    ends = starts[1:] - 1
    predict = torch.ones(len(ids), dtype=torch.bool).index_fill(0, ends, False).nonzero()[:, 0]
    return Pack.of_texts(ids, starts, predict)
