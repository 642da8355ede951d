"""How each weight of a model is to be stored: kept as it is, converted to a dense dtype, or quantised to NF4."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.adapters.targets import is_inside, named_by
from luthier.config import NF4Options, Storage
from luthier.errors import ConfigError, ModelError, NumericError, PreflightError, bulleted, nearest
from luthier.kernels.storage import DENSE_DTYPES, KINDS
from luthier.matrices import DenseMatrix, Matrix, NF4Matrix
from luthier.models.checkpoint import WeightSource

# Subclasses of nn.Linear with a forward of their own that is the plain product all the same.
PLAIN_SUBCLASSES = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + b and nothing else: nn.Linear, GPT-2's Conv1D, and subclasses that add nothing.

    Routers and grouped products are subclasses of nn.Linear too, and do more.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or f"{kind.__module__}.{kind.__qualname__}" in PLAIN_SUBCLASSES


def linear_names(model: nn.Module) -> list[str]:
    """The model's linear layers, GPT-2's Conv1D among them, before they are replaced."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def left_out_note(model: nn.Module) -> str | None:
    """A note on matrices that stand in no plain linear layer; None if there are none.

    They are what is left of `model` once its linear layers are replaced: routers that are more than a product, and
    experts, whose matrices lie in one tensor of three dimensions. (The kernels of a convolution are no matrices.)
    """
    left = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            left[f"{name} ({type(module).__name__})"] = sum(parameter.nbytes for parameter in module.parameters())
        elif not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            stacks = [(key, parameter) for key, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            left |= {f"{name}.{key}": parameter.nbytes for key, parameter in stacks}
    if not left:
        return None
    listed = ", ".join(list(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return (
        f"{len(left)} parts do more than multiply by one matrix, so they take no adapter and are held in float32, "
        f"{sum(left.values())} bytes: {listed}."
    )


def kept_modules(linear: list[str], head: str, options: NF4Options) -> list[str]:
    """The linear layers that stay as they are when the others go to NF4: the head, and what `skip_modules` names.

    An entry names a module by its whole name or by its end after a dot, and everything inside it.
    Raises ConfigError for entries that match nothing.
    """
    problems = []
    kept = {head}
    for entry in options.skip_modules:
        found = [name for name in linear if any(named_by(part, [entry]) for part in _path(name))]
        kept.update(found)
        if not found:
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            problems.append(f"{entry!r} matches nothing.{nearest(entry, known)} Known: {', '.join(known)}.")
    if problems:
        raise ConfigError(f"every entry of skip_modules must match a linear layer:\n{bulleted(problems)}")
    return [name for name in linear if is_inside(name, kept)]


def _path(name: str) -> list[str]:
    """`a.b.c` -> [`a`, `a.b`, `a.b.c`]"""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def stored_as(source: WeightSource, name: str) -> str:
    """The kind a tensor has in its source: f32, bf16, f16, nf4, or a type of GGUF blocks. F64 counts as f32."""
    dtype = source.dtype(name)
    return source.kind(name) or next((kind for kind, known in DENSE_DTYPES.items() if known == dtype), "f32")


def read_matrix(source: WeightSource, name: str, key: str, wanted: Storage | str, transposed: bool, *, double: bool) -> Matrix:
    """One tensor of `source` as a matrix stored as `wanted`: mapped where it stays as it is, else read, converted, let go.

    key: its name in the model, for errors. transposed: it lies (in, out). Blocks on their way to nf4 stand in float32 a few
    rows at a time where a kernel reads them, to another storage as a whole, and beside them nothing.
    Raises ModelError where f16 cannot hold it, PreflightError where NF4 meets NaN or Inf.
    """
    kind = stored_as(source, name)
    in_blocks = source.kind(name) in KINDS
    if wanted == kind and source.kind(name):
        return source.matrix(name)
    if wanted == kind and source.dtype(name) in DENSE_DTYPES.values():
        return DenseMatrix(source.tensor(name, mapped=True), transposed)
    if in_blocks and wanted == "nf4":
        return _in_nf4(partial(NF4Matrix.converted, source.matrix(name), double=double), key)
    tensor = source.matrix(name).dequantize() if in_blocks else source.tensor(name, mapped=False)
    if wanted == "nf4":
        weight = (tensor.T if transposed else tensor).to(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
        return _in_nf4(partial(NF4Matrix.quantize, weight, double=double), key)
    tensor = tensor.to(DENSE_DTYPES[wanted])
    if wanted == "f16":
        low, high = tensor.aminmax()
        if max(-low, high) == math.inf:
            raise ModelError(f"f16 holds numbers up to 65504; {key} has larger ones. Try bf16 or f32 as the base storage.")
    return DenseMatrix(tensor, transposed)


def _in_nf4(make: Callable[[], NF4Matrix], key: str) -> NF4Matrix:
    try:
        return make()
    except NumericError as error:
        raise PreflightError(f"the base weights must be finite; {key}: {error} Download the model again.") from error
