"""Examples laid end to end as one row of tokens, beginnings that several share laid once, and where loss is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.models.prefix_tree import PrefixTree, sharing_order

if TYPE_CHECKING:
    from luthier.data import Example


@dataclass(frozen=True)
class Pack:
    """Examples as one row of T tokens in N segments, with S supervised tokens.

    ids: (T,) int64; starts: (N + 1,) int64, the boundaries of the segments from 0 to T; parents: (N,) int64, the earlier
    segment that each goes on from, -1 for none, so that examples with a common beginning form a tree.
    predict, targets: (S,) int64: the hidden state at predict[i] predicts the token targets[i]; where examples part, one
    hidden state predicts the next token of each.
    rows: for each example, its index in the list it came from; places: for each example, (length,) int64, where its
    tokens stand in `ids`, of which the last ones may have been left out.
    """

    ids: Tensor
    starts: Tensor
    parents: Tensor
    predict: Tensor
    targets: Tensor
    rows: list[int]
    places: list[Tensor]

    @classmethod
    def of_texts(cls, ids: Tensor, starts: Tensor, predict: Tensor) -> Pack:
        """Texts end to end that share nothing, each a segment; the next token is the target of each position in `predict`."""
        places = list(torch.arange(len(ids)).split(starts.diff().tolist()))
        rows = list(range(len(places)))
        return cls(ids, starts, torch.full((len(places),), -1), predict, ids[predict + 1], rows, places)

    def on(self, device: torch.device) -> Pack:
        """The same pack with what a model reads on `device`; this one, if it is there already."""
        if self.ids.device == device:
            return self
        keys = ("ids", "starts", "parents", "predict", "targets")
        return replace(self, **{key: getattr(self, key).to(device) for key in keys})

    @property
    def tokens(self) -> int:
        """What is computed: tokens that examples share count once."""
        return self.ids.numel()

    @property
    def example_tokens(self) -> int:
        """The sum of the examples' lengths as they were laid."""
        return sum(len(places) for places in self.places)

    @property
    def supervised_tokens(self) -> int:
        return self.targets.numel()

    @property
    def is_shared(self) -> bool:
        """Whether some token belongs to several examples."""
        return self.tokens < self.example_tokens


def pack_examples(examples: Sequence[Example], *, max_tokens: int, share: bool = False) -> list[Pack]:
    """Packs of at most `max_tokens` tokens; a longer example is its own pack.

    Without `share` the order of the examples is kept and each is a whole segment. With it they are taken in the order of
    their tokens, what an example begins with in common with the one before it is not laid again, and what nothing
    supervised comes after is not laid at all (`needed_ids`).
    The first token of an example has nothing before it that could predict it, so it never carries loss.
    Raises ShapeError for max_tokens below 1, an example without tokens, or a mask of another length than its ids.
    """
    if max_tokens < 1:
        raise ShapeError(f"max_tokens must be at least 1; got {max_tokens}.")
    for example in examples:
        _check(example)
    rows = range(len(examples))
    texts = [needed_ids(example) if share else example.ids for example in examples]
    order, shared = sharing_order(texts) if share else (rows, [0] * len(rows))
    lengths = [len(texts[row]) for row in order]
    return [
        _lay(examples, texts, order[group.start : group.stop], shared[group.start : group.stop])
        for group in cut_in_groups(lengths, shared, max_tokens)
    ]


def needed_ids(example: Example) -> list[int]:
    """The tokens before the last supervised one, at least one: neither it nor what comes later is an input to a prediction."""
    last = len(example.ids) - 1
    while last > 1 and not example.supervised[last]:
        last -= 1
    return example.ids[: max(1, last)]


def cut_in_groups(lengths: Sequence[int], shared: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Runs of neighbours that fit a pack together: the first counts whole, each other one less what it shares."""
    first, tokens = 0, 0
    for number, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        if number > first and tokens + length - common > max_tokens:
            yield range(first, number)
            first = number
        tokens = length if number == first else tokens + length - common
    if lengths:
        yield range(first, len(lengths))


def _check(example: Example) -> None:
    length = len(example.ids)
    if length == 0 or length != len(example.supervised):
        raise ShapeError(
            "an example needs at least one token and one mark a token; "
            f"{example.where} has {length} and {len(example.supervised)}. Render its row again."
        )


def _lay(examples: Sequence[Example], texts: Sequence[list[int]], rows: Sequence[int], shared: Sequence[int]) -> Pack:
    tree, places = PrefixTree(), []
    predict: list[int] = []
    targets: list[int] = []
    for number, (row, common) in enumerate(zip(rows, shared, strict=True)):
        example = examples[row]
        own = tree.add(texts[row], common if number else 0)
        places.append(torch.tensor(own))
        marked = [t for t in range(1, len(example.ids)) if example.supervised[t]]
        predict += [own[t - 1] for t in marked]
        targets += [example.ids[t] for t in marked]
    starts, parents = tree.segments()
    return Pack(
        ids=_numbers(tree.ids),
        starts=_numbers(starts),
        parents=_numbers(parents),
        predict=_numbers(predict),
        targets=_numbers(targets),
        rows=list(rows),
        places=places,
    )


def _numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
