"""y = x (L R)^T + bias with L and R frozen, in whatever storage, in one call, and its gradients to x and bias.

In the pivoted form some outputs are those of R itself; `places` says where each output comes from.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.linear_native import Factors, Matrix, matrices
from luthier.kernels.linear_ops import Part, column_sums, flatten, unflatten
from luthier.kernels.registry import define_op
from luthier.kernels.storage import Storage

F32, PLACES = torch.float32, torch.int32
Described = tuple[list[Tensor], list[int], list[float]]  # a stored matrix as ops take it


def factored_linear(
    x: Tensor, left: Storage, right: Storage, places: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = x (L R)^T + bias, L R never formed; with places output o is column places[o] of [x R^T, x (L R)^T], plus bias[o].

    x: (..., in_features), float32 -> (..., out_features), float32. left: (rows, rank), right: (rank, in_features), neither
    transposed; places: int32 (out_features,), each in [0, rank + rows), in any order; bias: float32 (out_features,).
    Gradients reach x and bias. Sums are in float32, with the error of two products of `frozen_linear`.
    Raises ShapeError for another dtype or a size that does not fit.
    """
    if x.dtype != F32:
        raise ShapeError(f"x must be float32, in which all products are computed; got {x.dtype}. Try x.float().")
    if left.shape[1] != right.shape[0] or left.transposed or right.transposed:
        raise ShapeError(
            f"factors are (out, rank) and (rank, in), not transposed; got {left.shape} and {right.shape}, "
            f"transposed {left.transposed} and {right.transposed}."
        )
    if x.ndim < 1 or x.shape[-1] != right.shape[1]:
        raise ShapeError(f"x must have {right.shape[1]} features in its last dimension; got shape {tuple(x.shape)}.")
    if places is not None and (places.dtype != PLACES or places.ndim != 1):
        raise ShapeError(f"places must be {PLACES} of shape (out_features,); got {tuple(places.shape)} {places.dtype}.")
    outputs = left.shape[0] if places is None else places.shape[0]
    if bias is not None and (tuple(bias.shape) != (outputs,) or bias.dtype != F32):
        raise ShapeError(f"bias must be float32 of shape ({outputs},); got {tuple(bias.shape)} {bias.dtype}.")
    flat = x.reshape(-1, right.shape[1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    factors = (*_described(left), *_described(right))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _FactoredLinear.apply(flat, bias, places, *factors)
    else:
        y = forward_op(flat, *factors, places, bias)
    return y.reshape(*x.shape[:-1], outputs)


def _described(storage: Storage) -> Described:
    stored, layout, numbers, *_ = flatten([Part(storage)])
    return stored, layout, numbers


class _FactoredLinear(torch.autograd.Function):
    """Keeps the stored factors alone: the inner result is needed by nothing, since the factors are frozen."""

    @staticmethod
    def forward(ctx, x, bias, places, left, left_layout, left_numbers, right, right_layout, right_numbers):
        ctx.numbers = (left_layout, left_numbers, right_layout, right_numbers)
        ctx.left_count = len(left)
        ctx.save_for_backward(places, *left, *right)
        return forward_op(x, left, left_layout, left_numbers, right, right_layout, right_numbers, places, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        places, *stored = ctx.saved_tensors
        left, right = stored[: ctx.left_count], stored[ctx.left_count :]
        left_layout, left_numbers, right_layout, right_numbers = ctx.numbers
        dy, dx = dy.contiguous(), None
        if ctx.needs_input_grad[0]:
            dx = backward_input_op(dy, left, left_layout, left_numbers, right, right_layout, right_numbers, places)
        dbias = column_sums(dy) if ctx.needs_input_grad[1] else None
        return dx, dbias, None, None, None, None, None, None, None


def _matrix(stored, layout, numbers) -> Tensor:
    (part,) = unflatten(stored, layout, numbers, [None], [None], [None])
    return dequantize_reference(part.storage)


def _outputs(left_layout: list[int], places: Tensor | None) -> int:
    return left_layout[1] if places is None else places.shape[0]


def _forward_reference(x, left, left_layout, left_numbers, right, right_layout, right_numbers, places, bias) -> Tensor:
    inner = F.linear(x, _matrix(right, right_layout, right_numbers))
    y = F.linear(inner, _matrix(left, left_layout, left_numbers))
    if places is not None:
        y = torch.cat([inner, y], 1).index_select(1, places.to(torch.int64))
    return y if bias is None else y + bias


def _forward_fake(x, left, left_layout, left_numbers, right, right_layout, right_numbers, places, bias) -> Tensor:
    return x.new_empty(x.shape[0], _outputs(left_layout, places))


def _backward_input_reference(dy, left, left_layout, left_numbers, right, right_layout, right_numbers, places) -> Tensor:
    L, R = _matrix(left, left_layout, left_numbers), _matrix(right, right_layout, right_numbers)
    if places is None:
        return dy @ L @ R
    given = dy.new_zeros(dy.shape[0], R.shape[0] + L.shape[0]).index_add_(1, places.to(torch.int64), dy)
    return (given[:, : R.shape[0]] + given[:, R.shape[0] :] @ L) @ R


def _backward_input_fake(dy, left, left_layout, left_numbers, right, right_layout, right_numbers, places) -> Tensor:
    return dy.new_empty(dy.shape[0], right_layout[2])


def _forward_native(x, left, left_layout, left_numbers, right, right_layout, right_numbers, places, bias) -> Tensor:
    _, R, factors = _factors(left, left_layout, left_numbers, right, right_layout, right_numbers, places)
    tokens = native.check_tensor(x, "x", F32, (None, R.cols)).shape[0]
    outputs = factors.outputs
    shift = None if bias is None else native.check_tensor(bias, "bias", F32, (outputs,)).data_ptr()
    y = x.new_empty(tokens, outputs)
    call = native.entry("lt_factored_forward", c_void_p, c_int64, POINTER(Factors), c_void_p, c_void_p, c_int)
    if tokens > 0:
        call(x.data_ptr(), tokens, ctypes.byref(factors), shift, y.data_ptr(), native.threads())
    return y


def _backward_input_native(dy, left, left_layout, left_numbers, right, right_layout, right_numbers, places) -> Tensor:
    _, R, factors = _factors(left, left_layout, left_numbers, right, right_layout, right_numbers, places)
    tokens = native.check_tensor(dy, "dy", F32, (None, factors.outputs)).shape[0]
    dx = dy.new_empty(tokens, R.cols)
    call = native.entry("lt_factored_backward_input", c_void_p, c_int64, POINTER(Factors), c_void_p, c_int)
    if tokens > 0:
        call(dx.data_ptr(), tokens, ctypes.byref(factors), dy.data_ptr(), native.threads())
    return dx


def _factors(left, left_layout, left_numbers, right, right_layout, right_numbers, places) -> tuple[Matrix, Matrix, Factors]:
    """L, R, and both as the C structure, which points to them and into the tensors. Raises ShapeError."""
    (L,), (R,) = matrices(left, left_layout, left_numbers), matrices(right, right_layout, right_numbers)
    if L.cols != R.rows or L.transposed or R.transposed:
        raise ShapeError(
            f"factors are (out, rank) and (rank, in), not transposed; got {(L.rows, L.cols)} and {(R.rows, R.cols)}."
        )
    factors = Factors(ctypes.pointer(R), ctypes.pointer(L), None, L.rows)
    if places is not None:
        factors.places = native.check_tensor(places, "places", PLACES, (None,)).data_ptr()
        factors.outputs = places.shape[0]
    return L, R, factors


_FACTORS = "Tensor[] left, int[] left_layout, float[] left_numbers, Tensor[] right, int[] right_layout, float[] right_numbers"

# y = x (L R)^T + bias, (T, out_features). x: (T, in_features), float32.
forward_op = define_op(
    "factored_linear",
    f"(Tensor x, {_FACTORS}, Tensor? places, Tensor? bias) -> Tensor",
    reference=_forward_reference,
    fake=_forward_fake,
    native_call=_forward_native,
)
# dx = dy L R, (T, in_features), for dy in the order of the places.
backward_input_op = define_op(
    "factored_linear_backward_input",
    f"(Tensor dy, {_FACTORS}, Tensor? places) -> Tensor",
    reference=_backward_input_reference,
    fake=_backward_input_fake,
    native_call=_backward_input_native,
)
