"""Memory that large results were in, kept for the next ones."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
ALL_BYTES = 2**30


def keep_freed_memory(largest_bytes: int = ALL_BYTES) -> bool:
    """Tell the C library not to give freed blocks back to the system at once; True if it understood.

    largest_bytes: those of so many or more are mapped by themselves all the same, and leave the process when they are freed.

    glibc returns a block above 32 MiB when it is freed, and the next tensor of that size pays a page fault for each of
    its pages: a pass over 64 MiB then takes about five times as long. What stays is what the process needed at its peak.
    Linux with glibc only; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, largest_bytes) & mallopt(_TRIM_THRESHOLD, _MOST))
