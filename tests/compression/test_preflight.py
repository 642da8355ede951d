"""What is found before anything heavy is done: budgets, folders, disks and texts that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tiny import compressed_folder
from tiny import write_tiny

from luthier.compression import preflight, runner
from luthier.compression.preflight import survey
from luthier.compression.runner import compress
from luthier.compression.settings import Budget, CompressSettings
from luthier.errors import ConfigError, DataError, LuthierError, PreflightError
from luthier.linear import count_numbers
from luthier.models.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), "llama", tied=True, dtype=torch.bfloat16)


def settings(model: Path, out: Path, budget: str = "50%", **more: Any) -> CompressSettings:
    return CompressSettings(str(model), Budget.parse(budget), out, **more)


def never(*_args: Any, **_more: Any) -> None:
    raise AssertionError("a weight was read")


def refused(one: CompressSettings, monkeypatch: pytest.MonkeyPatch, message: str, error: type[LuthierError]) -> None:
    """That it is refused without a weight being read, and that nothing is left."""
    monkeypatch.setattr(runner, "load", never)
    beside = set(one.out.parent.iterdir()) if one.out.parent.is_dir() else None
    with pytest.raises(error, match=message):
        compress(one)
    assert beside == (set(one.out.parent.iterdir()) if one.out.parent.is_dir() else None)


BUDGETS = {
    "below": ("1kB", "auto", r"the budget must hold the smallest form of every layer, [0-9.]+ kB .* got 1\.00 kB"),
    "below in 16": ("30%", "16", r"with --bits 16; .* or allow all storages with --bits auto"),
    "all": ("100%", "auto", "the budget must be below what the model takes in 16 bits, 189 kB; got 189 kB: there is nothing"),
    "above": ("7GB", "16", r"got 7\.00 GB: there is nothing to compress\. Lower --budget"),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_that_cannot_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    budget, bits, message = BUDGETS[case]
    refused(settings(model, tmp_path / "out", budget, bits=bits), monkeypatch, message, PreflightError)


@pytest.mark.parametrize("bits", ["auto", "4", "16"])
def test_the_smallest_budget_that_is_not_refused_is_met(model: Path, tmp_path: Path, bits: str) -> None:
    """A bound that is too high would refuse what can be done: a little above it a whole run goes through."""
    low, high = 1, 189_056
    while low < high:
        middle = (low + high) // 2
        try:
            survey(settings(model, tmp_path / "out", f"{middle}B", bits=bits))
            high = middle
        except PreflightError:
            low = middle + 1
    room = 4000 if bits == "16" else 1500  # norms and the header; what an even share of 16 bits keeps from the smallest ranks
    small = {"windows": 8, "window": 32, "eval_windows": 4, "footprints": False, "data": str(tmp_path / "text.txt")}
    (tmp_path / "text.txt").write_text(" ".join(f"Line {number} says {number**3}." for number in range(300)))
    report = compress(settings(model, tmp_path / "out", f"{low + room}B", bits=bits, **small))
    assert report.result.size_bytes <= low + room


def test_it_knows_what_the_loaded_model_will_be(model: Path, tmp_path: Path) -> None:
    for path in (model, write_tiny(tmp_path / "gpt2", "gpt2"), compressed_folder(tmp_path / "factored")[0]):
        found = survey(settings(path, tmp_path / "out"))
        assert found.numbers == count_numbers(load(str(path), base="bf16").model)
        assert found.budget == found.numbers
        assert found.sixteen == "bf16"
    half = write_tiny(tmp_path / "half", "llama", dtype=torch.float16)
    assert survey(settings(half, tmp_path / "out")).sixteen == "f16"


def test_an_original_that_is_smaller_than_the_budget_is_named(tmp_path: Path) -> None:
    path, _ = compressed_folder(tmp_path)
    (note,) = [note for note in survey(settings(path, tmp_path / "out", "90%")).notes if "The budget of" in note]
    assert "the original file is as small as what was asked for" in note
    assert not [note for note in survey(settings(path, tmp_path / "out", "40%")).notes if "The budget of" in note]


def test_in_4_bits_a_budget_may_be_larger_than_the_model(model: Path, tmp_path: Path) -> None:
    assert survey(settings(model, tmp_path / "out", "1GB", bits="4")).notes


def test_a_disk_without_room_is_seen_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    message = r"must have room for the plans that are compared, about [0-9]+ kB; 1\.00 kB are free"
    refused(settings(model, tmp_path / "new" / "out"), monkeypatch, message, PreflightError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    below = settings(model, tmp_path / "file" / "deep" / "out")
    refused(below, monkeypatch, r"must be in a folder that can be written to; .*file is not", PreflightError)
    monkeypatch.setattr(preflight.os, "access", lambda _path, _mode: False)
    refused(settings(model, tmp_path / "out"), monkeypatch, "must be in a folder that can be written to", PreflightError)


OUTS: dict[str, Callable[[Path], Path]] = {
    "a folder": lambda path: path,
    "a file": lambda path: _made(path / "file", "touch"),
    "a link that leads nowhere": lambda path: _made(path / "link", "symlink_to", "nowhere"),
}


def _made(path: Path, how: str, *arguments: str) -> Path:
    getattr(path, how)(*arguments)
    return path


@pytest.mark.parametrize("case", OUTS)
def test_what_is_there_already_is_never_written_over(model: Path, tmp_path: Path, case: str) -> None:
    out = OUTS[case](tmp_path)
    with pytest.raises(ConfigError, match="a compressed model goes to a new folder"):
        settings(model, out)


def test_a_name_that_no_folder_can_have(model: Path, tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="--out must be a name that a folder can have"):
            settings(model, tmp_path / name)


def test_texts_that_are_not_there_are_missed_before_the_model(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "text.txt").write_text("text")
    for more in ({"data": "none.txt"}, {"data": "none.jsonl"}, {"data": str(tmp_path / "text.txt"), "eval_data": "none.txt"}):
        refused(settings(model, tmp_path / "out", **more), monkeypatch, "none", DataError)
    short = settings(model, tmp_path / "out", data=str(tmp_path / "text.txt"))
    refused(short, monkeypatch, "needs at least 4 windows", DataError)


def test_windows_are_no_longer_than_the_model_has_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompressSettings] = []

    def stop(one: CompressSettings, *_more: Any) -> None:
        seen.append(one)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(settings(write_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "out"))
    assert seen[0].window == 256
    assert survey(settings(tmp_path / "gpt2", tmp_path / "out")).notes == [
        "Windows have 256 tokens, as many as the model has positions."
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_what_comes_to_stand_at_out_meanwhile_stays_and_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(stage: Path, _report: Any) -> None:
        (stage / "report.json").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "report.json").write_text("theirs")

    monkeypatch.setattr(runner, "_run", lambda *_arguments: type("Report", (), {})())
    monkeypatch.setattr(runner, "write_report", write)
    with pytest.raises(ConfigError, match="came to be while this one was made"):
        compress(settings(model, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "report.json").read_text() == "theirs"
