"""The run directory: reserved, locked, sealed, listed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.training import rundir
from luthier.training.lock import LOCK_FILE, RunLock, is_locked
from luthier.training.reserve import reopen, reserve, reserve_default
from luthier.training.run_index import changed_files, list_runs, read_run
from luthier.training.rundir import read_metrics


def make_run(path: Path) -> Path:
    """A run of three steps without checkpoints."""
    with reserve(path, overwrite=False) as run:
        run.write_json("env.json", {"started": f"2026-01-01T00:00:0{len(path.name)}"})
        run.write_config({"data": "a.jsonl", "model": "m", "method": "lora"})
        for step in range(1, 4):
            run.append_metrics({"kind": "step", "step": step, "loss": 1 / step, "seconds": 0.5})
    return path


def test_reserve_refuses_what_is_there(tmp_path: Path) -> None:
    """Case 17."""
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    (run / "checkpoints" / "step-3" / "weights.safetensors").write_text("")
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


def test_unused_directory_goes_away_and_an_empty_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders above that were made for it too."""
    with reserve(tmp_path / "above" / "new", overwrite=False):
        pass
    assert not (tmp_path / "above").exists()
    (tmp_path / "empty").mkdir()
    with reserve(tmp_path / "empty", overwrite=False):
        pass
    assert list((tmp_path / "empty").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with reserve_default("data/train.jsonl") as run:
        assert run.path.parent == Path("runs")
    assert not Path("runs").exists()


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    with reserve_default("train.jsonl") as first, reserve_default("train.jsonl") as second:
        assert (first.path.name, second.path.name) == ("20260101-000000-train", "20260101-000000-train-2")


# What a run leaves that is killed while it writes the first files, in the order in which they come.
BEGINNINGS = [
    [".staging-env.json"],
    ["env.json"],
    ["env.json", "data_manifest.json", "samples.json", ".staging-plan.json"],
    ["env.json", "data_manifest.json", "samples.json", "plan.json", ".staging-config.resolved.yaml"],
]


@pytest.mark.parametrize("names", [*BEGINNINGS, ["env.json", "config.resolved.yaml"]])
def test_the_beginning_of_a_run_says_the_way_out_and_it_works(tmp_path: Path, names: list[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (LOCK_FILE, *names):
        (run / name).write_text("{}")
    with pytest.raises(ConfigError) as caught:
        reserve(run, overwrite=False)
    assert str(caught.value) == (
        f"--out must be a new or empty folder; {run} already holds a run that was stopped before its first checkpoint. "
        "Replace it with --overwrite, or choose another name."
    )
    if "config.resolved.yaml" not in names:
        with pytest.raises(
            CheckpointError, match=r"was stopped before it\. Start it again with `luthier train`, .*--overwrite"
        ):
            reopen(run)
    with reserve(run, overwrite=True) as again:
        again.clear()
        assert os.listdir(run) == [LOCK_FILE]


@pytest.mark.parametrize("names", [["checkpoints"], ["model"], ["env.json", "thesis.txt"], [".git", "env.json"]])
def test_folders_of_others_are_never_overwritten(tmp_path: Path, names: list[str]) -> None:
    """Names alone make no run: another program's `model` or `checkpoints` is not ours."""
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"holds other files\. Choose another name"):
        reserve(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_what_stands_beside_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"deletes only what a run has written; .* also holds thesis\.txt\. Move that away, or"
    ):
        reserve(run, overwrite=True)


def test_clearing_deletes_the_configuration_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    for name in ("result.json", "MANIFEST.json", "report.html"):
        (run / name).write_text("{}")
    gone: list[str] = []
    monkeypatch.setattr("luthier.training.rundir._delete", lambda path: gone.append(path.name))
    with reserve(run, overwrite=True) as again:
        again.clear()
    assert gone == ["MANIFEST.json", "result.json", "metrics.jsonl", "report.html", "env.json", "config.resolved.yaml"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_and_strange_lock_files(tmp_path: Path, overwrite: bool) -> None:
    """A lock that is a link is not followed: the file it leads to keeps its content."""
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"is a link that leads nowhere\. Choose another name"):
        reserve(tmp_path / "nowhere", overwrite=overwrite)
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "mine")
    with pytest.raises(PreflightError, match=r"Too many levels of symbolic links\. Choose another folder with --out"):
        reserve(tmp_path / "run", overwrite=overwrite)
    assert (tmp_path / "mine").read_text() == "years of work"
    (tmp_path / "other" / LOCK_FILE).mkdir(parents=True)
    with pytest.raises(PreflightError, match="Is a directory"):
        reserve(tmp_path / "other", overwrite=overwrite)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / LOCK_FILE)
    with pytest.raises(PreflightError, match="Invalid argument"):
        reserve(tmp_path / "pipe", overwrite=overwrite)
    assert not any(is_locked(tmp_path / name) for name in ("run", "other", "pipe"))


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run = make_run(tmp_path / "link")
    with reserve(run, overwrite=True) as again:
        again.clear()
    assert (tmp_path / "link").is_symlink()


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


def test_looking_at_a_lock_keeps_no_run_from_starting(tmp_path: Path) -> None:
    """`luthier runs ls` holds a shared lock for a moment; the run that starts waits for that."""
    (tmp_path / LOCK_FILE).write_text("")
    with (tmp_path / LOCK_FILE).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        lock = RunLock(tmp_path)
    assert is_locked(tmp_path)
    lock.release()


def test_releasing_leaves_the_lock_of_another(tmp_path: Path) -> None:
    """Someone has deleted the lock file of a run in progress, and another run has begun."""
    first = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    second = RunLock(tmp_path)
    first.release()
    assert is_locked(tmp_path)
    with pytest.raises(CheckpointError, match="is in use by process"):
        RunLock(tmp_path)
    second.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / LOCK_FILE).write_text("")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    open_before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(PreflightError, match=r"No locks available\. Choose another folder with --out"):
        reserve(tmp_path / "new", overwrite=False)
    with pytest.raises(CheckpointError, match="No locks available"):
        reopen(run)
    assert not is_locked(run)
    assert not open_before or len(os.listdir("/proc/self/fd")) == len(open_before)


def test_what_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / ".staging-x").mkdir()

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")

    with reserve(run, overwrite=True) as opened:
        monkeypatch.setattr("shutil.rmtree", fail)
        with pytest.raises(CheckpointError, match=r"must be deletable; .*Permission denied.*Change its permissions"):
            opened.remove_leftovers()
        with pytest.raises(CheckpointError, match=r"must be deletable to be overwritten; .*or choose another --out"):
            opened.clear()


def test_leftovers_are_ours_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "plots").mkdir()
    for name in (".staging-env.json", ".adapter.12.old", "plots/.staging-loss.png", ".gitignore"):
        (run / name).write_text("")
    with reopen(run) as opened:
        opened.remove_leftovers()
        opened.seal()
    hidden = sorted(path.name for path in run.rglob(".*"))
    assert hidden == [".gitignore"]
    assert not any(name.startswith(".") for name in json.loads((run / "MANIFEST.json").read_text())["files"])


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
