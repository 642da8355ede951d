"""Whether texts hold parts of other texts, as runs of tokens, whatever form either came in.

A text holds a part of another where RUN tokens in a row are the same; a text too short for that, where all of it is, but for
the tokens at its two ends, which templates and tokenizers change. What many texts of one file have in common is the file's form
and nobody's content: system prompts, instructions, templates. Runs of tokens that lie mostly in it do not count.
Every run is compared, at stride 1, by 64-bit hashes sum_j m(t_j) B^j, m a mixing of the token's number, all modulo 2^64: a
collision leaves a text out that could have stayed, and never lets one stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

RUN = 32
LEAST_RUN = 8
ENDS = 2
# What stands in one text of so many, and in so many texts at least, is form; found in runs of so many tokens.
FORM_SHARE, FORM_TEXTS, FORM_RUN = 8, 8, 8
BASE = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def holding_parts(texts: Sequence[Sequence[int]], held: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """(len(texts),): which of `texts` hold a part of any of `held`, or are one of them. Both are token ids."""
    laid, other = _Laid(texts), _Laid(held)
    whole = {tuple(text) for text in held}
    found = np.array([tuple(text) in whole for text in texts], dtype=bool)
    content = laid.content
    for length in sorted({_run_of(text) for text in (*texts, *held)} - {0}):
        ours, starts = laid.runs(length)
        theirs, places = other.runs(length)
        # Runs below RUN are only those of a text that has no longer ones.
        theirs_short = other.lengths[other.owner[places]] < length + ENDS + 1
        ours_short = laid.lengths[laid.owner[starts]] < length + ENDS + 1
        same = np.isin(ours, theirs if length == RUN else theirs[theirs_short])
        if length < RUN:
            same |= ours_short & np.isin(ours, theirs)
        found[laid.owner[starts[same & (content[starts + length] - content[starts] >= length / 2)]]] = True
    return found


def _run_of(text: Sequence[int]) -> int:
    """How many tokens of it must be the same; 0 where it is too short for any."""
    length = min(RUN, len(text) - ENDS)
    return length if length >= LEAST_RUN else 0


class _Laid:
    """Texts end to end. lengths: (texts,); owner: (tokens,), the text of each token."""

    def __init__(self, texts: Sequence[Sequence[int]]):
        self.lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(texts)), self.lengths)
        ids = np.concatenate([np.asarray(text, dtype=np.uint64) for text in texts] or [np.empty(0, np.uint64)])
        powers = np.cumprod(np.full(len(ids) + 1, BASE, np.uint64))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(ids) * powers[:-1], dtype=np.uint64)])
        self._inverse = np.cumprod(np.full(len(ids) + 1, pow(BASE, -1, 1 << 64), np.uint64))

    def runs(self, length: int) -> tuple[Hashes, Places]:
        """The hash of every run of so many tokens that lies in one text, and where it starts."""
        starts = np.arange(max(0, len(self.owner) - length + 1))
        starts = starts[self.owner[starts] == self.owner[starts + length - 1]]
        return (self._sums[starts + length] - self._sums[starts]) * self._inverse[starts], starts

    @cached_property
    def content(self) -> Places:
        """(tokens + 1,): how many tokens before each place are no form."""
        hashes, starts = self.runs(FORM_RUN)
        pairs = np.unique(np.stack([hashes, self.owner[starts].astype(np.uint64)], 1), axis=0)
        values, texts = np.unique(pairs[:, 0], return_counts=True)
        form = values[texts >= max(FORM_TEXTS, len(self.lengths) / FORM_SHARE)]
        edges = np.zeros(len(self.owner) + 1, dtype=np.int64)
        at = starts[np.isin(hashes, form)]
        np.add.at(edges, at, 1)
        np.add.at(edges, at + FORM_RUN, -1)
        is_content = edges.cumsum()[:-1] == 0
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(is_content)])


def _mixed(ids: Hashes) -> Hashes:
    """Numbers spread over 64 bits (splitmix64; Steele et al., Fast splittable pseudorandom number generators, 2014)."""
    x = ids + np.uint64(BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
