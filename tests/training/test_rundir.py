"""The run directory: reserved, locked, sealed, listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.training import rundir
from luthier.training.lock import LOCK_FILE, RunLock, is_locked
from luthier.training.rundir import changed_files, list_runs, read_metrics, read_run, reopen, reserve


def make_run(path: Path) -> Path:
    with reserve(path, overwrite=False) as run:
        run.write_json("env.json", {"started": f"2026-01-01T00:00:0{len(path.name)}"})
        run.write_config({"data": "a.jsonl", "model": "m", "method": "lora"})
        for step in range(1, 4):
            run.append_metrics({"kind": "step", "step": step, "loss": 1 / step, "seconds": 0.5})
    return path


def test_reserve_refuses_what_is_there(tmp_path: Path) -> None:
    """Case 17."""
    run = make_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        reserve(run, overwrite=False)
    assert str(caught.value) == (
        f"--out must be a new or empty folder; {run} already holds a run. Go on with `luthier resume {run}`, "
        "replace it with --overwrite, or choose another name."
    )
    with pytest.raises(ConfigError, match=r"holds other files\. Choose another name"):
        reserve(tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match=r"is a file\. Choose another name"):
        reserve(tmp_path / "file", overwrite=True)


def test_overwrite_clears_only_when_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with reserve(run, overwrite=True) as again:
        assert (run / "metrics.jsonl").exists()
        again.clear()
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]


def test_unused_directory_goes_away_and_an_empty_one_stays(tmp_path: Path) -> None:
    with reserve(tmp_path / "new", overwrite=False) as run:
        run.remove_if_unused()
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with reserve(tmp_path / "empty", overwrite=False) as run:
        run.remove_if_unused()
    assert (tmp_path / "empty").exists()


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Case 11: also for root, whom permissions do not stop."""
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"run directory must be writable; .*: Not a directory\. Choose another folder"):
        reserve(tmp_path / "file" / "run", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    """Case 11."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PreflightError, match="Permission denied"):
            reserve(tmp_path / "run", overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def test_second_process_is_refused_with_the_pid(tmp_path: Path) -> None:
    """Case 15."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom luthier.training.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]))\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            RunLock(tmp_path)
        assert f"{tmp_path} is in use by process {other.pid}." in str(caught.value)
        other.kill()
        other.wait()
    assert (tmp_path / LOCK_FILE).exists()
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_reopen_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a run directory holds config\.resolved\.yaml; .* does not\. `luthier runs ls`"):
        reopen(tmp_path)


def test_seal_notices_changes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with reopen(run) as opened:
        (run / "checkpoints" / "step-1").mkdir(parents=True)
        (run / "checkpoints" / "step-1" / "big").write_text("x")
        (run / ".adapter.12.tmp").mkdir()
        (run / ".adapter.12.tmp" / "x").write_text("x")
        opened.remove_leftovers()
        opened.seal()
    assert sorted(json.loads((run / "MANIFEST.json").read_text())["files"]) == [
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
    ]
    assert changed_files(run) == []
    (run / "env.json").write_text("{}")
    (run / "metrics.jsonl").unlink()
    assert changed_files(run) == ["env.json", "metrics.jsonl"]


def test_metrics_rewind_drops_later_and_torn_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    with reopen(run) as opened:
        kept = opened.rewind_metrics(2)
    assert [record["step"] for record in kept] == [1, 2]
    assert read_metrics(run) == kept


def test_list_and_show(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "bb")
    (tmp_path / "bb" / rundir.RESULT).write_text('{"eval": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}}')
    (tmp_path / "bb" / "MANIFEST.json").write_text("{}")
    (tmp_path / "ccc").mkdir()
    (tmp_path / "ccc" / rundir.CONFIG).write_text("[")
    summaries = list_runs(tmp_path)
    assert [(one["run_dir"], one["status"]) for one in summaries] == [
        (str(second), "finished"),
        (str(first), "interrupted"),
        (str(tmp_path / "ccc"), "damaged"),
    ]
    assert (summaries[0]["steps"], summaries[0]["seconds"], summaries[0]["eval"]["after"]["loss"]) == (3, 1.5, 1.0)
    with reopen(first):
        assert read_run(first)["status"] == "running"
    assert json.dumps(read_run(first))
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "nowhere")
