"""Examples laid end to end as one row of tokens, and where its supervised tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.errors import ShapeError

if TYPE_CHECKING:
    from luthier.data import Example


@dataclass(frozen=True)
class Pack:
    """N examples as one row of T tokens, S of them supervised.

    ids: (T,) int64, the examples end to end; starts: (N + 1,) int64, their boundaries from 0 to T;
    predict, targets: (S,) int64: the hidden state at predict[i] predicts the token targets[i] = ids[predict[i] + 1];
    rows: for each example, its index in the list it came from.
    """

    ids: Tensor
    starts: Tensor
    predict: Tensor
    targets: Tensor
    rows: list[int]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def supervised_tokens(self) -> int:
        return self.targets.numel()


def pack_examples(examples: Sequence[Example], *, max_tokens: int) -> list[Pack]:
    """Packs of at most `max_tokens` tokens, the order of the examples kept; a longer example is its own pack.

    The first token of an example has nothing before it that could predict it, so it never carries loss.
    Raises ShapeError for max_tokens below 1, an example without tokens, or a mask of another length than its ids.
    """
    if max_tokens < 1:
        raise ShapeError(f"max_tokens must be at least 1; got {max_tokens}.")
    return [_pack(examples, rows) for rows in _groups(examples, max_tokens)]


def _groups(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for row, example in enumerate(examples):
        length = len(example.ids)
        if length == 0 or length != len(example.supervised):
            raise ShapeError(
                "an example needs at least one token and one mark a token; "
                f"{example.where} has {length} and {len(example.supervised)}. Render its row again."
            )
        if group and tokens + length > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    if group:
        yield group


def _pack(examples: Sequence[Example], rows: list[int]) -> Pack:
    starts = [0]
    ids: list[int] = []
    predict: list[int] = []
    for row in rows:
        example = examples[row]
        predict += [starts[-1] + t - 1 for t in range(1, len(example.ids)) if example.supervised[t]]
        ids += example.ids
        starts.append(len(ids))
    row_ids, where = torch.tensor(ids, dtype=torch.int64), torch.tensor(predict, dtype=torch.int64)
    return Pack(row_ids, torch.tensor(starts, dtype=torch.int64), where, row_ids[where + 1], rows)
