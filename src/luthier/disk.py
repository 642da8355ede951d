"""Files and folders that appear whole or not at all, and what they hash to."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What is being written stands beside its place under a name that begins so; a process that is killed leaves it there.
STAGING_PREFIX = ".staging-"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
