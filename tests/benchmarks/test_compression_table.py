"""What benchmarks/compression.py keeps: a line replaces one of the same conditions alone; a run that stops keeps its lines."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which takes its folder out of sys.path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.util.spec_from_file_location("compression_table", BENCHMARKS / "compression.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    return script


def row(line: str, perplexity: float, removed: float = 0.1) -> dict[str, Any]:
    figures = {"bits": 4.0, "size_bytes": 10, "loss": 1.0, "perplexity": perplexity, "seconds": 1.0}
    return {"line": line, "removed": removed, **figures}


def run(table: ModuleType, monkeypatch: pytest.MonkeyPatch, kept: Path, rows: list[Any], *more: str) -> list[dict[str, Any]]:
    def lines(_bench: Any, _options: Any) -> Iterator[dict[str, Any]]:
        for one in rows:
            if isinstance(one, BaseException):
                raise one
            yield one

    monkeypatch.setattr(table, "Bench", lambda _options: None)
    monkeypatch.setattr(table, "lines", lines)
    monkeypatch.setattr(table, "describe_machine", dict)
    monkeypatch.setattr(sys, "argv", ["compression.py", "--data", "a.jsonl", "--text", "b.raw", "--json", str(kept), *more])
    table.main()
    return json.loads(kept.read_text())["rows"]


def test_a_line_replaces_one_of_the_same_conditions_alone(table, monkeypatch, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    run(table, monkeypatch, kept, [row("svd", 9.0), row("asvd", 8.0)])
    run(table, monkeypatch, kept, [row("svd", 7.0)], "--model", "other")
    run(table, monkeypatch, kept, [row("svd", 6.0)], "--windows", "8")
    rows = run(table, monkeypatch, kept, [row("svd", 5.0), row("svd", 4.0, removed=0.2)])
    assert [(one["model"], one["windows"], one["line"], one["removed"], one["perplexity"]) for one in rows] == [
        ("smollm2-135m", 48, "svd", 0.1, 5.0),
        ("smollm2-135m", 48, "asvd", 0.1, 8.0),
        ("other", 48, "svd", 0.1, 7.0),
        ("smollm2-135m", 8, "svd", 0.1, 6.0),
        ("smollm2-135m", 48, "svd", 0.2, 4.0),
    ]


def test_a_run_that_stops_keeps_the_lines_it_measured(table, monkeypatch, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with pytest.raises(KeyboardInterrupt):
        run(table, monkeypatch, kept, [row("svd", 9.0), KeyboardInterrupt()])
    assert [one["line"] for one in json.loads(kept.read_text())["rows"]] == ["svd"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
