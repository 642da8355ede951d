"""Rendered rows kept in the cache, so that the same rows are rendered and tokenized once.

What is kept is found by what decides it: the bytes of the data, the tokenizer with its template, and the settings. Nothing
of a hit is taken on trust: a file that is damaged is removed and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from luthier.data.read import Source
from luthier.data.render import Renderer
from luthier.data.row_file import FORMAT, RowFile, read_row_file, write_row_file
from luthier.errors import PreflightError
from luthier.models.cache import cache_folder
from luthier.units import size_text

FOLDER = "rows"
SUFFIX = ".safetensors"
MOST_BYTES = 2 * 10**9
STAGING = ".staging-"
STAGING_SECONDS = 24 * 3600.0


def row_key(sha256: str, source: Source, renderer: Renderer, on_long: str) -> str:
    """The name under which these rows are kept. sha256: of the data."""
    suffix = source.path.suffix.lower() if source.path else ""
    content = [FORMAT, sha256, source.kind, suffix, renderer.identity(), on_long]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class RowCache:
    """The rows kept in the folder `rows` of the cache, at most MOST_BYTES of them in all.

    note(text) is told whatever a person should know: that a file was damaged, that old ones were removed, that nothing
    could be kept. None of these stops a run.
    """

    def __init__(self, note: Callable[[str], None], most_bytes: int = MOST_BYTES):
        self._note = note
        self._most_bytes = most_bytes

    def read(self, key: str) -> RowFile | None:
        """What is kept under `key`, or None. A damaged file is removed."""
        folder = self._folder()
        path = folder / f"{key}{SUFFIX}" if folder else None
        if path is None or not path.exists():
            return None
        try:
            if not path.is_file() or path.stat().st_size > self._most_bytes:
                raise ValueError("it is no file of that kind")
            rows = read_row_file(path)
        except ValueError as error:
            _remove(path)
            self._note(f"rows kept in the cache were damaged ({path.name[:12]}...: {error}); they are removed and made again.")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now, so the last to be removed
        return rows

    def write(self, key: str, rows: RowFile) -> bool:
        """Keep `rows` under `key`, whole or not at all, and remove the oldest where there is no room. False if not kept."""
        folder = self._folder()
        if folder is None:
            return False
        path = folder / f"{key}{SUFFIX}"
        try:
            staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder)) / path.name
            try:
                write_row_file(staged, rows)
                return self._publish(staged, path)
            finally:
                shutil.rmtree(staged.parent, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            self._note(f"the rendered rows could not be kept in {folder}: {error}. --no-data-cache leaves the cache alone.")
            return False

    def _folder(self) -> Path | None:
        try:
            return cache_folder(FOLDER)
        except PreflightError as error:
            self._note(f"rendered rows are not kept: {error}")
            return None

    def _publish(self, staged: Path, path: Path) -> bool:
        size = staged.stat().st_size
        if size > self._most_bytes:
            self._note(
                f"the rendered rows take {size_text(size)}, more than the {size_text(self._most_bytes)} that the cache keeps "
                "in all; they will be rendered again."
            )
            return False
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
        self._make_room(path)
        return True

    def _make_room(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest fits, and what killed processes have left."""
        found = []
        for entry in newest.parent.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it just now
                about = entry.stat()
                if entry.name.startswith(STAGING):
                    if time.time() - about.st_mtime > STAGING_SECONDS:
                        _remove(entry)
                elif entry.suffix == SUFFIX:
                    found.append((entry == newest, about.st_mtime, entry, about.st_size))
        total, removed = sum(size for *_, size in found), []
        for is_newest, _, entry, size in sorted(found):
            if total <= self._most_bytes or is_newest:
                break
            _remove(entry)
            removed.append(size)
            total -= size
        if removed:
            self._note(
                f"the cache keeps {size_text(self._most_bytes)} of rendered rows; {size_text(sum(removed))} of the oldest "
                f"({len(removed)} {'file' if len(removed) == 1 else 'files'}) were removed."
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
