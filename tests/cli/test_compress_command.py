"""`luthier compress` from the command line: its JSON, its table, and the exit codes of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.main import run
from luthier.models.load import load


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Book a table for {i} at noon; the quick brown fox {i * i}." for i in range(900)))
    return path


DOCUMENTED = (
    *("model", "out", "form", "budget", "budget_bytes", "size_bytes", "chosen", "sentence", "candidates", "layers", "tables"),
    *("kinds", "calibration", "measured_on", "heal_steps", "peak_rss_bytes", "seconds", "notes"),
)


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_compress_prints_its_report_as_json(tmp_path: Path, tiny_llama: Path, text: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["compress", str(tiny_llama), "--budget", "60%", "--out", str(out), "--data", str(text), "--json"]
    code, printed, err = ended(arguments, capsys)
    assert code == 0, err
    report = json.loads(printed.splitlines()[-1])
    assert report["size_bytes"] <= report["budget_bytes"]
    assert report["sentence"].startswith("Ship ")
    assert {"chosen", "candidates", "layers", "tables", "peak_rss_bytes", "seconds", "notes"} <= report.keys()
    assert set(report) == set(DOCUMENTED)
    documentation = (Path(__file__).parents[2] / "docs" / "compression.md").read_text()
    candidate = {key for one in report["candidates"] for key in one}
    assert all(f"`{key}`" in documentation for key in {*DOCUMENTED, *candidate})
    assert (out / "report.html").is_file()
    assert load(str(out)).model.config.model_type == "llama"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "lots"], 2, "--budget is a share of the model in 16 bits"),
        (["--budget", "50%", "--bits", "3"], 2, "--bits is one of auto, 16, 4"),
        (["--budget", "50%", "--heal", "-1"], 2, "--heal is a number of steps"),
        (["--budget", "50%", "--data", "nowhere.txt"], 4, "--data must be a text file that can be read"),
        (["--budget", "50%", "--eval-data", "nowhere.jsonl"], 4, "there is no file nowhere.jsonl"),
        (["--budget", "5%"], 3, "the budget must hold the smallest form of every layer"),
        (["--budget", "9GB"], 3, "there is nothing to compress"),
    ],
)
def test_what_cannot_be_ends_with_its_code_and_leaves_nothing(
    tmp_path: Path, tiny_llama: Path, text: Path, capsys, arguments: list[str], code: int, message: str
) -> None:
    out = tmp_path / "new" / "out"
    data = [] if "--data" in arguments else ["--data", str(text)]
    got, _, err = ended(["compress", str(tiny_llama), "--out", str(out), *arguments, *data], capsys)
    assert got == code, err
    assert message in err
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
