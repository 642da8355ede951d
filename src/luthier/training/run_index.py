"""Reading run directories back: what was asked for, how far it came, and whether its files are as it wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.disk import sha256_of
from luthier.errors import CheckpointError
from luthier.training.checkpoint import checkpoint_paths
from luthier.training.files import read_manifest
from luthier.training.lock import is_locked
from luthier.training.run_files import finite
from luthier.training.rundir import (
    CHECKPOINTS,
    CONFIG,
    DATA_MANIFEST,
    ENVIRONMENT,
    RESULT,
    is_finished,
    read_config,
    read_json,
    read_metrics,
)

DETAILS = ("config", "result", "environment", "data_manifest", "checkpoints")


def list_runs(root: Path) -> list[dict[str, Any]]:
    """One summary a run directory in `root`, newest first: what `read_run` gives without config, result, environment,
    data and checkpoints. A directory that cannot be read has status "damaged". Raises CheckpointError if `root` cannot."""
    try:
        paths = [path for path in root.iterdir() if _holds_a_run(path)] if root.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"a folder of runs must be readable; {root}: {error.strerror}. Try another --root.") from error
    summaries = []
    for path in paths:
        try:
            summary = read_run(path)
        except CheckpointError:
            summary = {"run_dir": str(path), "status": "damaged", "started": None}
        summaries.append({key: value for key, value in summary.items() if key not in DETAILS})
    return sorted(summaries, key=lambda summary: (summary["started"] or "", summary["run_dir"]), reverse=True)


def _holds_a_run(path: Path) -> bool:
    try:
        return (path / CONFIG).is_file()
    except OSError:
        return False


def read_run(path: Path) -> dict[str, Any]:
    """What a run was asked to do and how far it came, JSON-able.

    Keys: run_dir, status (finished, running, interrupted), started (ISO time), model, data, method, steps, loss_last,
    seconds, eval; and the whole of config, result, environment, data_manifest, checkpoints.
    Raises CheckpointError if `path` is no run directory.
    """
    config = read_config(path)
    result = read_json(path / RESULT) if is_finished(path) else {}
    environment = read_json(path / ENVIRONMENT)
    started = environment.get("started")
    steps = [record for record in read_metrics(path) if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    status = "finished" if result else "running" if is_locked(path) else "interrupted"
    return {
        "run_dir": str(path), "status": status, "started": started if isinstance(started, str) else None,
        "model": config.get("model"), "data": config.get("data"), "method": config.get("method"),
        "steps": last.get("step", 0), "loss_last": finite(last.get("loss")),
        "seconds": sum(finite(record.get("seconds")) or 0.0 for record in steps), "eval": result.get("eval"),
        "config": config, "result": result or None, "environment": environment,
        "data_manifest": read_json(path / DATA_MANIFEST),
        "checkpoints": [str(one) for one in checkpoint_paths(path / CHECKPOINTS)],
    }  # fmt: skip


def changed_files(path: Path) -> list[str]:
    """Files of a finished run that do not match its MANIFEST.json. Raises ValueError, with the reason, if that is damaged."""
    listed = read_manifest(path).get("files")
    if not isinstance(listed, dict):
        raise ValueError("MANIFEST.json lists no files")
    return [name for name, facts in listed.items() if not _matches(path / name, facts)]


def _matches(path: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]
    except OSError:
        return False
