"""What `luthier eval` prints on stdout: figures with intervals, alone and beside another model, and nothing that steers."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.cli.eval_tables import print_reports
from luthier.data import Dataset
from luthier.evaluation.bootstrap import Figure, mean_of, ratio
from luthier.evaluation.compare import report_on
from luthier.evaluation.guard import Guard
from luthier.evaluation.result import EvalResult
from luthier.evaluation.sets import EvalSet


def result_of(loss: float, right: int) -> EvalResult:
    terms = np.stack([np.asarray([loss * 10, loss * 20, loss * 30, loss * 40]), np.full(4, 25.0)], 1)
    figures = [Figure("loss", terms, ratio), mean_of("exact_match", [1.0] * right + [0.0] * (4 - right))]
    metrics = {figure.name: figure.value for figure in figures} | {"tokens": 4400}
    return EvalResult(metrics, 4, notes=["exact match leaves out 3 rows"], figures=figures)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out = capsys.readouterr().out
    assert all(char == "\n" or char.isprintable() for char in out), repr(out)
    return [" ".join(line.split()) for line in out.splitlines()]


def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_reports([report_on(EvalSet("dev", Dataset([], {})), result_of(1.0, 3), None)])
    lines = printed(capsys)
    assert lines[0] == "dev, 4 rows 95 % interval"
    assert lines[1].startswith("loss 1.0000 0.")
    assert lines[2].startswith("exact match 75 % ")
    assert lines[2].endswith(" % to 100 %")
    assert lines[3] == "supervised tokens 4,400"
    assert lines[4] == "note: exact match leaves out 3 rows"


def test_beside_another_model_and_with_guards(capsys: pytest.CaptureFixture[str]) -> None:
    dev, wiki = EvalSet("dev", Dataset([], {})), EvalSet("wiki", Dataset([], {}), guard=Guard())
    reports = [report_on(one, result_of(1.5, 3), result_of(1.0, 2)) for one in (dev, wiki)]
    print_reports(reports)
    lines = printed(capsys)
    assert lines[0] == "dev, 4 rows base tuned change 95 % interval of the change"
    assert lines[1].startswith("loss 1.0000 1.5000 +0.5000 +0.")
    assert lines[2].startswith("exact match 50 % 75 % +25.0 points +0.0 to +")
    assert lines[3] == "supervised tokens 4,400 4,400"
    assert lines.index("") < lines.index("wiki, 4 rows base tuned change 95 % interval of the change")
    assert lines[-1].startswith("guard wiki: loss 1.0000 -> 1.5000, worse by 0.5000 (95 % interval ")
    assert lines[-1].endswith("broken, and the whole interval lies beyond the bound")


def test_hostile_names_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "[bold]x[/bold]\x1b[2J\x07\u202e"
    report = report_on(EvalSet(bad, Dataset([], {})), result_of(1.0, 2), result_of(1.0, 2))
    report.notes.append(bad)
    print_reports([report], base_name=bad)
    assert sum(line.count("[bold]x[/bold]\\x1b[2J\\x07\\u202e") for line in printed(capsys)) == 3
