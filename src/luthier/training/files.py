"""Writing files so that they are whole or absent, and saying exactly what is on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from luthier.errors import CheckpointError

MANIFEST = "MANIFEST.json"
STAGING_PREFIX = ".staging-"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable. Raises OSError where the disk refuses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """JSON with NaN and Inf refused (ValueError), two spaces of indent, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8): at every moment it is the old file or the new one, whole."""
    staged = path.with_name(f"{STAGING_PREFIX}{path.name}")
    staged.write_text(text, encoding="utf-8")
    fsync_path(staged)
    os.replace(staged, path)
    fsync_path(path.parent)


def write_manifest(folder: Path, files: Iterable[Path], facts: dict[str, Any]) -> None:
    """Write MANIFEST.json of `folder`: `facts`, the sha256 and size of each file by its name inside the folder, and under
    `self` the sha256 of all that, so that a changed manifest is noticed too."""
    listed = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in sorted(files)
    }
    content = {**facts, "files": listed}
    write_atomically(folder / MANIFEST, to_json({**content, "self": _sha256_of_json(content)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote. Raises ValueError, with the reason, if it is missing, not JSON, or was changed."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is missing or damaged") from error
    if not isinstance(content, dict) or content.pop("self", None) != _sha256_of_json(content):
        raise ValueError(f"{MANIFEST} is damaged: its content does not match its own sha256")
    return content


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_folder(folder: Path, fill: Callable[[Path], None], needed_bytes: int, facts: dict[str, Any]) -> None:
    """Make `folder` appear whole or not at all: staged beside it, synced, with a manifest, then renamed into place.

    fill(staging) writes the files. needed_bytes is what they will take, for the message when the disk is full.
    Raises CheckpointError when the disk refuses anything; whatever else stood in the parent is untouched.
    """
    staging = folder.with_name(STAGING_PREFIX + folder.name)
    renamed = False
    try:
        remove_tree(staging)
        staging.mkdir(parents=True)
        fill(staging)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in files:
            fsync_path(path)
        write_manifest(staging, files, facts)
        fsync_path(staging)
        remove_tree(folder)
        os.rename(staging, folder)
        renamed = True
        fsync_path(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder if renamed else staging, ignore_errors=True)
        raise CheckpointError(explain_write_error(error, folder, needed_bytes)) from error


def remove_tree(folder: Path) -> None:
    """Delete a folder that is ours, if it is there. Raises OSError where it cannot be deleted."""
    if folder.exists():
        shutil.rmtree(folder)


def explain_write_error(error: Exception, path: Path, needed_bytes: int | None = None) -> str:
    """What went wrong when writing `path`, and what to do."""
    number = error.errno if isinstance(error, OSError) else _os_error_number(str(error))
    reason = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        wanted = f" needs {needed_bytes:,} bytes of free disk;" if needed_bytes else " needs free disk;"
        return f"saving {path}{wanted} the disk is full ({reason}). Free some space, then go on with `luthier resume`."
    return f"saving {path} must reach the disk; it did not: {reason}. Check the disk and its permissions."


def _os_error_number(text: str) -> int | None:
    """The number that safetensors, which raises no OSError, puts in its message: `... (os error 28)`."""
    found = re.search(r"os error (\d+)", text)
    return int(found[1]) if found else None
