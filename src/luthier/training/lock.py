"""One process at a time on a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from luthier.errors import CheckpointError

LOCK_FILE = ".lock"
ATTEMPTS = 500
WAIT_SECONDS = 0.01
# A link would lead the process id into another file, and opening a pipe would wait for its other end.
OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class RunLock:
    """An exclusive lock on `folder`, held by the kernel for this process and gone with it, however it ends.

    The lock file holds the process id, for the message. A file left behind by a process that died locks nothing.
    Raises CheckpointError, naming the process, if another one holds the lock; OSError where there can be no lock file or
    the file system has no locks.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        for _ in range(ATTEMPTS):
            descriptor = self._take()
            if descriptor is not None:
                break
        else:
            raise CheckpointError(f"one process at a time may work on a run; {self.path} is never free. Try again.")
        self._descriptor = descriptor

    def _take(self) -> int | None:
        """The file at the path, locked; None where that is to be tried again."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o644)
        taken = False
        try:
            if _lock(descriptor, fcntl.LOCK_EX):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                taken = self._is_current(descriptor)
            elif _lock(descriptor, fcntl.LOCK_SH):
                time.sleep(WAIT_SECONDS)  # nobody held it: `is_locked` was looking
            else:
                raise CheckpointError(
                    f"one process at a time may work on a run; {self.path.parent} is in use by process {_holder(descriptor)}. "
                    "Wait for it or stop it, or choose another folder with --out."
                )
        finally:
            if not taken:
                os.close(descriptor)
        return descriptor if taken else None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the file locked is still the one at the path: its last holder may have deleted it in between."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Delete the lock file, unless it is another's by now, and give the lock up."""
        if self._is_current(self._descriptor):
            with contextlib.suppress(OSError):  # a file that stays locks nothing
                self.path.unlink()
        os.close(self._descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the lock of `folder`. Looking keeps no run from starting: it waits a moment.

    False too where there is no lock file that can be read, or the file system has no locks.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | OPEN_FLAGS)
    except OSError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Lock without waiting; False where another descriptor's lock is in the way. Raises OSError where locks do not work."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
