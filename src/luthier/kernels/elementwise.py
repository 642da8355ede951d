"""The passes between the matrix products, each read and written once: norms, rotary embedding, gated activations.

All take float32. Exponentials are accurate to 2 ulp, sigmoid and tanh to 4e-7 relative. Backward keeps the inputs and one
or two numbers a row, nothing else. Norms sum in an order that does not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import ShapeError
from luthier.kernels.elementwise_ops import (
    gated_backward_op,
    gated_op,
    layer_norm_backward_op,
    layer_norm_op,
    rms_norm_backward_op,
    rms_norm_op,
    rotary_in_place_op,
    rotary_op,
)

__all__ = ["add_rms_norm", "geglu", "layer_norm", "rms_norm", "rotary_", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; * (1 + weight) with `plus_one`, as Gemma has it.

    x: (..., hidden), weight: (hidden,), float32. Raises ShapeError for other dtypes or sizes.
    """
    flat = _rows(x, weight)
    return _RmsNorm.apply(flat, None, weight.contiguous(), 1.0 if plus_one else 0.0, eps)[1].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> tuple[Tensor, Tensor]:
    """(x + residual, rms_norm(x + residual)) in one pass; shapes as in `rms_norm`."""
    if residual.shape != x.shape:
        raise ShapeError(f"x and residual must have one shape; got {tuple(x.shape)} and {tuple(residual.shape)}.")
    flat, other = _rows(x, weight), _rows(residual, weight)
    total, normed = _RmsNorm.apply(flat, other, weight.contiguous(), 1.0 if plus_one else 0.0, eps)
    return total.view(x.shape), normed.view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, var the mean square about the mean.

    x: (..., hidden), weight and bias: (hidden,), float32. Raises ShapeError for other dtypes or sizes.
    """
    flat = _rows(x, weight)
    return _LayerNorm.apply(flat, weight.contiguous(), None if bias is None else bias.contiguous(), eps).view(x.shape)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q and k in place by their positions and return them.

    The first R values of each head turn as two halves, (a, b) -> (a cos - b sin, b cos + a sin); the rest stay.
    q: (T, heads, D), k: (T, kv_heads, D), float32, rows contiguous but perhaps apart; cos, sin: (T, R), both halves
    written out as Transformers has them. q and k must not be leaves that need gradients, nor pieces of one split.
    Raises ShapeError for other dtypes, sizes or layouts.
    """
    return _Rotary.apply(q, k, cos.contiguous(), sin.contiguous())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. gate, up: (..., F), float32, last dimension contiguous; rows may be apart. -> (..., F)."""
    return _gated(gate, up, 0)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh form of GELU; shapes as in `swiglu`."""
    return _gated(gate, up, 1)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    if x.ndim < 1 or weight.ndim != 1 or x.shape[-1] != weight.shape[0]:
        raise ShapeError(
            f"a norm needs one weight for each of the last dimension; got {tuple(x.shape)}, {tuple(weight.shape)}."
        )
    return x.reshape(-1, x.shape[-1]).contiguous()


def _gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    if gate.shape != up.shape or gate.ndim < 1:
        raise ShapeError(f"gate and up must have one shape; got {tuple(gate.shape)} and {tuple(up.shape)}.")
    width = gate.shape[-1]
    return _Gated.apply(gate.reshape(-1, width), up.reshape(-1, width), kind).view(gate.shape)


class _RmsNorm(torch.autograd.Function):
    """(sum, normed); without a residual `sum` is empty."""

    @staticmethod
    def forward(ctx, x, residual, weight, plus, eps):
        total, normed, inverse = rms_norm_op(x, residual, weight, plus, eps)
        ctx.plus, ctx.has_residual = plus, residual is not None
        ctx.save_for_backward(x if residual is None else total, weight, inverse)
        if residual is None:
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, dnormed):
        x, weight, inverse = ctx.saved_tensors
        dsum = dsum.contiguous() if ctx.has_residual and dsum is not None else None
        if dnormed is None:
            return dsum, dsum if ctx.has_residual else None, None, None, None
        wants_weight = ctx.needs_input_grad[2]
        dx, dweight = rms_norm_backward_op(dnormed.contiguous(), dsum, x, weight, ctx.plus, inverse, wants_weight)
        return dx, dx if ctx.has_residual else None, dweight if wants_weight else None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        normed, mean, inverse = layer_norm_op(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed):
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        either = wants_weight or wants_bias
        dx, dweight, dbias = layer_norm_backward_op(dnormed.contiguous(), *ctx.saved_tensors, either)
        return dx, dweight if wants_weight else None, dbias if wants_bias else None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        rotary_in_place_op(q, k, cos, sin, False)
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return rotary_op(dq.contiguous(), cos, sin, True), rotary_op(dk.contiguous(), cos, sin, True), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        return gated_op(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *gated_backward_op(dout.contiguous(), *ctx.saved_tensors, ctx.kind), None
