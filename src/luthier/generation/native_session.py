"""Rows of different length and beginning, generated together by the native decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.generation.pages import CachedRow, PagePool
from luthier.generation.stack import Stack
from luthier.kernels.decoder import PAGE
from luthier.models.blocks.tokens import Tokens
from luthier.models.prefix_tree import PrefixTree, sharing_order

# Tokens of one text that go on from cached ones run through the layers so many at a time.
TOKENS_AT_ONCE = 32


class NativeSession:
    """Cached rows of one model. Rows may come and go at any time; nothing is padded."""

    joins = True  # new rows may start while others go on

    def __init__(self, model: Any):
        self._stack = Stack(model)
        self._pool = PagePool(self._stack.decoder.page_floats)

    def cache_bytes(self, tokens: int, shared: int = 0) -> int:
        """Of a row of so many tokens, the whole pages of its first `shared` ones left out."""
        return (_pages(tokens) - shared // PAGE) * self._pool.page_bytes

    def committed_bytes(self, rows: Sequence[tuple[CachedRow, int]]) -> int:
        """Of all pages held, and of those that rows will take until they have so many tokens."""
        return (self._pool.used + sum(_pages(tokens) - len(row.pages) for row, tokens in rows)) * self._pool.page_bytes

    def start(self, prompts: Sequence[list[int]]) -> tuple[list[CachedRow], Tensor]:
        """New rows that hold the prompts, and the logits (rows, vocabulary) behind them.

        What prompts begin with in common is computed once, and its whole pages are stored once.
        """
        order, shared = sharing_order(prompts)
        tree = PrefixTree()
        paths: list[list[int]] = [[] for _ in prompts]
        for number, common in zip(order, shared, strict=True):
            paths[number] = tree.add(prompts[number], common)
        starts, parents = (torch.tensor(values, dtype=torch.int64) for values in tree.segments())
        rows, targets = self._laid(paths)
        lasts = torch.tensor([path[-1] for path in paths])
        # Prompts that are equal end with the same token, whose logits are computed once.
        wanted, places = lasts.unique(return_inverse=True)
        logits = self._stack.prefill(torch.tensor(tree.ids), Tokens.of(starts, parents), wanted, targets)
        return rows, logits[places]

    def _laid(self, paths: list[list[int]]) -> tuple[list[CachedRow], tuple[Tensor, Tensor, Tensor]]:
        """Rows with pages for tokens at these places of a pack, and where each token goes: sources, pages and slots."""
        rows: list[CachedRow] = []
        whole: dict[int, int] = {}
        sources: list[Tensor] = []
        pages: list[Tensor] = []
        slots: list[Tensor] = []
        for path in paths:
            row = CachedRow(len(path))
            places = torch.tensor(path)
            for first in range(0, len(path), PAGE):
                own = places[first : first + PAGE]
                last = int(own[-1]) if len(own) == PAGE else -1
                if last in whole:  # what stands before a token of a prefix tree is the same for all who pass it
                    row.pages.append(self._pool.share(whole[last]))
                    continue
                page = self._pool.take()
                row.pages.append(page)
                if last >= 0:
                    whole[last] = page
                sources.append(own)
                pages.append(torch.full_like(own, page))
                slots.append(torch.arange(len(own)))
            rows.append(row)
        return rows, (torch.cat(sources), torch.cat(pages), torch.cat(slots))

    def extend(self, rows: Sequence[CachedRow], tokens: Sequence[int]) -> Tensor:
        """Logits (rows, vocabulary) behind one more token of each row."""
        positions = [row.length for row in rows]
        for row in rows:
            self._make_room(row, row.length + 1)
        logits = self._stack.step(tokens, positions, [row.pages for row in rows], range(len(rows)))
        for row in rows:
            row.length += 1
        return logits

    def read(self, row: CachedRow, ids: Sequence[int]) -> Tensor:
        """Logits (vocabulary,) behind further tokens of one row."""
        for first in range(0, len(ids), TOKENS_AT_ONCE):
            new = list(ids[first : first + TOKENS_AT_ONCE])
            self._make_room(row, row.length + len(new))
            positions = range(row.length, row.length + len(new))
            logits = self._stack.step(new, positions, [row.pages] * len(new), [len(new) - 1])
            row.length += len(new)
        return logits[0]

    def cut(self, row: CachedRow, length: int) -> None:
        """Forget what stands behind the first `length` tokens of a row that shares its last page with none."""
        row.length = length
        while len(row.pages) * PAGE >= length + PAGE:
            self._pool.release(row.pages.pop())

    def release(self, row: CachedRow) -> None:
        """The row has ended."""
        for page in row.pages:
            self._pool.release(page)
        row.pages, row.length = [], 0

    def _make_room(self, row: CachedRow, length: int) -> None:
        while len(row.pages) * PAGE < length:
            row.pages.append(self._pool.take())


def _pages(tokens: int) -> int:
    """That so many tokens fill."""
    return -(-tokens // PAGE)
