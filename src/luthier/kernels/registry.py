"""One helper that makes a custom op of a schema, a reference, a fake and a native function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import profiler

from luthier.kernels import native

_library = torch.library.Library("luthier", "DEF")
_ops: dict[str, Op] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (int, float, bool)


@dataclass
class Op:
    """A registered op `torch.ops.luthier.<name>`; `native_calls` counts how often the compiled kernel ran."""

    name: str
    has_native: bool
    native_calls: int = field(default=0)


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    native_call: Callable | None = None,
) -> Callable:
    """Register `luthier::name` and return the function that calls it.

    schema: arguments and results as torch writes them, e.g. "(Tensor x, float eps) -> Tensor". `reference` is plain
    torch and runs on every device; `fake` gives shapes and dtypes only; `native_call` takes CPU tensors, checks
    them and calls the library. Which of the two a CPU tensor meets is decided at the call (`native.use_native`).
    Ops carry no gradient: a `torch.autograd.Function` around forward and backward ops gives it.
    """
    op = _ops[name] = Op(name, native_call is not None)
    _library.define(name + schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"luthier::{name}", fake, lib=_library)
    if native_call is not None:

        def on_cpu(*arguments):
            if not native.use_native():
                return reference(*arguments)
            op.native_calls += 1
            return native_call(*arguments)

        _library.impl(name, on_cpu, "CPU")
        return _direct(getattr(torch.ops.luthier, name).default, on_cpu)
    return getattr(torch.ops.luthier, name).default


def _direct(dispatched: Callable, on_cpu: Callable) -> Callable:
    """The op, past torch's dispatcher where all that it would do is call `on_cpu`.

    For lists of tensors the way through it takes longer than all checks together, and a step goes it a thousand times.
    """

    def call(*arguments):
        if torch.is_grad_enabled() or _is_watched() or not all(map(_is_plain, arguments)):
            return dispatched(*arguments)
        return on_cpu(*arguments)

    return call


def _is_watched() -> bool:
    """Whether something looks on at the dispatcher: a compiler or tracer, a mode, a transform such as vmap, a profiler."""
    c = torch._C
    return bool(
        torch.compiler.is_compiling()
        or c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._are_functorch_transforms_active()
        or c._is_tracing()
        or profiler._is_profiler_enabled
    )


def _is_plain(argument: Any) -> bool:
    """Whether every tensor in the argument is of torch's own class and on the CPU."""
    kind = type(argument)
    if kind in _PLAIN:
        return argument.is_cpu
    if kind is not list:
        return argument is None or kind in _NUMBERS
    # Lists are of tensors or of numbers, never of both.
    return not argument or type(argument[0]) in _NUMBERS or all(map(_is_plain, argument))


def registered_ops() -> list[Op]:
    """Every op that has been defined, in the order of definition."""
    return list(_ops.values())
