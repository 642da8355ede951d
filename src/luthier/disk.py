"""Files and folders that appear whole or not at all, and what they hash to."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What is being written stands beside its place under a name that begins so; a process that is killed leaves it there.
STAGING_PREFIX = ".staging-"
# A file system's clock may stand still for so long: a file written later than this ago may be written again at the same time.
SETTLED_NS = 2_000_000_000
_KNOWN_SHA256: dict[tuple[str, int, int, int, int, int], str] = {}


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """`sha256_of`, read once a process as long as the file is the same: its place, inode, size, and the times of its content
    and of its entry, of which no program can set the last one. A file changed a moment ago is read every time."""
    before = _identity(path)
    if before not in _KNOWN_SHA256:
        is_settled = time.time_ns() - max(before[-2:]) > SETTLED_NS
        digest = sha256_of(path)
        if not is_settled or _identity(path) != before:
            return digest
        _KNOWN_SHA256[before] = digest
    return _KNOWN_SHA256[before]


def _identity(path: Path) -> tuple[str, int, int, int, int, int]:
    about = path.stat()
    return str(path.resolve()), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def flush(path: Path) -> None:
    """Make a file's content durable, or where the system can a folder's list of names. Raises OSError if the disk refuses."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Delete a folder that is ours, if it is there. Raises OSError where it cannot be deleted."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path to write to; when the block ends without an error the file there is flushed and takes the place of `target`.

    At every moment `target` is the old file or the new one, whole. Raises OSError where the disk refuses anything.
    """
    staged = target.with_name(f"{STAGING_PREFIX}{target.name}-{secrets.token_hex(4)}")
    try:
        yield staged
        flush(staged)
        os.replace(staged, target)
        flush(target.parent)
    finally:
        staged.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8), whole. Raises OSError where the disk refuses."""
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(target: Path, place: Callable[[Path, Path], None]) -> Iterator[Path]:
    """A new folder beside `target` to write into, which becomes `target` when the block ends without an error.

    Everything in it is flushed, then place(staged, target) renames it, then the folder above is flushed: a reader sees
    nothing or everything, after a power cut too. After an error nothing of it is left. Folders above are made as needed.
    Raises OSError where the disk refuses anything.
    """
    staged = target.with_name(f"{STAGING_PREFIX}{target.name}-{secrets.token_hex(4)}")
    try:
        staged.mkdir(parents=True)
        yield staged
        for path in (*staged.rglob("*"), staged):
            flush(path)
        place(staged, target)
        flush(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
