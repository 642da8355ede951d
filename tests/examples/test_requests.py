"""The example task: the committed files are the generator's, and held-out rows share nothing with training rows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import make_requests  # noqa: E402
import requests_pools as pools  # noqa: E402

FILES = ("train.jsonl", "valid.jsonl", "other.jsonl")
FIXED = {value for values in pools.CATEGORIES.values() for value in values} | {unit for pair in pools.UNITS for unit in pair}


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / "requests" / name).read_text().splitlines()]


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    make_requests.write_all(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "requests" / name).read_bytes()


def test_counts_and_no_row_twice() -> None:
    assert [len(rows_of(name)) for name in FILES] == [1000, 200, 100]
    asked = [row["messages"][-2]["content"] for name in FILES for row in rows_of(name)]
    assert len(set(asked)) == 1300


def test_phrasings_and_values_of_both_sides_are_apart() -> None:
    for train, held_out in (*pools.TEMPLATES.values(), *pools.POOLS.values()):
        assert not set(train) & set(held_out)
        assert len(train) == len(set(train))


def values_of(name: str) -> set[str]:
    answers = [json.loads(row["messages"][-1]["content"]) for row in rows_of(name)]
    return {value for answer in answers for key, value in answer.items() if key != "intent"} - FIXED


def test_no_value_of_a_training_answer_is_in_a_held_out_answer() -> None:
    assert not values_of("train.jsonl") & values_of("valid.jsonl")
    train, held_out = ({value for pool in pools.POOLS.values() for value in pool[side]} for side in (0, 1))
    assert not train & held_out


def test_no_held_out_request_has_a_training_phrasing() -> None:
    patterns = [
        re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(template)))
        for train, _ in pools.TEMPLATES.values()
        for template in train
    ]
    for row in rows_of("valid.jsonl"):
        request = row["messages"][-2]["content"]
        assert not [pattern.pattern for pattern in patterns if pattern.fullmatch(request)], request


@pytest.mark.parametrize("name", ["train.jsonl", "valid.jsonl"])
def test_answers_are_copied_from_the_request_in_one_order(name: str) -> None:
    intents = set()
    for row in rows_of(name):
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        request, text = (turn["content"] for turn in row["messages"][1:])
        answer = json.loads(text)
        assert text == json.dumps(answer)
        intent = answer.pop("intent")
        intents.add(intent)
        order = [pools.KEYS.get(slot, slot) for slot in pools.ORDER[intent]]
        assert list(answer) == [key for key in order if key in answer]
        assert all(value in request for value in answer.values())
    assert intents == set(pools.TEMPLATES)


def test_the_demo_configuration_is_valid() -> None:
    from luthier.config import make_config

    config = make_config(yaml.safe_load((EXAMPLES / "demo.yaml").read_text()))
    root = EXAMPLES.parent
    assert (root / config.data).is_file()
    assert (root / (config.eval_data or "")).is_file()
