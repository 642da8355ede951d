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

from luthier.disk import remove_tree, sha256_of, staged_folder, write_atomically
from luthier.errors import CheckpointError

MANIFEST = "MANIFEST.json"


def to_json(value: Any) -> str:
    """JSON with NaN and Inf refused (ValueError), two spaces of indent, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
    """Make `folder` appear whole or not at all: staged beside it, with a manifest, synced, then renamed into place.

    fill(staging) writes the files. needed_bytes is what they will take, for the message when the disk is full.
    Raises CheckpointError when the disk refuses anything; whatever else stood in the parent is untouched.
    """
    renamed = False

    def place(staging: Path, target: Path) -> None:
        nonlocal renamed
        remove_tree(target)
        os.rename(staging, target)
        renamed = True

    try:
        with staged_folder(folder, place) as staging:
            fill(staging)
            write_manifest(staging, [path for path in staging.rglob("*") if path.is_file()], facts)
    except (OSError, SafetensorError) as error:
        if renamed:  # and yet not known to be on the disk
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(explain_write_error(error, folder, needed_bytes)) from error


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
