"""The report of `luthier data check`: problems listed, never raised, and samples with the mask."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tiny import tiny_tokenizer

from luthier.data import DataReport, check_data


def check(folder: Path, *rows: object, max_length: int = 64, samples: int = 1, tail: str = "") -> tuple[DataReport, str]:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return check_data(str(path), tiny_tokenizer(), max_length=max_length, samples=samples), str(path)


def test_a_good_file(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "noon?"}, {"role": "assistant", "content": "at two"}]}
    report, path = check(tmp_path, row, row, samples=5)
    assert report.problems == []
    assert (report.path, report.form, report.rows, report.duplicates) == (path, "messages", 2, 1)
    assert report.tokens == 2 * report.longest
    assert report.lengths == [{"up_to": 32, "rows": 2}]
    assert len(report.samples) == 2
    sample = report.samples[0]
    assert sample["where"] == f"{path}:1"
    assert sample["text_parts"] == [
        {"text": "<|im_start|>user\nnoon?<|im_end|>\n<|im_start|>assistant\n", "supervised": False},
        {"text": "at two<|im_end|>", "supervised": True},
        {"text": "\n", "supervised": False},
    ]
    assert (sample["prompt"], sample["completion"]) == ("noon?", "at two")
    assert "".join(token["text"] for token in sample["tokens"] if token["supervised"]) == "at two<|im_end|>"
    assert 2 * sum(token["supervised"] for token in sample["tokens"]) == report.supervised_tokens
    assert json.loads(json.dumps(asdict(report))) == asdict(report)


def test_a_bad_file_gives_every_problem(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    report, path = check(
        tmp_path, good, {"prompt": "q", "completion": None}, good | {"completion": "x " * 99}, tail='{"prompt"'
    )
    assert len(report.problems) == 3
    assert f"{path}:2: completion must be text; got null." in report.problems
    assert report.problems[2].startswith(f"{path}: rows must have at most 64 tokens (--max-length); 1 of 3 have more")
    assert (report.rows, len(report.samples)) == (3, 1)


def test_what_ends_the_reading_is_a_problem_too(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    report = check_data(missing, tiny_tokenizer(), max_length=64, samples=1)
    assert report.problems == [f"the data must be a file or a data set of the hub; there is no file {missing}. Check the path."]
    report, path = check(tmp_path)
    assert report.problems == [f"{path}: the file is empty. Give a file with at least one row."]


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    report, _ = check(tmp_path, *[{"text": ""}] * 1500)
    assert len(report.problems) == 1001
    assert report.problem_count == 1500
    assert report.problems[-1] == "... and 500 more"
