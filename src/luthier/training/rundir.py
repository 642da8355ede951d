"""The directory of a run that a process has locked: its files, written and read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier.disk import STAGING_PREFIX, flush, remove_tree, write_atomically
from luthier.errors import CheckpointError
from luthier.training.files import MANIFEST, explain_write_error, to_json, write_manifest
from luthier.training.lock import LOCK_FILE, RunLock

CONFIG = "config.resolved.yaml"
ENVIRONMENT = "env.json"
DATA_MANIFEST = "data_manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
PLAN = "plan.json"
NOTES = "notes.json"
RESULT = "result.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"
PLOTS = "plots"
FROZEN = "frozen"
INITIAL = "initial.safetensors"
NAMES = frozenset(
    {CONFIG, ENVIRONMENT, DATA_MANIFEST, METRICS, SAMPLES, PLAN, NOTES, RESULT, REPORT, CHECKPOINTS, ADAPTER, MODEL, PLOTS}
    | {FROZEN, INITIAL, MANIFEST, LOCK_FILE}
)
# What a save leaves that was killed: while it wrote, and between its two renames.
LEFTOVERS = (STAGING_PREFIX, f".{ADAPTER}.", f".{MODEL}.")
# The order in which a run is deleted: what makes it a finished one first, what makes it a run last. Whatever is left
# when that is cut short is no other run than it was, and can be overwritten.
CLEARED_FIRST = (MANIFEST, RESULT, CHECKPOINTS)
CLEARED_LAST = (ENVIRONMENT, CONFIG)


class RunDir:
    """A run directory that this process has locked. `with` releases the lock, and removes the directory if this process
    made it and wrote nothing into it.

    Made by `reserve` or `reserve_default` for a new run, by `reopen` for one that goes on; see reserve.py.
    """

    def __init__(self, path: Path, lock: RunLock, made: list[Path]):
        self.path = path
        self._lock = lock
        self._made = made

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self.path in self._made:
            remove_empty(self._made)

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
            flush(path)
        except OSError as error:
            raise CheckpointError(explain_write_error(error, path)) from error

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step` and any that are not whole; return what is left. Resuming makes them anew."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        self.write_text(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def add_note(self, text: str) -> None:
        """Add a sentence to notes.json, once. Raises CheckpointError if the disk refuses."""
        kept = read_notes(self.path)
        if text not in kept:
            self.write_json(NOTES, [*kept, text])

    def clear(self) -> None:
        """Delete all that a run has written, the configuration last, and keep the lock.

        Raises CheckpointError if something cannot be deleted.
        """
        try:
            for name in sorted(names_in(self.path), key=_when_cleared):
                if name == CONFIG:
                    flush(self.path)
                if name != LOCK_FILE and is_a_runs(name):
                    _delete(self.path / name)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} must be deletable to be overwritten; {error}. Change its permissions, or choose another --out."
            ) from error

    def remove_leftovers(self) -> None:
        """Delete what an interrupted save has left beside checkpoints. Raises CheckpointError if that cannot be deleted."""
        try:
            for folder in (self.path, self.path / PLOTS):
                for name in names_in(folder) if folder.is_dir() else ():
                    if name.startswith(LEFTOVERS):
                        _delete(folder / name)
        except OSError as error:
            raise CheckpointError(
                f"what an interrupted save has left in {self.path} must be deletable; {error}. Change its permissions."
            ) from error

    def seal(self) -> None:
        """Write MANIFEST.json over all files but the checkpoints, which have their own. A run with it is finished."""
        try:
            files = [path for path in self.path.rglob("*") if path.is_file() and self._is_sealed(path.relative_to(self.path))]
            for path in (*files, *{path.parent for path in files}):
                flush(path)
            write_manifest(self.path, files, {"kind": "luthier run", "format": 1})
        except OSError as error:
            raise CheckpointError(explain_write_error(error, self.path)) from error

    def _is_sealed(self, name: Path) -> bool:
        return name.parts[0] not in (CHECKPOINTS, MANIFEST) and not any(part.startswith(".") for part in name.parts)


def is_finished(path: Path) -> bool:
    """Whether the run in `path` came to its end."""
    try:
        return (path / RESULT).is_file() and (path / MANIFEST).is_file()
    except OSError:
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a line that a kill cut short is left out."""
    try:
        lines = (path / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = (_parsed(line) for line in lines)
    return [record for record in records if isinstance(record.get("step"), int)]


def read_notes(path: Path) -> list[str]:
    """The sentences of a run's notes.json; none where it is missing or damaged."""
    try:
        content = json.loads((path / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [text for text in content if isinstance(text, str)] if isinstance(content, list) else []


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, or an empty one where it is missing or holds none."""
    try:
        return _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object, or an empty one where `text` is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a run's config.resolved.yaml. Raises CheckpointError if it is missing or damaged."""
    try:
        content = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"a run directory holds a readable {CONFIG}; {path}: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / CONFIG} must hold `key: value` lines; it holds a {type(content).__name__}.")
    return content


def is_a_beginning(names: list[str]) -> bool:
    """Whether files so named, none of which is the configuration, are what a run leaves that was killed while it began."""
    visible = [name for name in names if not name.startswith(".")]
    return all(map(is_a_runs, names)) and (not visible or ENVIRONMENT in visible)


def is_a_runs(name: str) -> bool:
    return name in NAMES or name.startswith(LEFTOVERS)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that this process has made, innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink()


def _when_cleared(name: str) -> int:
    if name in CLEARED_FIRST:
        return CLEARED_FIRST.index(name) - len(CLEARED_FIRST)
    return 1 + CLEARED_LAST.index(name) if name in CLEARED_LAST else 0
