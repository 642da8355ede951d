"""One process at a time on a run directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from luthier.errors import CheckpointError

LOCK_FILE = ".lock"


class RunLock:
    """An exclusive lock on `folder`, held by the kernel for this process and gone with it, however it ends.

    The lock file holds the process id, for the message. A file left behind by a process that died locks nothing.
    Raises CheckpointError, naming the process, if another one holds the lock.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise CheckpointError(
                    f"one process at a time may work on a run; {folder} is in use by process {holder}. "
                    "Wait for it or stop it, or choose another folder with --out."
                ) from error
            if self._is_current():
                break
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _is_current(self) -> bool:
        """Whether the file locked is still the one at the path: its last holder may have deleted it in between."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Delete the lock file and give the lock up."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the lock of `folder`."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
