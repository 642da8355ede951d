"""The documents of a pack, as the blocks need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Their frequencies do not depend on how long a document is.
STATIC_ROTARY = ("default", "linear", "yarn", "llama3", "proportional")

Tables = tuple[Tensor, Tensor]  # cos and sin, each (T, R)


@dataclass(frozen=True, eq=False)
class Tokens:
    """T tokens in documents end to end. starts: (N + 1,) int64, from 0 to T; positions: (T,) int64, from 0 in each document."""

    starts: Tensor
    positions: Tensor

    @classmethod
    def between(cls, boundaries: Sequence[int]) -> Tokens:
        positions = [torch.arange(end - first) for first, end in pairwise(boundaries)]
        return cls(torch.tensor(boundaries, dtype=torch.int64), torch.cat(positions))


def rotary_tables(rotary: Any, hidden: Tensor, tokens: Tokens, kind: str | None) -> Tables:
    """cos and sin of every token, each (T, R) float32, from the family's own module.

    kind: which of several sets of frequencies. Some frequencies depend on the length of the text (dynamic, longrope);
    there each document has its own, as if it were alone.
    """
    name = rotary.rope_type if kind is None else rotary.rope_type[kind]
    lengths = [len(tokens.positions)] if name in STATIC_ROTARY else tokens.starts.diff().tolist()
    extra = () if kind is None else (kind,)
    tables = [rotary(hidden[None], positions[None], *extra) for positions in tokens.positions.split(lengths) if len(positions)]
    cos, sin = (torch.cat([table[part][0] for table in tables]).to(torch.float32).contiguous() for part in (0, 1))
    return cos, sin
