"""JSON compared as what it says: keys in any order, fields with their F1, and what is not JSON counted."""

from __future__ import annotations

import pytest

from luthier.errors import DataError
from luthier.evaluation.json_match import fields_of, match_json, parse_json


def values(expected: list[str], got: list[str]) -> dict[str, float]:
    found = match_json(expected, got, [f"row {number}" for number in range(len(expected))])
    return {figure.name: figure.value for figure in found.figures}


def test_order_and_space_do_not_count() -> None:
    found = values(['{"a": 1, "b": {"c": "x", "d": [1, 2]}}'], [' {"b":{"d":[1,2.0],"c":"x"},"a":1.0}\n'])
    assert found == {"json_match": 1.0, "json_f1": 1.0, "json_precision": 1.0, "json_recall": 1.0, "json_valid": 1.0}


@pytest.mark.parametrize(
    ("expected", "got"),
    [("1", "true"), ("0", "false"), ("[1, 2]", "[2, 1]"), ('"1"', "1"), ("{}", "[]"), ("null", "0"), ('{"a": 1}', "{}")],
)
def test_what_is_not_equal(expected: str, got: str) -> None:
    assert values([expected], [got])["json_match"] == 0


def test_f1_over_fields_of_all_rows() -> None:
    expected = ['{"intent": "Play", "slots": {"year": "1959", "artist": "X"}}', '{"intent": "Weather", "slots": {}}']
    got = ['{"intent": "Play", "slots": {"year": "1960", "city": "Y"}}', "no JSON here"]
    found = match_json(expected, got, ["a", "b"])
    figures = {figure.name: figure.value for figure in found.figures}
    # expected: 3 + 2 fields, an empty object being one; given: 3 + 0; right: the intent of the first row.
    assert figures["json_precision"] == pytest.approx(1 / 3)
    assert figures["json_recall"] == pytest.approx(1 / 5)
    assert figures["json_f1"] == pytest.approx(2 / 8)
    assert (figures["json_match"], figures["json_valid"], found.invalid) == (0.0, 0.5, 1)
    assert found.row_f1.tolist() == pytest.approx([1 / 3, 0.0])
    assert list(found.fields) == ["intent", "slots", "slots.artist", "slots.city", "slots.year"]
    intent, city = found.fields["intent"], found.fields["slots.city"]
    assert (intent.expected, intent.given, intent.right, intent.f1) == (2, 1, 1, pytest.approx(2 / 3))
    assert (city.expected, city.given, city.right, city.f1) == (0, 1, 0, 0.0)


def test_items_of_a_list_are_fields_without_order() -> None:
    assert sorted(fields_of({"a": [{"b": 1}, {"b": 2}], "c": []})) == [("a[].b", "1"), ("a[].b", "2"), ("c", "[]")]
    found = values(['{"a": ["x", "y", "y"]}'], ['{"a": ["y", "x", "x"]}'])
    assert found["json_f1"] == pytest.approx(2 / 3)
    assert list(fields_of(7.0)) == [("(value)", "7")]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} x', "NaN", "[Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, "9" * 5000])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any words
        parse_json(text)
    assert values(["{}"], [text])["json_valid"] == 0


def test_rows_that_expect_no_json_are_named() -> None:
    with pytest.raises(DataError, match=r"1 of 2 are not:\n  - row 1: Expecting value"):
        values(["{}", "play music"], ["{}", "{}"])
