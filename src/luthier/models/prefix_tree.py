"""Texts laid end to end so that a beginning several of them share stands once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

# A beginning of fewer tokens is not worth a segment of its own.
LEAST_SHARED = 4


def sharing_order(texts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """The texts in the order of their tokens, and how many tokens each shares with the one before it in that order.

    In this order the longest beginning that a text shares with any before it is the one it shares with its neighbour.
    """
    order = sorted(range(len(texts)), key=lambda number: texts[number])
    shared = [0] * len(order)
    for place in range(1, len(order)):
        common = _common(texts[order[place - 1]], texts[order[place]])
        shared[place] = common if common >= LEAST_SHARED else 0
    return order, shared


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with. By halving: comparing slices is quick, a loop over tokens is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class PrefixTree:
    """Tokens laid so far, in segments that go on from each other.

    begins: where each segment begins, with the position of the token before it, -1 for none; path: the positions of the
    tokens of the text added last.
    """

    ids: list[int] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    path: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], shared: int) -> list[int]:
        """Lay a text that shares so many tokens with the one added before it; gives the positions of its tokens."""
        path = self.path
        if 0 < shared < len(path):
            self.begins.setdefault(path[shared], path[shared - 1])
        if shared < len(ids):
            self.begins[len(self.ids)] = path[shared - 1] if shared else -1
        self.path = path[:shared] + list(range(len(self.ids), len(self.ids) + len(ids) - shared))
        self.ids += ids[shared:]
        return self.path

    def segments(self) -> tuple[list[int], list[int]]:
        """(starts, parents): the N + 1 boundaries, and for each segment the earlier one it goes on from, -1 for none."""
        starts = sorted(self.begins)
        befores = (self.begins[start] for start in starts)
        parents = [bisect_right(starts, before) - 1 if before >= 0 else -1 for before in befores]
        return [*starts, len(self.ids)], parents
