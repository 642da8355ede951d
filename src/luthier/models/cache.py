"""Where fetched models and converted tokenizers are kept, and how a file or folder gets there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import PreflightError


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


@contextmanager
def publish(destination: Path) -> Iterator[Path]:
    """A staging folder whose content becomes `destination` when the block ends well, and goes away when it does not.

    Files are flushed to disk before the rename, so a reader sees nothing or everything, after a power cut too. Where
    another process published first, its folder stays and this one's is dropped.
    """
    stage = Path(tempfile.mkdtemp(prefix=".staging-", dir=destination.parent))
    try:
        yield stage
        for path in (*stage.rglob("*"), stage):
            _flush(path)
        stage.chmod(0o755)
        try:
            stage.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
        _flush(destination.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _flush(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
