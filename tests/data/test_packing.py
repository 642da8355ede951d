"""Packs keep every example, its order and its supervised tokens."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from luthier.data.example import Example
from luthier.data.packing import pack_examples
from luthier.errors import ShapeError


def example(ids: list[int], supervised: list[bool]) -> Example:
    return Example(ids=ids, supervised=supervised, prompt_ids=[], prompt="", completion=None, where="rows.jsonl:3")


def some_examples(count: int = 60) -> list[Example]:
    draw = random.Random(0)
    lengths = [draw.choice([1, 2, 7, 30, 90]) for _ in range(count)]
    return [example([draw.randrange(500) for _ in range(n)], [draw.random() < 0.4 for _ in range(n)]) for n in lengths]


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 100_000])
def test_nothing_is_lost_and_the_order_is_kept(max_tokens: int) -> None:
    examples = some_examples()
    packs = pack_examples(examples, max_tokens=max_tokens)
    assert [row for pack in packs for row in pack.rows] == list(range(len(examples)))
    for pack in packs:
        starts = pack.starts.tolist()
        parts = [pack.ids[first:end].tolist() for first, end in pairwise(starts)]
        assert parts == [examples[row].ids for row in pack.rows]
        assert pack.tokens == starts[-1]


def test_a_pack_holds_as_many_as_fit_and_a_longer_example_stands_alone() -> None:
    examples = [example([1] * n, [True] * n) for n in (4, 4, 3, 20, 1, 9)]
    assert [pack.rows for pack in pack_examples(examples, max_tokens=10)] == [[0, 1], [2], [3], [4, 5]]


def test_hidden_states_predict_the_next_supervised_token_of_their_own_example() -> None:
    examples = [example([10, 11, 12], [True, False, True]), example([20, 21], [True, True])]
    (pack,) = pack_examples(examples, max_tokens=10)
    assert pack.predict.tolist() == [1, 3]
    assert pack.targets.tolist() == [12, 21]
    assert pack.supervised_tokens == 2


def test_no_supervised_token_gives_an_empty_pack_of_targets() -> None:
    (pack,) = pack_examples([example([1, 2, 3], [False] * 3)], max_tokens=10)
    assert pack.predict.shape == pack.targets.shape == (0,)
    assert pack.ids.tolist() == [1, 2, 3]


def test_no_examples_give_no_packs() -> None:
    assert pack_examples([], max_tokens=10) == []


@pytest.mark.parametrize(("ids", "supervised"), [([], []), ([1, 2], [True])])
def test_an_example_must_have_tokens_and_a_mark_for_each(ids: list[int], supervised: list[bool]) -> None:
    with pytest.raises(ShapeError, match=r"at least one token and one mark a token; rows\.jsonl:3 has"):
        pack_examples([example(ids, supervised)], max_tokens=10)


def test_max_tokens_must_be_positive() -> None:
    with pytest.raises(ShapeError, match="max_tokens must be at least 1; got 0"):
        pack_examples(some_examples(), max_tokens=0)
