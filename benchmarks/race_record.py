"""What training.py keeps: one JSON file that grows with every finished process, and the processes themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A resumed benchmark must agree in these with the one it goes on with.
FIXED = ("model", "threads", "seed", "warmup", "passes")
MEMORY_LEFT_BYTES = 512 << 20


class Record:
    """The state of a benchmark and the file it is kept in, if any; written whole after every change.

    state: started, options, facts (of model and tasks), machine, collators, and, each by a key, finished processes:
    trials, runs, lengths, exactness.
    """

    def __init__(self, path: Path | None, options: dict[str, Any], *, resume: bool):
        self.path = path
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.state: dict[str, Any] = {"benchmark": "training", "started": started, "options": options}
        if resume:
            self._read(options)
        for part in ("trials", "runs", "lengths", "exactness", "collators"):
            self.state.setdefault(part, {})

    def _read(self, options: dict[str, Any]) -> None:
        if self.path is None or not self.path.is_file():
            raise SystemExit("--resume goes on with the file that --out names; there is none. Leave --resume out.")
        before = json.loads(self.path.read_text(encoding="utf-8"))
        other = [key for key in FIXED if before["options"].get(key) != options[key]]
        if other:
            raise SystemExit(f"a resumed benchmark keeps its options; {', '.join(other)} differ from {self.path}.")
        self.state = {**before, "options": options}

    def accept_facts(self, facts: dict[str, Any]) -> None:
        """Take in what was prepared. SystemExit if a task of the file holds other rows now."""
        for task in facts["tasks"].values():
            task.pop("file", None)
        known = self.state.get("facts", {"tasks": {}})["tasks"]
        other = [name for name, task in facts["tasks"].items() if name in known and known[name] != task]
        if other:
            raise SystemExit(f"a resumed benchmark keeps its rows and steps; {', '.join(other)} differ from {self.path}.")
        self.state["facts"] = {**facts, "tasks": {**known, **facts["tasks"]}}
        self.write()

    def has(self, part: str, key: str) -> bool:
        """Whether the process is done; one that failed is run again."""
        return key in self.state[part] and "failed" not in self.state[part][key]

    def put(self, part: str, key: str, content: dict[str, Any]) -> None:
        self.state[part][key] = content
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        staged = self.path.with_name(f".{self.path.name}.partial")
        staged.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, self.path)


def run_job(script: Path, work: Path, job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run one job in a process of its own; the JSON object on the last line it prints, with process_seconds.

    A process that ends otherwise gives {"failed": exit code, "message": the last line of its errors}.
    """
    path, errors = work / "job.json", work / "errors.txt"
    path.write_text(json.dumps(job), encoding="utf-8")
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "datasets"),
    }  # fmt: skip
    started = time.perf_counter()
    with errors.open("w", encoding="utf-8") as sink:
        done = subprocess.run(
            [sys.executable, str(script), "--part", str(path)], env=environment, stdout=subprocess.PIPE, stderr=sink, text=True,
            check=False,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return {"failed": f"exit code {done.returncode}", "message": lines[-1] if lines else "", "process_seconds": seconds}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": seconds}


def limit_memory() -> None:
    """Let this process allocate what is free now and no more, so that a step that does not fit fails by itself (Linux)."""
    import resource

    import psutil

    free = psutil.virtual_memory().available - MEMORY_LEFT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))
