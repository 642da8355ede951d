"""`luthier plan` on the command line."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from test_main import invoke

from luthier.cli import plan, train


@pytest.fixture
def line(tiny_llama: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["plan", str(path), "--model", str(tiny_llama), "--steps", "4", "--rank", "4", "--max-length", "64", "--offline"]


def test_flags_are_those_of_train() -> None:
    own = dict(inspect.signature(plan.plan).parameters)
    of_train = {name: one for name, one in inspect.signature(train.train).parameters.items() if name != "overwrite"}
    assert list(own) == list(of_train)
    assert all(own[name].annotation == of_train[name].annotation for name in own)


def test_json_has_what_scripts_need(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, *line, "--json")
    assert code == 0
    content = json.loads(out.splitlines()[-1])
    assert content["fits"] is True
    assert content["total_steps"] == 4
    assert content["peak_bytes"] >= content["footprint"]["base_bytes"] > 0
    assert content["seconds_per_step"] > 0
    assert content["trainable_parameters"] > 0


def test_table_names_every_part(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, *line)
    assert code == 0
    for part in (
        "program",
        "base weights",
        "adapter",
        "gradients",
        "optimiser",
        "activations",
        "head",
        "loading",
        "a step",
        "disk",
    ):
        assert part in out
    assert "It fits." in out


def test_what_does_not_fit_ends_with_3(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke(capsys, *line, "--memory", "20MB")
    assert code == 3
    assert "It does not fit." in out
    assert "a run must fit in the memory it is allowed" in err
