"""The second half of a layer as one operation: y = m + post(D (act(G n) * U n)) with n = norm(m)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.elementwise_ops import gated_backward_op, gated_op, rms_norm_backward_op, rms_norm_op
from luthier.models.blocks.description import MlpHalf, Norm
from luthier.models.blocks.linears import FirstAtRows, Linears, linears_of, wants_of


@dataclass(frozen=True, eq=False)
class _Plan:
    norm: Norm
    projections: Linears
    down: Linears
    gate: int
    post_norm: Norm | None


def fused_mlp(x: Tensor, half: MlpHalf) -> Tensor:
    """x: (T, hidden) -> (T, hidden), float32, contiguous. Gradients reach x and the terms and biases of the linear layers.

    Kept for backward: x, gate and up (T, 2 F), of each adapted layer u (T, rank), and with a norm after the half its
    input (T, hidden); of these only what the gradients asked for need.
    """
    assert half.gate is not None
    projections, first = linears_of(half.projections)
    down, second = linears_of((half.down,))
    return _FusedMlp.apply(x, _Plan(half.norm, projections, down, half.gate, half.post_norm), *first, *second)


def _gate_and_up(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two outputs, or the two halves of one; as views."""
    if len(outputs) == 2:
        return outputs[0], outputs[1]
    gate, up = outputs[0].chunk(2, 1)
    return gate, up


class _FusedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *small: Tensor | None) -> Tensor:
        first, second = small[: plan.projections.small_count], small[plan.projections.small_count :]
        wants_dx, wants_first, wants_second = wants_of(ctx.needs_input_grad, plan.projections.small_count)
        _, normed, _ = rms_norm_op(x, None, plan.norm.weight, plan.norm.plus, plan.norm.eps)
        outputs, inner = plan.projections.forward(normed, first)
        del normed
        (y,), inner_down = plan.down.forward(gated_op(*_gate_and_up(outputs), plan.gate), second)
        kept_y = inverse = None
        below = wants_dx or any(wants_first)
        if plan.post_norm is not None:
            kept_y = y
            _, y, inverse = rms_norm_op(y, None, plan.post_norm.weight, plan.post_norm.plus, plan.post_norm.eps)
        ctx.plan, ctx.outputs = plan, len(outputs)
        ctx.save_for_backward(
            x if wants_dx or plan.projections.wants_input(wants_first) else None,
            kept_y,
            inverse,
            *(outputs if below or plan.down.wants_input(wants_second) else [None] * len(outputs)),
            *plan.projections.kept_inner(inner, wants_first),
            *plan.down.kept_inner(inner_down, wants_second),
            *small,
        )
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, kept_y, inverse, *rest = ctx.saved_tensors
        outputs, rest = rest[: ctx.outputs], rest[ctx.outputs :]
        inner, (inner_down, *small) = rest[: plan.projections.count], rest[plan.projections.count :]
        first, second = small[: plan.projections.small_count], small[plan.projections.small_count :]
        wants_dx, wants_first, wants_second = wants_of(ctx.needs_input_grad, plan.projections.small_count)
        below = wants_dx or any(wants_first)
        dout = dout.contiguous()
        dy = dout
        if plan.post_norm is not None:
            dy, _ = rms_norm_backward_op(dout, None, kept_y, plan.post_norm.weight, plan.post_norm.plus, inverse, False)
        act = gated_op(*_gate_and_up(outputs), plan.gate) if plan.down.wants_input(wants_second) else None
        dact, second_gradients = plan.down.backward([dy], act, [inner_down], second, wants_second, below)
        if not below:
            return None, None, *[None] * len(first), *second_gradients
        del act, dy
        pieces = list(gated_backward_op(dact, *_gate_and_up(outputs), plan.gate))
        del dact, outputs
        pieces = pieces if ctx.outputs == 2 else [torch.cat(pieces, 1)]
        dx, first_gradients = norm_and_linears_backward(
            plan.norm, plan.projections, x, pieces, inner, first, wants_first, dout if wants_dx else None
        )
        return dx, None, *first_gradients, *second_gradients


def norm_and_linears_backward(
    norm: Norm,
    linears: Linears | FirstAtRows,
    x: Tensor | None,
    dys: list[Tensor],
    inner: list[Tensor | None],
    small: list[Tensor | None],
    wants: tuple[bool, ...],
    dresidual: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Backward of x -> (x, linears(norm(x))): (dx, gradients of `small`).

    dresidual: the gradient to x that comes past the half, None where dx is not wanted. The norm is computed again.
    """
    normed = unit = None
    if x is not None:
        _, normed, unit = rms_norm_op(x, None, norm.weight, norm.plus, norm.eps)
    dnormed, gradients = linears.backward(dys, normed, inner, small, wants, dresidual is not None)
    if dresidual is None:
        return None, gradients
    dx, _ = rms_norm_backward_op(dnormed, dresidual, x, norm.weight, norm.plus, unit, False)
    return dx, gradients
