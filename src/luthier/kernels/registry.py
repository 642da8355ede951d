"""One helper that makes a custom op of a schema, a reference, a fake and a native function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from luthier.kernels import native

_library = torch.library.Library("luthier", "DEF")
_ops: dict[str, Op] = {}


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
    return getattr(torch.ops.luthier, name).default


def registered_ops() -> list[Op]:
    """Every op that has been defined, in the order of definition."""
    return list(_ops.values())
