"""The first half of a layer as one operation: y = x + post(O attention(rotary(Q n), rotary(K n), V n)) with n = norm(x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.attention import attention_backward_op, attention_op
from luthier.kernels.elementwise_ops import rms_norm_backward_op, rms_norm_op, rotary_in_place_op
from luthier.models.blocks.description import AttentionHalf, Norm
from luthier.models.blocks.fused_mlp import norm_and_linears_backward
from luthier.models.blocks.linears import FirstAtRows, Linears, linears_of, wants_of
from luthier.models.blocks.tokens import Tables, Tokens, query_tables

HEAD_UNIT = 16  # The kernel takes head sizes in whole multiples of this.


@dataclass(frozen=True, eq=False)
class _Plan:
    half: AttentionHalf
    projections: Linears | FirstAtRows
    output: Linears
    starts: Tensor
    parents: Tensor
    tables: Tables
    rows: Tensor | None

    @property
    def options(self) -> tuple[float, float, int]:
        return self.half.scale, self.half.softcap or 0.0, self.half.window or 0

    def turn(self, q: Tensor, k: Tensor, transposed: bool) -> None:
        """The rotary embedding of q, of the rows, and k, of all tokens, in place."""
        if self.rows is None:
            rotary_in_place_op(q, k, *self.tables, transposed)
            return
        for x, tables in ((q, query_tables(self.tables, self.rows)), (k, self.tables)):
            rotary_in_place_op(x, x.new_empty(len(x), 0, x.shape[2]), *tables, transposed)


def fused_attention(x: Tensor, half: AttentionHalf, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    """x: (T, hidden), float32, contiguous -> (T, hidden), or (S, hidden) at the positions `rows`, (S,) int64, rising.

    With rows only k and v are computed for other tokens, and q where one layer gives all three.

    Gradients reach x and the terms and biases of the linear layers. Kept for backward: x, q, k, v (before their norms
    where they have some, else turned), attention's output and log sums, of each adapted layer u (T, rank), and with a
    norm after the half its input; of these only what the gradients asked for need.
    """
    projections, first = _projections_of(half, rows)
    output, second = linears_of((half.output,))
    plan = _Plan(half, projections, output, tokens.starts, tokens.parents, tables, rows)
    return _FusedAttention.apply(x, plan, *first, *second)


def _projections_of(half: AttentionHalf, rows: Tensor | None) -> tuple[Linears | FirstAtRows, list[Tensor | None]]:
    if rows is None or len(half.projections) == 1:
        return linears_of(half.projections)
    first, small = linears_of(half.projections[:1])
    rest, others = linears_of(half.projections[1:])
    return FirstAtRows(first, rest, rows), [*small, *others]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *small: Tensor | None) -> Tensor:
        half = plan.half
        first, second = small[: plan.projections.small_count], small[plan.projections.small_count :]
        wants_dx, wants_first, wants_second = wants_of(ctx.needs_input_grad, plan.projections.small_count)
        _, normed, _ = rms_norm_op(x, None, half.norm.weight, half.norm.plus, half.norm.eps)
        outputs, inner = plan.projections.forward(normed, first)
        del normed
        q, k, v = kept = _heads(outputs, plan)
        del outputs
        if half.query_norm is not None:
            q, k = _turned(q, k, plan)
        else:
            plan.turn(q, k, False)
        attended, lse = attention_op(q, k, v, plan.starts, plan.parents, plan.rows, *plan.options)
        del q, k, v
        (y,), inner_output = plan.output.forward(attended.flatten(1), second)
        kept_y = inverse = None
        if half.post_norm is not None:
            kept_y = y
            _, y, inverse = rms_norm_op(y, None, half.post_norm.weight, half.post_norm.plus, half.post_norm.eps)
        below = wants_dx or any(wants_first)
        ctx.plan = plan
        ctx.save_for_backward(
            x if wants_dx or plan.projections.wants_input(wants_first) else None,
            kept_y,
            inverse,
            *(kept if below else (None, None, None)),
            attended if below or plan.output.wants_input(wants_second) else None,
            lse if below else None,
            *plan.projections.kept_inner(inner, wants_first),
            *plan.output.kept_inner(inner_output, wants_second),
            *small,
        )
        return y.add_(_at_rows(x, plan.rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        half, projections = plan.half, plan.projections
        x, kept_y, inverse, q, k, v, attended, lse, *rest = ctx.saved_tensors
        inner, (inner_output, *small) = rest[: projections.count], rest[projections.count :]
        first, second = small[: projections.small_count], small[projections.small_count :]
        wants_dx, wants_first, wants_second = wants_of(ctx.needs_input_grad, plan.projections.small_count)
        below = wants_dx or any(wants_first)
        dout = dout.contiguous()
        dy = dout
        if half.post_norm is not None:
            dy, _ = rms_norm_backward_op(dout, None, kept_y, half.post_norm.weight, half.post_norm.plus, inverse, False)
        o_input = attended.flatten(1) if plan.output.wants_input(wants_second) else None
        dattended, second_gradients = plan.output.backward([dy], o_input, [inner_output], second, wants_second, below)
        if not below:
            return None, None, *[None] * len(first), *second_gradients
        assert dattended is not None
        dq, dk, dv = _attention_backward(plan, dattended.view_as(attended), q, k, v, attended, lse)
        del dy, o_input, dattended, attended
        pieces = [piece.flatten(1) for piece in (dq, dk, dv)]
        if projections.count == 1:
            pieces = [torch.cat([_from_rows(pieces[0], plan.rows, len(k)), *pieces[1:]], 1)]
        dresidual = _from_rows(dout, plan.rows, len(k)) if wants_dx else None
        dx, first_gradients = norm_and_linears_backward(half.norm, projections, x, pieces, inner, first, wants_first, dresidual)
        return dx, None, *first_gradients, *second_gradients


def _heads(outputs: list[Tensor], plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, H, D), or (S, H, D) at the rows, k and v (T, K, D), each in memory of its own."""
    half = plan.half
    if len(outputs) == 1:
        widths = [half.heads * half.head_size, half.kv_heads * half.head_size, half.kv_heads * half.head_size]
        q, k, v = outputs[0].split(widths, 1)
        outputs = [_at_rows(q, plan.rows).contiguous(), k.contiguous(), v.contiguous()]
    q, k, v = (output.view(len(output), -1, half.head_size) for output in outputs)
    return q, k, v


def _head_norm(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(normed, inverse) over each head; (T, heads, D) and (T heads,)."""
    _, normed, inverse = rms_norm_op(x.reshape(-1, x.shape[2]), None, norm.weight, norm.plus, norm.eps)
    return normed.view(x.shape), inverse


def _turned(q: Tensor, k: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """q and k after their norms and the rotary embedding, as new tensors."""
    assert plan.half.query_norm is not None
    assert plan.half.key_norm is not None
    q, _ = _head_norm(q, plan.half.query_norm)
    k, _ = _head_norm(k, plan.half.key_norm)
    plan.turn(q, k, False)
    return q, k


def _attention_backward(
    plan: _Plan, dattended: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to what the projections gave. q, k: as kept, that is before their norms where they have some."""
    query_norm, key_norm = plan.half.query_norm, plan.half.key_norm
    turned_q, turned_k = (q, k) if query_norm is None else _turned(q, k, plan)
    inputs = turned_q, turned_k, v, plan.starts, plan.parents, plan.rows
    dq, dk, dv = attention_backward_op(dattended, *inputs, attended, lse, *plan.options)
    plan.turn(dq, dk, True)
    if query_norm is not None and key_norm is not None:
        dq, dk = _head_norm_backward(dq, q, query_norm), _head_norm_backward(dk, k, key_norm)
    return dq, dk, dv


def _head_norm_backward(dnormed: Tensor, x: Tensor, norm: Norm) -> Tensor:
    _, inverse = _head_norm(x, norm)
    flat = (-1, x.shape[2])
    dx, _ = rms_norm_backward_op(dnormed.reshape(flat), None, x.reshape(flat), norm.weight, norm.plus, inverse, False)
    return dx.view(x.shape)


def _at_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def _from_rows(dx: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """The transpose of `_at_rows`: zeros where no row was taken. Rows differ from each other."""
    return dx if rows is None else dx.new_zeros(tokens, dx.shape[1]).index_copy_(0, rows, dx)
