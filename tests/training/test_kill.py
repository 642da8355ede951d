"""Case 1: SIGKILL at any moment, mid-save too; the run goes on and ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NEVER = 1_000_000


def trials(model: Path, folder: Path, kills: list[int]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "kill_trials.py"), str(model), str(folder), *map(str, kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["trials"]


def check(model: Path, folder: Path, kills: list[int]) -> list[dict[str, Any]]:
    """Run the trials, the first of them never killed, and compare all with it."""
    straight, *others = trials(model, folder, [NEVER, *kills])
    assert straight["finished_by_itself"]
    started = [one for one in others if one["started"]]
    assert {one["hash"] for one in started} == {straight["hash"]}
    return started


def test_killed_at_chosen_moments(tiny_llama: Path, tmp_path: Path) -> None:
    """In a save, between rename and prune (case 2), after a step, while the results are written."""
    started = check(tiny_llama, tmp_path, [30, 41, 66])
    assert len(started) == 3
    assert all(one["resumes"] >= 1 for one in started)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(tiny_llama: Path, tmp_path: Path) -> None:
    started = check(tiny_llama, tmp_path, random.Random(0).sample(range(130), 100))
    assert len(started) >= 80
