"""What commands print on stdout without --json: every number is there, nothing is cut off, nothing steers a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import tables
from luthier.data.check import DataReport
from luthier.training.result import RunResult

BEFORE = {"loss": 2.504, "perplexity": 12.231, "tokens": 4400, "exact_match": 0.0}
AFTER = {"loss": 0.1944, "perplexity": 1.2146, "tokens": 4400, "exact_match": 0.855}

RESULT = RunResult(
    run_dir="runs/one",
    adapter_dir="runs/one/adapter",
    model_dir=None,
    report="runs/one/report.html",
    steps=250,
    skipped_steps=0,
    tokens=117_320,
    supervised_tokens=49_000,
    tokens_per_second=851.2,
    seconds=171.3,
    total_seconds=200.0,
    loss_first=2.31,
    loss_last=0.17,
    peak_rss_bytes=1_190_000_000,
    trainable_parameters=4_884_480,
    total_parameters=139_399_488,
    eval={"before": BEFORE, "after": AFTER},
    samples=[
        {
            "prompt": "Remind me at seven.",
            "expected": '{"at": "07:00"}',
            "before": "Sure!\nOf course.",
            "after": '{"at": "07:00"}',
        }
    ],
)

SUMMARY: dict[str, Any] = {
    "run_dir": "runs/one", "status": "finished", "started": "2026-01-02T03:04:05+0000", "model": "smollm2-135m",
    "data": "some/folder/train.jsonl", "method": "lora", "steps": 250, "loss_last": 0.17, "seconds": 171.3,
    "eval": {"before": BEFORE, "after": AFTER}, "config": {"rank": 16, "steps": None, "targets": "all-linear"},
    "checkpoints": ["runs/one/checkpoints/step-250"],
}  # fmt: skip


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What has been printed on stdout since the last call; it never holds a control character but line feeds."""

    def read() -> str:
        out = capsys.readouterr().out
        assert all(char == "\n" or char.isprintable() for char in out), repr(out)
        return out

    return read


def squeezed(text: str) -> list[str]:
    """Lines with runs of spaces made one."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_run_summary_has_the_table_and_the_samples(printed: Callable[[], str]) -> None:
    tables.print_run_summary(RESULT)
    lines = squeezed(printed())
    for wanted in (
        "sample 1 Remind me at seven.",
        'expected {"at": "07:00"}',
        "before Sure!\\nOf course.",
        'after {"at": "07:00"}',
        "held-out rows before after change",
        "loss 2.5040 0.1944 -2.3096",
        "supervised tokens 4,400 4,400",
        "exact match 0 % 85.5 % +85.5 points",
        "training loss 2.3100 first step, 0.1700 last step",
        "steps 250",
        "time 2 min 51 s in steps, 3 min 20 s in all",
        "speed 851 tokens a second over 117,320 tokens",
        "peak memory 1.19 GB",
        "trained 4,884,480 parameters, 3.5 % of the model",
        "adapter runs/one/adapter",
        "report runs/one/report.html",
    ):
        assert wanted in lines


def test_run_summary_without_evaluation_or_adapter(printed: Callable[[], str]) -> None:
    result = dataclasses.replace(
        RESULT, eval=None, samples=[], adapter_dir=None, model_dir="runs/one/model", skipped_steps=2, nothing_to_do=True
    )
    tables.print_run_summary(result)
    lines = squeezed(printed())
    assert lines[0] == "This run was finished before; nothing was done."
    assert "model runs/one/model" in lines
    assert "steps 250, 2 skipped for gradients that were not finite" in lines
    assert not any("held-out" in line or "sample" in line for line in lines)


def test_runs_one_line_each(printed: Callable[[], str]) -> None:
    damaged = {"run_dir": "runs/two", "status": "damaged", "started": None}
    tables.print_runs([SUMMARY, damaged], Path("runs"))
    lines = squeezed(printed())
    assert lines[0] == "run status model data steps loss time"
    assert lines[1] == "runs/one finished smollm2-135m train.jsonl 250 0.1700 2 min 51 s"
    assert lines[2].startswith("runs/two damaged - - 0 -")
    tables.print_runs([], Path("runs"))
    assert printed() == "no runs in runs\n"


def test_long_paths_stay_whole_on_one_line(printed: Callable[[], str]) -> None:
    path = "runs/" + "long-name-" * 20
    tables.print_runs([{**SUMMARY, "run_dir": path}], Path("runs"))
    assert path in printed()
    tables.print_run_summary(dataclasses.replace(RESULT, adapter_dir=path))
    assert path in printed()


def test_run_shows_its_settings(printed: Callable[[], str]) -> None:
    tables.print_run(SUMMARY)
    lines = squeezed(printed())
    for wanted in ("run dir runs/one", "status finished", "loss last 0.1700", "rank 16", "steps -", "targets all-linear"):
        assert wanted in lines
    assert "checkpoint runs/one/checkpoints/step-250" in lines
    assert "exact match 0 % 85.5 % +85.5 points" in lines
    tables.print_run({"run_dir": "runs/two", "status": "interrupted", "steps": 0, "eval": None})
    assert "loss last -" in squeezed(printed())


def test_data_check_marks_supervised_text_where_there_is_no_colour(printed: Callable[[], str]) -> None:
    parts = [{"text": "<|im_start|>user\nhi", "supervised": False}, {"text": "hello", "supervised": True}]
    report = DataReport(
        "train.jsonl", "messages", rows=12, tokens=500, supervised_tokens=200, longest=70, duplicates=3, max_length=64,
        lengths=[{"up_to": 64, "rows": 11}, {"up_to": 128, "rows": 1}], problem_count=1,
        problems=["train.jsonl:7: no answer"], notes=["2 rows are empty"],
        samples=[{"where": "train.jsonl:1", "text_parts": parts}],
    )  # fmt: skip
    tables.print_data_check(report)
    out = printed()
    lines = squeezed(out)
    for wanted in (
        "file train.jsonl",
        "form messages",
        "rows 12, 3 repeated",
        "tokens 500, 40 % of them supervised",
        "longest row 70 tokens; at most 64 are trained on",
        "lengths 11 up to 64, 1 up to 128",
        "note: 2 rows are empty",
        "train.jsonl:1",
        "1 problem:",
        "- train.jsonl:7: no answer",
    ):
        assert wanted in lines
    assert "<|im_start|>user\nhi[[hello]]" in out


def test_facts_are_readable(printed: Callable[[], str]) -> None:
    tables.print_facts({
        "python": "3.12.1", "memory_bytes": 8_300_000_000, "packages": {"torch": "2.13.0", "peft": None},
        "instructions": ["avx2", "avx512f"], "problems": [],
    })  # fmt: skip
    assert squeezed(printed()) == [
        "python 3.12.1", "memory 8.30 GB", "packages torch 2.13.0, peft -", "instructions avx2, avx512f",
        "This machine is ready.",
    ]  # fmt: skip
    tables.print_facts({"python": "3.12.1", "problems": ["torch is not installed."]})
    assert "ready" not in printed()


def test_hostile_text_is_shown_not_obeyed(printed: Callable[[], str]) -> None:
    bad = "[bold]x[/bold]\x1b[2J\x07\u202e:smile:"
    samples = [{"prompt": bad, "expected": bad, "before": bad, "after": bad}]
    tables.print_run_summary(dataclasses.replace(RESULT, adapter_dir=bad, report=bad, samples=samples))
    assert printed().count("[bold]x[/bold]\\x1b[2J\\x07\\u202e:smile:") == 6
    tables.print_run({**SUMMARY, "model": bad, "config": {"model": bad}})
    assert printed().count("\\x1b[2J") == 2
    tables.print_runs([{**SUMMARY, "run_dir": bad, "model": bad}], Path(bad))
    assert printed().count("\\x1b[2J") == 2
    part = {"text": bad, "supervised": True}
    report = DataReport(bad, problems=[bad], notes=[bad], samples=[{"where": bad, "text_parts": [part]}])
    tables.print_data_check(report)
    assert printed().count("\\x1b[2J") == 5
    tables.print_facts({"folder": bad, "nested": {"one": bad}, "list": [bad]})
    assert printed().count("\\x1b[2J") == 3


def test_no_color_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    tables.print_run_summary(RESULT)
    assert "\x1b[3" not in capsys.readouterr().out
