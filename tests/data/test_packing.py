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


def grown(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


A, B, C = list(range(10, 20)), list(range(30, 36)), list(range(50, 58))


def test_a_beginning_is_laid_once() -> None:
    """A B 1, A C 2 and A B 3 are A (B (1, 3), C 2): rows in the order of their tokens, segments as a tree. Each has one more
    token, which is only predicted."""
    texts = [grown(parts) for parts in ([A, B, [1, 7]], [A, C, [2, 7]], [A, B, [3, 7]])]
    examples = [example(text, [True] * len(text)) for text in texts]
    (pack,) = pack_examples(examples, max_tokens=100, share=True)
    assert pack.rows == [0, 2, 1]
    assert pack.ids.tolist() == [*A, *B, 1, 3, *C, 2]
    assert pack.starts.tolist() == [0, 10, 16, 17, 18, 27]
    assert pack.parents.tolist() == [-1, 0, 1, 1, 0]
    assert (pack.tokens, pack.example_tokens, pack.supervised_tokens) == (27, 17 + 19 + 17, 17 + 19 + 17)


def test_duplicates_and_rows_that_go_on_from_a_whole_row() -> None:
    examples = [example([*ids, 7], [True] * (len(ids) + 1)) for ids in ([*A, 1, 2], A, A, [*A, 1, 2])]
    (pack,) = pack_examples(examples, max_tokens=100, share=True)
    assert pack.ids.tolist() == [*A, 1, 2]
    assert pack.starts.tolist() == [0, 10, 12]
    assert pack.parents.tolist() == [-1, 0]
    assert [len(places) for places in pack.places] == [10, 10, 12, 12]


def test_a_short_beginning_is_not_worth_a_segment() -> None:
    (pack,) = pack_examples([example([5, 6, 7, n, n], [True] * 5) for n in (1, 2)], max_tokens=100, share=True)
    assert pack.parents.tolist() == [-1, -1]
    assert not pack.is_shared


@pytest.mark.parametrize(
    ("marks", "laid"),
    [([0, 1, 1, 0, 0, 0], 2), ([0, 0, 0, 0, 0, 1], 5), ([0, 1, 0, 0, 0, 0], 1), ([1, 0, 0, 0, 0, 0], 1), ([0] * 6, 1)],
)
def test_nothing_behind_the_last_prediction_is_laid_where_rows_share(marks: list[int], laid: int) -> None:
    one = example([11, 12, 13, 14, 15, 16], [mark == 1 for mark in marks])
    (pack,) = pack_examples([one], max_tokens=100, share=True)
    assert pack.ids.tolist() == one.ids[:laid]
    assert pack.predict.tolist() == [t - 1 for t in range(1, 6) if marks[t]]
    assert pack.targets.tolist() == [one.ids[t] for t in range(1, 6) if marks[t]]
    assert pack_examples([one], max_tokens=100)[0].ids.tolist() == one.ids


def some_trees(seed: int) -> list[Example]:
    """Rows that share beginnings of many lengths, some of them whole rows."""
    draw = random.Random(seed)
    stems = [[draw.randrange(9) for _ in range(draw.choice((3, 12, 30)))] for _ in range(4)]
    rows = []
    for _ in range(40):
        stem = draw.choice(stems)
        ids = grown([stem[: draw.randrange(1, len(stem) + 1)], [draw.randrange(9) for _ in range(draw.randrange(4))]])
        rows.append(example(ids, [draw.random() < 0.5 for _ in ids]))
    return rows


@pytest.mark.parametrize("max_tokens", [1, 20, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_can_be_read_back_from_a_tree(seed: int, max_tokens: int) -> None:
    examples = some_trees(seed)
    packs = pack_examples(examples, max_tokens=max_tokens, share=True)
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(examples)))
    for pack in packs:
        starts, parents = pack.starts.tolist(), pack.parents.tolist()
        assert pack.tokens <= max_tokens or len(pack.rows) == 1
        assert all(parent < number for number, parent in enumerate(parents))
        texts: list[list[int]] = []
        for (first, end), parent in zip(pairwise(starts), parents, strict=True):
            assert end > first
            texts.append([*(texts[parent] if parent >= 0 else []), *range(first, end)])
        expected = []
        for row, places in zip(pack.rows, pack.places, strict=True):
            own = places.tolist()
            targets = [t for t in range(1, len(examples[row].ids)) if examples[row].supervised[t]]
            assert pack.ids[places].tolist() == examples[row].ids[: max(targets, default=1)]
            # The way to the example's last token is its segments' texts, one after the other.
            assert any(text[: len(own)] == own for text in texts)
            expected += [(own[t - 1], examples[row].ids[t]) for t in targets]
        assert list(zip(pack.predict.tolist(), pack.targets.tolist(), strict=True)) == expected
    whole = sum(len(one.ids) for one in examples)
    assert max_tokens < 64 or sum(pack.tokens for pack in packs) < whole


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
