"""The files of a run directory as the report needs them: what is missing or damaged is noted, never fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class RunFiles:
    """What a run directory holds. A file that is not there leaves its field empty; one that is damaged is in `problems` too."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def curve(self, key: str, records: list[dict[str, Any]] | None = None) -> list[tuple[float, float]]:
        """(step, value of `key`) for every record that has a finite one; steps by default."""
        found = []
        for record in self.steps if records is None else records:
            step, value = finite(record.get("step")), finite(record.get(key))
            if step is not None and value is not None:
                found.append((step, value))
        return found


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_run_files(run_dir: Path) -> RunFiles:
    """Read the files that a report is made of; only those inside `run_dir`, and none of them is required."""
    files = RunFiles(name=run_dir.resolve().name)
    files.config = _mapping(files, run_dir, "config.resolved.yaml", yaml.safe_load)
    files.environment = _mapping(files, run_dir, "env.json", json.loads)
    files.manifests = _mapping(files, run_dir, "data_manifest.json", json.loads)
    files.result = _mapping(files, run_dir, "result.json", json.loads)
    files.adapter = _mapping(files, run_dir, "adapter/adapter_config.json", json.loads)
    files.notes = [note for note in _list(files, run_dir, "notes.json") if isinstance(note, str)]
    files.samples = [sample for sample in _list(files, run_dir, "samples.json") if isinstance(sample, dict)]
    _read_metrics(files, run_dir / "metrics.jsonl")
    return files


def _mapping(files: RunFiles, run_dir: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    content = _read(files, run_dir, name, parse)
    if content is None:
        return {}
    if not isinstance(content, dict):
        files.problems.append(f"{name} holds no mapping")
        return {}
    return {str(key): value for key, value in content.items()}


def _list(files: RunFiles, run_dir: Path, name: str) -> list[Any]:
    content = _read(files, run_dir, name, json.loads)
    if content is not None and not isinstance(content, list):
        files.problems.append(f"{name} holds no list")
    return content if isinstance(content, list) else []


def _read(files: RunFiles, run_dir: Path, name: str, parse: Callable[[str], Any]) -> Any:
    path = run_dir / name
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        files.problems.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        return None


def _read_metrics(files: RunFiles, path: Path) -> None:
    """A run that was killed may leave half a line at the end, and a resumed one repeats steps: the later record counts."""
    if not path.is_file():
        return
    steps: dict[float, dict[str, Any]] = {}
    evaluations: dict[float, dict[str, Any]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step = finite(record.get("step")) if isinstance(record, dict) else None
        if record is None or step is None:
            damaged += 1
        elif record.get("kind") == "step":
            steps[step] = record
        elif record.get("kind") == "eval":
            evaluations[step] = record
    files.steps = [steps[step] for step in sorted(steps)]
    files.evaluations = [evaluations[step] for step in sorted(evaluations)]
    if damaged:
        files.problems.append(f"metrics.jsonl has {damaged} unreadable line{'s' if damaged > 1 else ''}")
