"""The directory of a run: its files, its lock, and reading it back."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.training.checkpoint import checkpoint_paths
from luthier.training.files import (
    MANIFEST,
    explain_write_error,
    fsync_path,
    read_manifest,
    remove_tree,
    sha256_of,
    to_json,
    write_atomically,
    write_manifest,
)
from luthier.training.lock import LOCK_FILE, RunLock, is_locked

CONFIG = "config.resolved.yaml"
ENVIRONMENT = "env.json"
DATA_MANIFEST = "data_manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
PLAN = "plan.json"
RESULT = "result.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"


class RunDir:
    """A run directory that this process has locked. `with` releases the lock.

    Made by `reserve` for a new run or `reopen` for one that goes on.
    """

    def __init__(self, path: Path, lock: RunLock, created: bool = False):
        self.path = path
        self._lock = lock
        self._created = created

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def write_text(self, name: str, text: str) -> None:
        """Replace a file of the directory, whole. Raises CheckpointError if the disk refuses."""
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise CheckpointError(explain_write_error(error, self.path / name)) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, to_json(value))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.resolved.yaml: every key, defaults included, in the schema's order."""
        self.write_text(CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl and hand it to the operating system. Raises CheckpointError if the disk refuses."""
        path = self.path / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(explain_write_error(error, path)) from error

    def sync_metrics(self) -> None:
        """Make metrics.jsonl durable; done before every checkpoint, so that it is never behind one."""
        path = self.path / METRICS
        try:
            path.touch()
            fsync_path(path)
        except OSError as error:
            raise CheckpointError(explain_write_error(error, path)) from error

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step` and any that are not whole; return what is left. Resuming makes them anew."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        self.write_text(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def clear(self) -> None:
        """Delete everything in the directory but the lock. Raises CheckpointError if something cannot be deleted."""
        try:
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    remove_tree(entry)
                elif entry.name != LOCK_FILE:
                    entry.unlink()
        except OSError as error:
            raise CheckpointError(f"{self.path} must be deletable to be overwritten; {error}.") from error

    def remove_leftovers(self) -> None:
        """Delete what an interrupted save has left: hidden files and folders other than the lock."""
        for entry in self.path.glob(".*"):
            if entry.is_dir():
                remove_tree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()

    def remove_if_unused(self) -> None:
        """Remove the directory again if this process made it and wrote nothing into it."""
        if self._created and [entry.name for entry in self.path.iterdir()] == [LOCK_FILE]:
            (self.path / LOCK_FILE).unlink()
            self.path.rmdir()

    def seal(self) -> None:
        """Write MANIFEST.json over all files but the checkpoints, which have their own. A run with it is finished."""
        files = [path for path in self.path.rglob("*") if path.is_file() and self._is_sealed(path.relative_to(self.path))]
        try:
            for path in (*files, *{path.parent for path in files}):
                fsync_path(path)
            write_manifest(self.path, files, {"kind": "luthier run", "format": 1})
        except OSError as error:
            raise CheckpointError(explain_write_error(error, self.path)) from error

    def _is_sealed(self, name: Path) -> bool:
        return name.parts[0] not in (CHECKPOINTS, MANIFEST) and not name.parts[0].startswith(".")


def default_run_dir(data: str) -> Path:
    """runs/<date>-<time>-<data>, with a number at the end where that is taken."""
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(data).stem}"
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def reserve(path: Path, *, overwrite: bool) -> RunDir:
    """Make and lock the directory of a new run, and find out that it can be written to.

    overwrite: a run that is there already may be replaced, but only a run, and only by `RunDir.clear`, when the new one is
    ready to begin. Raises ConfigError if something is there that may not be replaced, PreflightError if nothing can
    be written there, CheckpointError if another process works on it.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out must be a folder; {path} is a file. Choose another name.")
    is_run = (path / CONFIG).exists()
    if path.is_dir() and any(entry.name != LOCK_FILE for entry in path.iterdir()):
        if not is_run:
            raise ConfigError(f"--out must be a new or empty folder; {path} holds other files. Choose another name.")
        if not overwrite:
            raise ConfigError(
                f"--out must be a new or empty folder; {path} already holds a run. Go on with `luthier resume {path}`, "
                "replace it with --overwrite, or choose another name."
            )
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 4096)
        return RunDir(path, RunLock(path), created)
    except OSError as error:
        raise PreflightError(
            f"the run directory must be writable; {path}: {error.strerror}. Choose another folder with --out."
        ) from error


def reopen(path: Path) -> RunDir:
    """Lock the directory of a run that was started before. Raises CheckpointError if it is none or is in use."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"a run directory holds {CONFIG}; {path} does not. `luthier runs ls` lists the runs there are.")
    try:
        return RunDir(path, RunLock(path))
    except OSError as error:
        raise CheckpointError(f"the run directory must be writable; {path}: {error.strerror}.") from error


def is_finished(path: Path) -> bool:
    """Whether the run in `path` came to its end."""
    return (path / RESULT).is_file() and (path / MANIFEST).is_file()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a line that a kill cut short is left out."""
    try:
        lines = (path / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = (_parsed(line) for line in lines)
    return [record for record in records if isinstance(record.get("step"), int)]


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object, or an empty one where `text` is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_file(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a run's config.resolved.yaml. Raises CheckpointError if it is missing or damaged."""
    try:
        content = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"a run directory holds a readable {CONFIG}; {path}: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / CONFIG} must hold `key: value` lines; it holds a {type(content).__name__}.")
    return content


def list_runs(root: Path) -> list[dict[str, Any]]:
    """One summary a run directory in `root`, newest first: what `read_run` gives without config, result, environment,
    data and checkpoints. A directory that cannot be read has status "damaged"."""
    if not root.is_dir():
        return []
    summaries = []
    for path in root.iterdir():
        if not (path / CONFIG).is_file():
            continue
        try:
            summary = read_run(path)
        except CheckpointError:
            summary = {"run_dir": str(path), "status": "damaged", "started": None}
        summaries.append({key: value for key, value in summary.items() if key not in DETAILS})
    return sorted(summaries, key=lambda summary: (summary["started"] or "", summary["run_dir"]), reverse=True)


DETAILS = ("config", "result", "environment", "data_manifest", "checkpoints")


def read_run(path: Path) -> dict[str, Any]:
    """What a run was asked to do and how far it came, JSON-able.

    Keys: run_dir, status (finished, running, interrupted), started (ISO time), model, data, method, steps, loss_last,
    seconds, eval; and the whole of config, result, environment, data_manifest, checkpoints.
    Raises CheckpointError if `path` is no run directory.
    """
    config = read_config(path)
    result = _json_file(path / RESULT) if is_finished(path) else {}
    environment = _json_file(path / ENVIRONMENT)
    steps = [record for record in read_metrics(path) if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    status = "finished" if result else "running" if is_locked(path) else "interrupted"
    return {
        "run_dir": str(path), "status": status, "started": environment.get("started"),
        "model": config.get("model"), "data": config.get("data"), "method": config.get("method"),
        "steps": last.get("step", 0), "loss_last": last.get("loss"),
        "seconds": sum(record.get("seconds", 0.0) for record in steps), "eval": result.get("eval"),
        "config": config, "result": result or None, "environment": environment,
        "data_manifest": _json_file(path / DATA_MANIFEST),
        "checkpoints": [str(one) for one in checkpoint_paths(path / CHECKPOINTS)],
    }  # fmt: skip


def changed_files(path: Path) -> list[str]:
    """Files of a finished run that do not match its MANIFEST.json. Raises CheckpointError if that is damaged."""
    try:
        listed = read_manifest(path)["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"a finished run has a whole {MANIFEST}; {path}: {error}.") from error
    return [name for name, facts in listed.items() if not _matches(path / name, facts)]


def _matches(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]
