"""The texts of a pack, as the blocks need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Their frequencies do not depend on how long a text is.
STATIC_ROTARY = ("default", "linear", "yarn", "llama3", "proportional")

Tables = tuple[Tensor, Tensor]  # cos and sin, each (T, R)


@dataclass(frozen=True, eq=False)
class Tokens:
    """T tokens in N segments end to end, segments that go on from others forming trees of texts.

    starts: (N + 1,) int64, from 0 to T; parents: (N,) int64, the earlier segment that each goes on from, -1 for none;
    positions: (T,) int64, from 0 at the beginning of each text.
    """

    starts: Tensor
    parents: Tensor
    positions: Tensor

    @classmethod
    def of(cls, starts: Tensor, parents: Tensor | None = None) -> Tokens:
        """Without parents every segment is a text."""
        if parents is None:
            parents = torch.full((len(starts) - 1,), -1)
        ends: list[int] = []
        positions = []
        for length, parent in zip(starts.diff().tolist(), parents.tolist(), strict=True):
            begin = 0 if parent < 0 else ends[parent]
            ends.append(begin + length)
            positions.append(torch.arange(begin, ends[-1]))
        return cls(starts, parents, torch.cat(positions))


@dataclass(frozen=True, eq=False)
class Entry:
    """A forward pass that begins at decoder layer `layer`: hidden, (T, hidden) float32, is what goes into it.

    Layers below are not run and get no gradient. layer: from 0 to the number of layers, which leaves the final norm.
    """

    layer: int
    hidden: Tensor


def is_static(rotary: Any, kind: str | None) -> bool:
    """Whether a token's cos and sin depend on its position alone."""
    return (rotary.rope_type if kind is None else rotary.rope_type[kind]) in STATIC_ROTARY


def query_tables(tables: Tables, rows: Tensor | None) -> Tables:
    """cos and sin of the tokens at `rows` alone, or as they are without rows."""
    cos, sin = tables
    return tables if rows is None else (cos[rows], sin[rows])


def rotary_tables(rotary: Any, hidden: Tensor, tokens: Tokens, kind: str | None) -> Tables:
    """cos and sin of every token, each (T, R) float32, from the family's own module.

    kind: which of several sets of frequencies. Some frequencies depend on the length of the text (dynamic, longrope);
    there each text has its own, as if it were alone, and shares no tokens with others (`is_static`).
    """
    lengths = [len(tokens.positions)] if is_static(rotary, kind) else tokens.starts.diff().tolist()
    extra = () if kind is None else (kind,)
    tables = [rotary(hidden[None], positions[None], *extra) for positions in tokens.positions.split(lengths) if len(positions)]
    cos, sin = (torch.cat([table[part][0] for table in tables]).to(torch.float32).contiguous() for part in (0, 1))
    return cos, sin
