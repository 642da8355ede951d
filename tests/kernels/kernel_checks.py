"""What the tests of all native ops share: errors against float64, the same bits for every number of threads, calls counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from luthier.kernels import native, registry

THREADS = (1, 2, 4)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the Frobenius norm, in float64."""
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def values_and_gradients(fn: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of fn and the gradients of their random combination to every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def assert_close_to_float64(fn: Callable, exact: Callable, inputs: list[Tensor], bound: float = 1e-5) -> None:
    """fn in float32, native and reference, agrees with `exact` in float64: values and gradients."""
    expected = values_and_gradients(exact, [x.to(torch.float64) for x in inputs])
    for mode in native.MODES:
        with native.forced(mode):
            for index, (got, want) in enumerate(zip(values_and_gradients(fn, inputs), expected, strict=True)):
                assert got.shape == want.shape
                assert relative_error(got, want) <= bound, f"{mode}: output or gradient {index}"


def assert_same_for_all_threads(fn: Callable[[], list[Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(fn())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


def require_programs() -> None:
    """Fail, and say what to install, where the AArch64 build cannot be made or run."""
    packages = {"cmake": "cmake", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    missing = [program for program in packages if shutil.which(program) is None]
    if missing:
        wanted = " ".join(packages[program] for program in missing)
        pytest.fail(f"the NEON build is run under an emulator; {', '.join(missing)} is missing. Try apt-get install {wanted}.")


@contextmanager
def called(*names: str) -> Iterator[None]:
    """The body calls the native version of each of these ops."""
    ops = {op.name: op for op in registry.registered_ops()}
    before = {name: ops[name].native_calls for name in names}
    yield
    missed = [name for name in names if ops[name].native_calls == before[name]]
    assert not missed, f"the native {missed} were not called"
