"""How a run gets its directory: a new one reserved, or one that is there opened again, and locked either way."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from luthier.disk import STAGING_PREFIX
from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.training.checkpoint import checkpoint_paths
from luthier.training.lock import LOCK_FILE, RunLock
from luthier.training.rundir import (
    CHECKPOINTS,
    CONFIG,
    RunDir,
    is_a_beginning,
    is_a_runs,
    is_finished,
    names_in,
    remove_empty,
)


def reserve(path: Path, *, overwrite: bool) -> RunDir:
    """Make and lock the directory of a new run, and find out that it can be written to.

    overwrite: a run that is there already, or the beginning of one, may be replaced, but only that, and only by
    `RunDir.clear`, when the new one is ready to begin. Raises ConfigError if something is there that may not be replaced,
    PreflightError if nothing can be written there, CheckpointError if another process works on it.
    """
    with _writable(path):
        _check_replaceable(path, overwrite)
        run = _locked(path, _make(path))
        try:
            _check_replaceable(path, overwrite)  # another run may have come and gone before the lock was had
        except ConfigError:
            run.__exit__()
            raise
        return run


def reserve_default(data: str) -> RunDir:
    """As `reserve`, for runs/<date>-<time>-<data>, with a number at the end where another run has taken that."""
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(data).stem}"
    with _writable(base):
        for number in itertools.count(1):
            path = base if number == 1 else base.with_name(f"{base.name}-{number}")
            made = _make(path)
            if path in made:
                return _locked(path, made)
    raise AssertionError("numbers do not end")


def reopen(path: Path) -> RunDir:
    """Lock the directory of a run that was started before. Raises CheckpointError if it is none or is in use."""
    try:
        names = [name for name in names_in(path) if name != LOCK_FILE] if path.is_dir() else []
        if CONFIG in names:
            return RunDir(path, RunLock(path), [])
    except OSError as error:
        raise CheckpointError(
            f"the run directory must be writable; {path}: {error.strerror}. Change that, or copy the folder to where it is."
        ) from error
    if names and is_a_beginning(names):
        raise CheckpointError(
            f"a run goes on from its first checkpoint; the one in {path} was stopped before it. "
            f"Start it again with `luthier train`, --out {path} and --overwrite."
        )
    raise CheckpointError(
        f"a run directory holds {CONFIG}; {path} does not. "
        "`luthier runs ls` lists the runs there are, `luthier train` starts one."
    )


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"the run directory must be writable; {path}: {error.strerror}. Choose another folder with --out."
        ) from error


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Raise ConfigError if `path` holds what a new run may not replace, saying what to do."""
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            kind = "file" if path.exists() else "link that leads nowhere"
            raise ConfigError(f"--out must be a folder; {path} is a {kind}. Choose another name.")
        return
    names = [name for name in names_in(path) if name != LOCK_FILE]
    others = sorted(name for name in names if not is_a_runs(name))
    if not names:
        return
    if CONFIG not in names and (others or not is_a_beginning(names)):
        raise ConfigError(f"--out must be a new or empty folder; {path} holds other files. Choose another name.")
    if not overwrite:
        what, go_on = "a run that was stopped before its first checkpoint", "Replace it"
        if _can_resume(path):
            what, go_on = "a run", f"Go on with `luthier resume {path}`, replace it"
        raise ConfigError(
            f"--out must be a new or empty folder; {path} already holds {what}. "
            f"{go_on} with --overwrite, or choose another name."
        )
    if others:
        raise ConfigError(
            f"--overwrite deletes only what a run has written; {path} also holds {', '.join(others[:3])}. "
            "Move that away, or choose another --out."
        )


def _can_resume(path: Path) -> bool:
    return (path / CONFIG).exists() and (is_finished(path) or bool(checkpoint_paths(path / CHECKPOINTS)))


def _make(path: Path) -> list[Path]:
    """Make `path` and what is missing above it; returns the folders that this process has made, outermost first."""
    made = []
    for folder in reversed((path, *path.parents)):
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)
    return made


def _locked(path: Path, made: list[Path]) -> RunDir:
    try:
        with tempfile.TemporaryFile(dir=path, prefix=STAGING_PREFIX) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        return RunDir(path, RunLock(path), made)
    except BaseException:
        remove_empty(made)
        raise
