"""Where fetched models and what is made of them are kept, how a file or folder gets there whole, and whether it still is."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from luthier.disk import sha256_of, staged_folder
from luthier.errors import PreflightError

SEAL = ".sha256.json"


def cache_root() -> Path:
    """$LUTHIER_CACHE, else $XDG_CACHE_HOME/luthier, else ~/.cache/luthier. It need not exist yet."""
    if os.environ.get("LUTHIER_CACHE"):
        return Path(os.environ["LUTHIER_CACHE"]).expanduser().absolute()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).expanduser().absolute() / "luthier"
    return Path.home() / ".cache" / "luthier"


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, made if it is not there. Raises PreflightError where it cannot be made or written to."""
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(
            f"the cache must be a folder that can be written to; {folder}: {error.strerror}. Set LUTHIER_CACHE to another one."
        ) from error
    if not os.access(folder, os.W_OK):
        raise PreflightError(
            f"the cache must be a folder that can be written to; {folder} is not. Set LUTHIER_CACHE to another one."
        )
    return folder


def publish(destination: Path) -> AbstractContextManager[Path]:
    """A staging folder whose content becomes `destination` when the block ends well, and goes away when it does not.

    Files are flushed to disk before the rename, so a reader sees nothing or everything, after a power cut too. Where
    another process published first, its folder stays and this one's is dropped.
    """
    return staged_folder(destination, _first_come)


def _first_come(stage: Path, destination: Path) -> None:
    try:
        stage.rename(destination)
    except OSError:
        if not destination.is_dir():
            raise


def seal(folder: Path) -> None:
    """Write the sha256 of every file of a folder into it, for `is_whole`."""
    (folder / SEAL).write_text(json.dumps(_hashes(folder), indent=1), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder holds the files it was sealed with, unchanged. Reads them all."""
    try:
        return json.loads((folder / SEAL).read_text(encoding="utf-8")) == _hashes(folder)
    except (OSError, ValueError, RecursionError):
        return False


def discard(path: Path) -> None:
    """Remove a folder or file of the cache, so that it is made again. Raises PreflightError where it cannot be removed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise PreflightError(
            f"what is damaged in the cache must be removable; {path}: {error.strerror}. Remove it, or set LUTHIER_CACHE."
        ) from error


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SEAL:
            hashes[path.relative_to(folder).as_posix()] = sha256_of(path)
    return hashes
