"""Parts of texts in other texts, against a search token by token."""

from __future__ import annotations

import random

import pytest

from luthier.compression.overlap import FORM_TEXTS, LEAST_RUN, RUN, holding_parts


def runs(text: list[int], length: int) -> set[tuple[int, ...]]:
    return {tuple(text[at : at + length]) for at in range(len(text) - length + 1)}


def by_hand(texts: list[list[int]], held: list[list[int]]) -> list[bool]:
    """The rule for files without a form, in plain sets."""

    def holds(one: list[int], other: list[int]) -> bool:
        if one == other:
            return True
        length = min(RUN, len(one) - 2, len(other) - 2)
        return length >= LEAST_RUN and bool(runs(one, length) & runs(other, length))

    return [any(holds(one, other) for other in held) for one in texts]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_is_what_a_search_token_by_token_finds(seed: int) -> None:
    draw = random.Random(seed)
    held = [[draw.randrange(49152) for _ in range(draw.randrange(1, 150))] for _ in range(6)]
    texts = []
    for number in range(FORM_TEXTS - 1):
        text = [draw.randrange(49152) for _ in range(draw.randrange(0, 90))]
        source = draw.choice(held)
        count = draw.choice([0, 7, 9, RUN - 1, RUN, RUN + 1, 60])
        start = draw.randrange(max(1, len(source) - count))
        at = draw.randrange(len(text) + 1)
        texts.append(text[:at] + source[start : start + count] + text[at:] if number % 3 else list(source))
    assert list(holding_parts(texts, held)) == by_hand(texts, held)


def test_a_run_is_found_at_every_offset_and_one_token_less_is_not() -> None:
    held = list(range(1000, 1200))
    for offset in range(40):
        around = list(range(offset))
        assert holding_parts([[*around, *held[offset : offset + RUN], 5, 6]], [held])[0]
        assert not holding_parts([[*around, 7, 8, *held[offset : offset + RUN - 1], 5, 6]], [held])[0]


def test_what_all_rows_have_in_common_is_form_and_their_own_words_are_not() -> None:
    draw = random.Random(1)
    instruction = [draw.randrange(5000) for _ in range(60)]
    words = [[draw.randrange(5000) for _ in range(18)] for _ in range(40)]
    rows = [[*instruction, *own, 3, 4] for own in words]
    others = [[*instruction, *own[:4], *(draw.randrange(5000) for _ in range(14)), 3, 4] for own in words[:9]]
    assert not holding_parts(rows, others).any()  # the instruction and a few first words
    found = holding_parts(rows, [rows[7], [9, *words[11], 8]])  # a row itself, and its words in another form
    assert [number for number, is_found in enumerate(found) if is_found] == [7, 11]


def test_nothing_is_found_in_nothing() -> None:
    assert list(holding_parts([], [[1, 2, 3]])) == []
    assert list(holding_parts([[1, 2, 3], []], [])) == [False, False]
    assert list(holding_parts([[1, 2, 3], [4]], [[4], [2, 3]])) == [False, True]
