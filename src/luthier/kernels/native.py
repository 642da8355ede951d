"""The compiled library: found, checked and called.

Only one failure falls back to the references: the library is not there. It is said once. A library of another
version, or an instruction set that the machine lacks, is an error.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import luthier.kernels
from luthier.errors import ConfigError, LuthierError, ShapeError, nearest

ABI_VERSION = 7
LIBRARY_NAME = "libluthier_kernels.dylib" if sys.platform == "darwin" else "libluthier_kernels.so"
MODES = ("native", "reference")
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "neon")
STATUS_OK, STATUS_BAD_ARGUMENT, STATUS_NO_MEMORY, STATUS_FAILED = range(4)

_forced_mode: str | None = None


@dataclass(frozen=True)
class Active:
    """What runs the ops: mode is "native" or "reference"; the rest is None or empty without the library."""

    mode: str
    reason: str
    library: str | None
    instruction_set: str | None
    threads_from: str | None


def active() -> Active:
    """Which kernels this process uses, and why."""
    if _mode() == "reference":
        wanted = _forced_mode or os.environ.get("LUTHIER_KERNELS")
        reason = "LUTHIER_KERNELS=reference" if wanted == "reference" else f"{LIBRARY_NAME} is not installed"
        return Active("reference", reason, None, None, None)
    library = _load()
    assert library is not None
    threads_from = "the OpenMP runtime of the process" if library.lt_thread_backend() == 1 else "its own pool"
    return Active("native", "installed", library._name, INSTRUCTION_SETS[library.lt_isa()], threads_from)


def use_native() -> bool:
    """Whether ops on CPU tensors call the library now."""
    return _mode() == "native"


@contextmanager
def forced(mode: str) -> Iterator[None]:
    """Run the body with "native" or "reference" kernels, whatever the environment says; for tests and benchmarks."""
    global _forced_mode
    if mode not in MODES:
        raise ConfigError(f"kernels are one of {', '.join(MODES)}; got {mode!r}.{nearest(mode, MODES)}")
    if mode == "native" and _load() is None:
        raise ConfigError(f"native kernels need {LIBRARY_NAME}; it is not installed. Try `pip install` with a C++ compiler.")
    before, _forced_mode = _forced_mode, mode
    try:
        yield
    finally:
        _forced_mode = before


def _mode() -> str:
    return _forced_mode or _default_mode()


@functools.cache
def _default_mode() -> str:
    wanted = os.environ.get("LUTHIER_KERNELS", "native")
    if wanted not in MODES:
        raise ConfigError(f"LUTHIER_KERNELS is one of {', '.join(MODES)}; got {wanted!r}.{nearest(wanted, MODES)}")
    if wanted == "native" and _load() is None:
        warnings.warn(
            f"{LIBRARY_NAME} is not installed, so every op runs in plain torch, several times slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference"
    return wanted


def _library_path() -> Path | None:
    """The file LUTHIER_KERNELS_LIBRARY names, or the one beside this package; an editable install has two folders."""
    named = os.environ.get("LUTHIER_KERNELS_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise ConfigError(f"LUTHIER_KERNELS_LIBRARY names a file; {named} is none. Unset it to use the installed library.")
        return path
    candidates = (Path(folder) / LIBRARY_NAME for folder in luthier.kernels.__path__)
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _load() -> ctypes.CDLL | None:
    path = _library_path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    version = library.lt_abi_version()
    if version != ABI_VERSION:
        raise ConfigError(f"{path.name} must have version {ABI_VERSION}; got {version} in {path}. Try reinstalling luthier.")
    if library.lt_isa() < 0:
        wanted = os.environ.get("LUTHIER_ISA", "")
        raise ConfigError(
            f"LUTHIER_ISA is one of {', '.join(INSTRUCTION_SETS)} that this machine has; got {wanted!r}."
            f"{nearest(wanted, INSTRUCTION_SETS)} Unset it to let the library choose."
        )
    return library


def library() -> ctypes.CDLL:
    """The loaded library; call it only where `use_native()` is true."""
    loaded = _load()
    assert loaded is not None
    return loaded


@functools.cache
def entry(name: str, *argument_types: type) -> Callable[..., None]:
    """A C entry as a function that raises what its status says. Types are those of ctypes."""
    function = getattr(library(), name)
    function.argtypes = argument_types
    function.restype = ctypes.c_int

    def call(*arguments) -> None:
        status = function(*arguments)
        if status != STATUS_OK:
            raise _failure(name, status)

    return call


def _failure(name: str, status: int) -> LuthierError | MemoryError:
    if status == STATUS_NO_MEMORY:
        return MemoryError(f"{name} could not allocate its scratch memory.")
    if status == STATUS_FAILED:
        return LuthierError(f"{name} failed inside the library, for want of something that the system would not give.")
    return ShapeError(f"{name} refused its arguments (status {status}); the binding let a size or pointer through.")


def threads() -> int:
    """Threads a kernel may use: torch's own number."""
    return torch.get_num_threads()


def check_tensor(tensor: Tensor, what: str, dtype: torch.dtype, shape: tuple[int | None, ...] | None = None) -> Tensor:
    """The tensor itself, if it is a contiguous CPU tensor of `dtype` and `shape` (None: any size there).

    Raises ShapeError with the rule and what came.
    """
    # Every op asks this of every tensor, some thousand times a step.
    lies_well = tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous() and not tensor.data_ptr() % dtype.itemsize
    if lies_well and (shape is None or tensor.shape == shape or _fits(tensor.shape, shape)):
        return tensor
    raise ShapeError(_problem(tensor, what, dtype, shape))


def _problem(tensor: Tensor, what: str, dtype: torch.dtype, shape: tuple[int | None, ...] | None) -> str:
    if tensor.dtype != dtype:
        return f"{what} must be {dtype}; got {tensor.dtype}. Try .to({dtype})."
    if not tensor.is_cpu:
        return f"{what} must be on the CPU; got {tensor.device}."
    if shape is not None and not _fits(tensor.shape, shape):
        expected = "(" + ", ".join("*" if size is None else str(size) for size in shape) + ")"
        return f"{what} must have shape {expected}; got {tuple(tensor.shape)}."
    if not tensor.is_contiguous():
        return f"{what} must be contiguous; got strides {tensor.stride()}. Try .contiguous()."
    return f"{what} must be aligned to its {tensor.element_size()}-byte elements; its address is odd."


def _fits(shape: torch.Size, expected: tuple[int | None, ...]) -> bool:
    if len(shape) != len(expected):
        return False
    for want, got in zip(expected, shape, strict=True):  # noqa: SIM110, since a generator takes twice as long
        if want is not None and want != got:
            return False
    return True
