"""Small runs for the tests of training: rows to learn, a configuration, and what to compare two runs by."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.config import RunConfig, make_config
from luthier.training.events import Listener, Record

COLOURS = ("red", "green", "blue", "black", "white", "grey", "brown", "pink")
THINGS = ("door", "wall", "boat", "lamp", "coat", "cup")


def write_rows(path: Path, count: int = 24, first: int = 0) -> Path:
    """`count` short conversations with an answer that can be learnt; no two are alike."""
    rows = []
    for number in range(first, first + count):
        colour, thing = COLOURS[number % len(COLOURS)], THINGS[number // len(COLOURS) % len(THINGS)]
        turns = [
            {"role": "user", "content": f"paint the {thing} {colour}"},
            {"role": "assistant", "content": json.dumps({"thing": thing, "colour": colour})},
        ]
        rows.append({"messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(model: Path, folder: Path, **changes: Any) -> RunConfig:
    """Ten steps of four rows out of fourteen, so that epochs end inside steps; data and run below `folder`."""
    data = folder / "train.jsonl"
    if not data.exists():
        write_rows(data, 14)
    keys = {
        "data": str(data), "model": str(model), "out": str(folder / "run"), "offline": True, "steps": 10, "batch_size": 4,
        "rank": 4, "alpha": 8, "learning_rate": 1e-2, "max_length": 128, "save_every": 3,
    }  # fmt: skip
    return make_config(keys, changes)


def adapter_hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    unstable = {"seconds", "tokens_per_second", "rss_bytes"}
    return [{key: value for key, value in record.items() if key not in unstable} for record in metrics(run_dir)]


class Recorder(Listener):
    """Keeps every event; `at_step` is called after each step with its number."""

    def __init__(self, at_step: Callable[[int], None] | None = None):
        self.notes: list[str] = []
        self.records: list[Record] = []
        self.saved_paths: list[Path] = []
        self.info: Record = {}
        self.finished = False
        self.at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, info: Record) -> None:
        self.info = info

    def step(self, record: Record) -> None:
        self.records.append(record)
        if self.at_step is not None:
            self.at_step(record["step"])

    def evaluated(self, record: Record) -> None:
        self.records.append(record)

    def saved(self, path: Path) -> None:
        self.saved_paths.append(path)

    def finish(self, result: object) -> None:
        self.finished = True


def send_at(step: int, *signals: signal.Signals) -> Recorder:
    """A listener that sends this process `signals` after the given step."""

    def send(number: int) -> None:
        if number == step:
            for one in signals:
                os.kill(os.getpid(), one)

    return Recorder(send)
