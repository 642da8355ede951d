"""y = x W^T + bias + s (x A^T) B^T with W frozen, in whatever storage, and its gradients to x, A, B and bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels.linear_ops import (
    Part,
    Term,
    backward_input_op,
    column_sums,
    factor_product,
    flatten,
    forward_op,
    outer_op,
    rows_op,
)
from luthier.kernels.storage import LAYOUT, NUMBERS, Storage

__all__ = ["Part", "Term", "dequantize", "frozen_linear", "frozen_linear_group", "rows"]


def frozen_linear(x: Tensor, storage: Storage, bias: Tensor | None = None, term: Term | None = None) -> Tensor:
    """y = x W^T + bias + s (x A^T) B^T.

    x: (..., in_features), float32 -> (..., out_features), float32. Gradients reach x, bias, A and B; W has none.
    Sums are in float32; relative error in the Frobenius norm at most 2e-6 sqrt(in_features / 1000) at every number of
    tokens: at one, where codes of 32 weights are summed before their scale comes in; at 2 to 4, row by row of W; from 5
    on, in tiles. Activations are float32 on all three paths, also for x with a mean far above its spread.
    Raises ShapeError for another dtype or a size that does not fit.
    """
    return frozen_linear_group(x, [Part(storage, bias, term)])[0]


def frozen_linear_group(x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """`frozen_linear` for several layers of one input, such as q, k and v: x is read and packed once."""
    if x.dtype != torch.float32:
        raise ShapeError(f"x must be float32, in which all products are computed; got {x.dtype}. Try x.float().")
    if not parts:
        raise ShapeError("a group needs at least one layer; got none.")
    in_features = parts[0].storage.shape[1]
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ShapeError(f"x must have {in_features} features in its last dimension; got shape {tuple(x.shape)}.")
    for part in parts:
        _check_part(part, in_features)
    stored, layout, numbers, *small = flatten(parts)
    bias, A, B = ([_contiguous(tensor) for tensor in tensors] for tensors in small)
    flat = x.reshape(-1, in_features).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in (*bias, *A, *B))):
        outputs = _FrozenLinear.apply(flat, stored, layout, numbers, *bias, *A, *B)
    else:
        outputs, _ = forward_op(flat, stored, layout, numbers, bias, A, B)
    return [y.reshape(*x.shape[:-1], y.shape[1]) for y in outputs]


def dequantize(storage: Storage) -> Tensor:
    """W in float32, (out_features, in_features): a full copy, for tests, merging and norms."""
    stored, layout, numbers, *_ = flatten([Part(storage)])
    return rows_op(stored, layout, numbers, None)


def rows(storage: Storage, ids: Tensor) -> Tensor:
    """Rows of W in float32. ids: (...) int64 -> (..., in_features). Raises ShapeError for an id outside the matrix."""
    stored, layout, numbers, *_ = flatten([Part(storage)])
    return rows_op(stored, layout, numbers, ids.reshape(-1).contiguous()).reshape(*ids.shape, storage.shape[1])


def _check_part(part: Part, in_features: int) -> None:
    out_features, own = part.storage.shape
    if own != in_features:
        raise ShapeError(f"layers of a group share x; got in_features {in_features} and {own}.")
    if part.bias is not None and (tuple(part.bias.shape) != (out_features,) or part.bias.dtype != torch.float32):
        raise ShapeError(f"bias must be float32 of shape ({out_features},); got {tuple(part.bias.shape)} {part.bias.dtype}.")
    if part.term is None:
        return
    A, B = part.term.A, part.term.B
    fits = A.ndim == 2 and B.ndim == 2 and A.shape[1] == in_features and B.shape == (out_features, A.shape[0])
    if not fits or A.dtype != torch.float32 or B.dtype != torch.float32:
        raise ShapeError(
            f"A must be (r, {in_features}) and B ({out_features}, r), float32; "
            f"got {tuple(A.shape)} {A.dtype} and {tuple(B.shape)} {B.dtype}."
        )


class _FrozenLinear(torch.autograd.Function):
    """Keeps x only where dA is wanted, and the narrow u = x A^T where dB is; never the dequantised W."""

    @staticmethod
    def forward(ctx, x, stored, layout, numbers, *small):
        count = len(layout) // LAYOUT
        bias, A, B = small[:count], small[count : 2 * count], small[2 * count :]
        outputs, inner = forward_op(x, stored, layout, numbers, bias, A, B)
        ctx.count, ctx.layout, ctx.numbers, ctx.stored_count = count, layout, numbers, len(stored)
        keep_x = any(ctx.needs_input_grad[4 + count : 4 + 2 * count])
        ctx.save_for_backward(x if keep_x else None, *stored, *A, *B, *inner)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        count = ctx.count
        x, *rest = ctx.saved_tensors
        stored, rest = rest[: ctx.stored_count], rest[ctx.stored_count :]
        A, B, inner = rest[:count], rest[count : 2 * count], rest[2 * count :]
        wants_bias = ctx.needs_input_grad[4 : 4 + count]
        wants_A = ctx.needs_input_grad[4 + count : 4 + 2 * count]
        wants_B = ctx.needs_input_grad[4 + 2 * count :]
        grads = [dy.contiguous() for dy in dys]
        dx, v = _input_gradient(ctx, grads, stored, A, B, wants_A)
        scalings = ctx.numbers[1::NUMBERS]
        dA = [outer_op(v[p], x, scalings[p], False) if wants_A[p] else None for p in range(count)]
        dB = [outer_op(inner[p], grads[p], scalings[p], True) if wants_B[p] else None for p in range(count)]
        dbias = [column_sums(grads[p]) if wants_bias[p] else None for p in range(count)]
        return dx, None, None, None, *dbias, *dA, *dB


def _input_gradient(ctx, dys, stored, A, B, wants_A) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and v_p = dy_p B_p; without a gradient to x (the first layer), v alone."""
    if ctx.needs_input_grad[0]:
        return backward_input_op(dys, stored, ctx.layout, ctx.numbers, A, B)
    return None, [factor_product(dy, b) if wanted else None for dy, b, wanted in zip(dys, B, wants_A, strict=True)]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
