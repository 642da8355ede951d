"""What the C library does with memory that tensors let go of: keeps it for the next ones, or gives it back."""

from __future__ import annotations

import ctypes
import gc
import platform

from luthier.kernels.memory import keep_freed_memory

MALLOC_MMAP_THRESHOLD, MALLOC_TRIM_THRESHOLD, MALLOC_ARENA_MAX = -3, -1, -8
LARGE_BLOCK_BYTES = 1 << 20
# Above what a layer's activations take, below the second moments of a wide layer.
LARGEST_KEPT_BYTES = 8 << 20


def set_freed_memory_kept(kept: bool) -> None:
    """kept: what was freed stays in the process for the next tensors; faster, but blocks of different sizes leave gaps.

    Otherwise each block of 1 MiB or more is mapped by itself and leaves the process when it is freed: a step holds no
    more than its tensors, and each of their pages costs a page fault again, up to a fifth of a step. glibc only, for
    which alone this is known to matter.
    """
    if kept:
        keep_freed_memory()
    elif _is_glibc():
        ctypes.CDLL(None).mallopt(MALLOC_TRIM_THRESHOLD, LARGE_BLOCK_BYTES)
        ctypes.CDLL(None).mallopt(MALLOC_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def keep_small_freed_memory() -> None:
    """What was freed stays in the process but for blocks of LARGEST_KEPT_BYTES and more, and all threads share one heap.

    For work whose large tensors are few and of many sizes, between calls of `trim_free_memory`: it pays little for them in page
    faults, and they leave no gaps. glibc only.
    """
    if _is_glibc():
        keep_freed_memory(LARGEST_KEPT_BYTES)
        ctypes.CDLL(None).mallopt(MALLOC_ARENA_MAX, 1)


def release_free_memory() -> None:
    """Give what is free in this process back to the system, where the C library can."""
    gc.collect()
    trim_free_memory()


def trim_free_memory() -> None:
    """As `release_free_memory`, without looking for objects that only refer to each other: a matter of a millisecond."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
