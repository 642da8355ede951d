"""Case 1: SIGKILL at any moment, while it starts and mid-save too; the run goes on and ends as the uninterrupted one,
bit for bit, or is started again as its message says."""

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
IN_TRAINING = ["os.rename step-2", "os.unlink weights", "step 3", "os.replace result.json"]
AT_THE_START = ["os.mkdir run-", "os.replace env.json", "os.replace config", "checkpoint.save_file optimizer"]
OVERWRITING = ["os.unlink MANIFEST", "os.unlink metrics", "os.unlink config"]


def trials(model: Path, folder: Path, kills: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """The moments of a run that is not killed, and one trial for each of `kills`, all with the result of that run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "kill_trials.py"), str(model), str(folder), *kills]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout.splitlines()[-1])
    straight, *others = content["trials"]
    assert straight["ended"] == ["finished"]
    assert [one["kill"] for one in others] == [kill.removeprefix("over:") for kill in kills]
    assert {one["hash"] for one in others} <= {straight["hash"]}
    return content["moments"], others


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What became of each process of each trial, by the moment at which the first one was killed."""
    kills = [*IN_TRAINING, *AT_THE_START, *(f"over:{kill}" for kill in OVERWRITING)]
    _, others = trials(tiny_llama, tmp_path_factory.mktemp("kills"), kills)
    return {kill: one["ended"] for kill, one in zip(kills, others, strict=True)}


@pytest.mark.parametrize("kill", IN_TRAINING)
def test_killed_in_training(done: dict[str, list[str]], kill: str) -> None:
    """In a save, between rename and prune (case 2), after a step, while the results are written: resuming is all it takes."""
    assert done[kill][0] == "killed"
    assert "refused" not in done[kill]


@pytest.mark.parametrize("kill", AT_THE_START)
def test_killed_while_it_starts(done: dict[str, list[str]], kill: str) -> None:
    """Before there is a checkpoint: resuming says to start again, and that works."""
    assert done[kill][:2] == ["killed", "refused"]


@pytest.mark.parametrize("kill", OVERWRITING)
def test_killed_while_it_overwrites(done: dict[str, list[str]], kill: str) -> None:
    """At every deletion of the earlier run, the folder is that run still, or one that can be overwritten."""
    assert done[f"over:{kill}"][0] == "killed"


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(tiny_llama: Path, tmp_path: Path) -> None:
    """Over all moments of a run, those of its start included; every trial counts."""
    (tmp_path / "first").mkdir()
    moments, _ = trials(tiny_llama, tmp_path / "first", [])
    numbers = random.Random(0).sample(range(len(moments)), min(100, len(moments)))
    (tmp_path / "second").mkdir()
    _, done = trials(tiny_llama, tmp_path / "second", [str(number) for number in numbers])
    assert all(one["ended"][0] == "killed" for one in done)
    assert len(done) == len(numbers) >= 80
