"""Answers in JSON compared as what they say: parsed, whole and field by field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.errors import DataError, bulleted
from luthier.evaluation.bootstrap import Array, Figure, mean_of, ratio

Field = tuple[str, str]


@dataclass(frozen=True)
class FieldCount:
    """How often a field was expected, given, and given with the value expected."""

    expected: int
    given: int
    right: int

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.expected + self.given) if self.expected + self.given else 0.0


@dataclass
class JsonMatch:
    """figures: json_match, json_f1, json_precision, json_recall, json_valid. invalid: answers that are no JSON.

    row_f1: (N,) F1 over the fields of each row. fields: by their path.
    """

    figures: list[Figure]
    invalid: int
    row_f1: Array
    fields: dict[str, FieldCount]


def match_json(expected: Sequence[str], got: Sequence[str], where: Sequence[str]) -> JsonMatch:
    """Compare answers with what was expected, both texts that hold one JSON value.

    json_match: the share of answers equal once parsed; the order of keys and white space do not count, 1 equals 1.0, and
    true does not equal 1. A field is a path with a scalar, as in `slots.year = "1959"`; items of a list share the path
    `slots[]` and have no order. Over all rows, precision is right / given fields, recall right / expected fields, and
    F1 = 2 right / (given + expected). json_valid: the share of answers that are JSON; one that is not, has no field and
    matches nothing.
    Raises DataError naming the rows whose expected answer is not JSON.
    """
    check_expected(expected, where)
    total: dict[str, list[int]] = {}
    terms, matches, valid = [], [], []
    for text, answer in zip(expected, got, strict=True):
        wanted = parse_json(text)
        try:
            given: Any = parse_json(answer)
            valid.append(1.0)
            matches.append(float(_same(wanted, given)))
            given_fields = Counter(fields_of(given))
        except ValueError:
            valid.append(0.0)
            matches.append(0.0)
            given_fields = Counter()
        wanted_fields = Counter(fields_of(wanted))
        both = wanted_fields & given_fields
        for place, counted in enumerate((wanted_fields, given_fields, both)):
            for (path, _), times in counted.items():
                total.setdefault(path, [0, 0, 0])[place] += times
        terms.append([both.total(), wanted_fields.total(), given_fields.total()])
    counts = np.asarray(terms, dtype=np.float64)
    doubled = np.stack([2 * counts[:, 0], counts[:, 1] + counts[:, 2]], 1)
    figures = [
        mean_of("json_match", matches),
        Figure("json_f1", doubled, ratio),
        Figure("json_precision", counts[:, [0, 2]], ratio),
        Figure("json_recall", counts[:, [0, 1]], ratio),
        mean_of("json_valid", valid),
    ]
    return JsonMatch(figures, valid.count(0.0), ratio(doubled), {path: FieldCount(*total[path]) for path in sorted(total)})


def parse_json(text: str) -> Any:
    """One JSON value. Raises ValueError for text that is none: NaN, a key twice and nesting without end among it."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def fields_of(value: Any, path: str = "") -> Iterator[Field]:
    """(path, scalar as JSON) of every leaf; an empty object or list is a leaf too."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields_of(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from fields_of(inner, f"{path}[]")
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield path or "(value)", json.dumps(int(value) if whole else value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _same(first: Any, second: Any) -> bool:
    """Equality of parsed JSON, where true is not 1 as it is in Python."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def check_expected(expected: Sequence[str], where: Sequence[str]) -> None:
    """Raise DataError naming the rows whose expected answer is not JSON."""
    problems = []
    for text, place in zip(expected, where, strict=True):
        try:
            parse_json(text)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(
            f"JSON match needs rows whose expected answer is JSON; {len(problems)} of {len(expected)} are not:\n"
            f"{bulleted(problems)}\nLeave json out of --metrics, or mend these rows."
        )
