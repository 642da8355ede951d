"""Folders that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luthier import disk
from luthier.errors import AdapterError


@contextmanager
def staged_folder(target: Path, replaceable: frozenset[str], kept: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A new folder to write into, that takes the place of `target` when the block ends without an error.

    If `target` exists it may hold only files named in `replaceable` or `kept`; those in `kept` go over into the new
    folder. Swapping the two takes two renames: a process killed between them leaves the earlier save beside `target`,
    and `recover` puts it back.
    Raises AdapterError if `target` holds anything else or cannot be written.
    """
    target = target.resolve()
    recover(target)
    _check_target(target, replaceable | kept)
    try:
        with disk.staged_folder(target, _swap) as stage:
            yield stage
            for name in kept:
                if (target / name).is_file() and not (stage / name).exists():
                    shutil.copy2(target / name, stage / name)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise AdapterError(f"{target} could not be written; {error}. Free some space or choose another folder.") from error


def recover(target: Path) -> None:
    """Give an earlier save its name back, if a process was killed while it was being replaced and nothing stands there."""
    target = target.resolve()
    if target.exists() or not target.parent.is_dir():
        return
    earlier = [path for path in target.parent.glob(f".{glob.escape(target.name)}.*.old") if path.is_dir()]
    if earlier:
        os.replace(max(earlier, key=lambda path: path.stat().st_mtime_ns), target)
        disk.flush(target.parent)


def _check_target(target: Path, replaceable: frozenset[str]) -> None:
    if target.is_dir():
        others = sorted(file.name for file in target.iterdir() if file.name not in replaceable)
        if others:
            listed = ", ".join(others[:3])
            raise AdapterError(
                f"a folder to save in must be new, empty, or hold an earlier save alone; {target} holds {listed}."
            )
    elif target.exists() or target.is_symlink():
        raise AdapterError(f"a folder to save in must be new or a folder; {target} is a file.")


def _swap(stage: Path, target: Path) -> None:
    """Give `stage` the name of `target`; what stands there goes away when that is done, and stays when it fails."""
    if not target.is_dir():
        os.replace(stage, target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.replace(target, old)
    try:
        os.replace(stage, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
