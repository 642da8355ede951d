"""What the machine can do, measured: every share in a benchmark is of these two numbers."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from luthier.errors import ConfigError
from luthier.kernels import native

_FMA_STEPS = 400_000


def fma_peak(threads: int | None = None, *, steps: int = _FMA_STEPS) -> float:
    """Flops a second of independent fused multiply-adds in registers, all threads together. Takes about 3 ms."""
    result = ctypes.c_double()
    _measuring_entry("lt_fma_peak", ctypes.c_int64)(steps, threads or native.threads(), ctypes.byref(result))
    return result.value


def read_bandwidth(threads: int | None = None, *, buffer: Tensor | None = None) -> float:
    """Bytes a second read from memory. buffer: a float32 tensor larger than the last-level cache; 256 MiB by default."""
    data = torch.ones(1 << 26) if buffer is None else native.check_tensor(buffer, "buffer", torch.float32)
    result = ctypes.c_double()
    call = _measuring_entry("lt_read_bandwidth", ctypes.c_void_p, ctypes.c_int64)
    call(data.data_ptr(), data.numel(), threads or native.threads(), ctypes.byref(result))
    return result.value


def _measuring_entry(name: str, *first: type):
    if not native.use_native():
        raise ConfigError(
            "the probes need the native kernels; they are not in use. Unset LUTHIER_KERNELS or reinstall luthier."
        )
    return native.entry(name, *first, ctypes.c_int, ctypes.POINTER(ctypes.c_double))
