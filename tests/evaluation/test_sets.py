"""Sets by name: flags, references, rows with choices, and one message for whatever is wrong with a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from luthier.data import Renderer
from luthier.errors import ConfigError, DataError
from luthier.evaluation.guard import Guard
from luthier.evaluation.sets import NamedFile, load_set, parse_files

CHOICE = {"prompt": "which?", "choices": ["red", "blue"], "answer": 0}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), max_length=120)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_names_of_files(tmp_path: Path) -> None:
    odd = write(tmp_path / "a=b.jsonl", [])
    files = parse_files(["dev=valid.jsonl", "some/test.jsonl", odd], ["wiki=w.jsonl:0.05", "other.jsonl:exact_match=1%"])
    assert files == [
        NamedFile("dev", "valid.jsonl"),
        NamedFile("test", "some/test.jsonl"),
        NamedFile("a=b", odd),
        NamedFile("wiki", "w.jsonl", Guard(None, 0.05, relative=False)),
        NamedFile("other", "other.jsonl", Guard("exact_match", 0.01, relative=True)),
    ]


@pytest.mark.parametrize(
    ("data", "guards", "message"),
    [
        (["a=x.jsonl", "a=y.jsonl"], [], "every set needs a name of its own; x.jsonl and y.jsonl are both called 'a'."),
        (["in/x.jsonl"], ["x.jsonl"], "in/x.jsonl and x.jsonl are both called 'x'. Write --data NAME=FILE."),
        (["my set=x.jsonl"], [], "--data takes NAME=FILE, the name of letters, digits, . _ and -; got 'my set=x.jsonl'."),
        (["=x.jsonl"], [], "--data takes NAME=FILE, the name of letters"),
        (["a="], [], "--data takes NAME=FILE; got 'a=', which names no file."),
        ([], ["a=x:exact_mtch=1%"], "got 'exact_mtch'. Did you mean 'exact_match'?"),
    ],
)
def test_names_that_cannot_be_used(data: list[str], guards: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_files(data, guards)


def test_references_are_read_beside_the_rows(tmp_path: Path, renderer: Renderer) -> None:
    rows = [
        {"prompt": "a", "completion": "one", "references": ["one", "uno"]},
        {"prompt": "word " * 90, "completion": "far too long", "references": ["x"]},
        {"prompt": "b", "completion": "two"},
    ]
    found = load_set(NamedFile("set", write(tmp_path / "x.jsonl", rows)), renderer, on_long="drop")
    assert found.extras.references == [["one", "uno"], ["two"]]
    assert found.dataset.manifest["notes"] == []
    plain = load_set(NamedFile("set", write(tmp_path / "y.jsonl", rows[2:])), renderer, on_long="drop")
    assert plain.extras.references is None


@pytest.mark.parametrize("bad", ["one", [], ["one", ""], ["one", 2], {"a": "b"}, ["x"] * 101])
def test_references_of_a_wrong_form_are_named(tmp_path: Path, renderer: Renderer, bad: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "one", "references": bad}])
    with pytest.raises(
        DataError, match=rf"{re.escape(path)}:1: references must be a list of 1 to 100 texts that are not empty"
    ):
        load_set(NamedFile("set", path), renderer, on_long="error")


def test_rows_with_choices_become_the_right_answer_and_options(tmp_path: Path, renderer: Renderer) -> None:
    rows = [CHOICE, {**CHOICE, "prompt": "word " * 90}, {**CHOICE, "answer": "B"}]
    path = write(tmp_path / "x.jsonl", rows)
    found = load_set(NamedFile("quiz", path), renderer, on_long="drop")
    assert [example.completion for example in found.dataset.examples] == ["red", "blue"]
    assert found.extras.choices is not None
    assert [choice.right for choice in found.extras.choices] == [0, 1]
    example, choice = found.dataset.examples[1], found.extras.choices[1]
    end = example.prompt_ids + choice.endings[1]
    assert example.ids[: len(end)] == end
    assert not any(example.supervised[len(end) :])
    assert (found.dataset.manifest["kept"], found.dataset.manifest["dropped"]) == (2, 1)
    for on_long in ("error", "truncate"):
        with pytest.raises(DataError, match="rows must have at most 120 tokens"):
            load_set(NamedFile("quiz", path), renderer, on_long=on_long)


def test_everything_wrong_with_rows_of_choices_is_said_at_once(tmp_path: Path, renderer: Renderer) -> None:
    rows = [CHOICE, {**CHOICE, "answer": 7}, {"prompt": "a", "completion": "b"}, {**CHOICE, "prompt": "x\x00"}]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_set(NamedFile("quiz", path), renderer, on_long="error")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has 3 problems:"
    assert lines[1].startswith(f"  - {path}:2: the answer must be an index from 0 to 1")
    assert lines[2].startswith(f"  - {path}:3: all rows of a file must have one form; this has no choices")
    assert "NUL" in lines[3]


def test_an_empty_file_is_said(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"the file is empty\. Give a file with at least one row"):
        load_set(NamedFile("set", str(path)), renderer, on_long="error")
