"""A half out of its parts, each with its own backward: for linear layers that compute more than one product.

Matrices in two factors, DoRA, dropout inside a term, weights that train: the layers' own modules are called, with the
kernels between them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.attention import packed_attention
from luthier.kernels.elementwise import geglu, swiglu
from luthier.kernels.elementwise_ops import rotary_op
from luthier.linear import outputs_of
from luthier.models.blocks.description import AttentionHalf, MlpHalf
from luthier.models.blocks.tokens import Tables, Tokens, query_tables


def composed_attention(x: Tensor, half: AttentionHalf, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    """What `fused_attention` computes, for any linear layers and norms that train."""
    q, k, v = (output.unflatten(1, (-1, half.head_size)) for output in _queries_keys_values(half, half.norm(x), rows))
    if half.query_norm is not None and half.key_norm is not None:
        q, k = half.query_norm(q), half.key_norm(k)
    q, k = _Rotary.apply(q, *query_tables(tables, rows)), _Rotary.apply(k, *tables)
    attend = partial(packed_attention, window=half.window, softcap=half.softcap, parents=tokens.parents, rows=rows)
    y = half.output(attend(q, k, v, tokens.starts, half.scale).flatten(1))
    y = y if half.post_norm is None else half.post_norm(y)
    return y + (x if rows is None else x[rows])


def _queries_keys_values(half: AttentionHalf, normed: Tensor, rows: Tensor | None) -> list[Tensor]:
    """q at the rows, k and v of all tokens. Where one layer gives all three, of q all others are left."""
    if len(half.projections) == 1:
        widths = [half.heads * half.head_size, half.kv_heads * half.head_size, half.kv_heads * half.head_size]
        q, k, v = outputs_of(half.projections, normed)[0].split(widths, 1)
        return [q if rows is None else q[rows], k, v]
    if rows is None:
        return outputs_of(half.projections, normed)
    return [*outputs_of(half.projections[:1], normed[rows]), *outputs_of(half.projections[1:], normed)]


def composed_mlp(x: Tensor, half: MlpHalf) -> Tensor:
    """What `fused_mlp` computes, for any linear layers and norms that train."""
    normed = half.norm(x)
    outputs = outputs_of(half.projections, normed)
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, 1)
    y = half.down((swiglu if half.gate == 0 else geglu)(gate, up))
    return x + (y if half.post_norm is None else half.post_norm(y))


class _Rotary(torch.autograd.Function):
    """Turns each head by its position, into a new tensor: what the layers' modules give may be needed as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = cos, sin
        return rotary_op(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dturned: Tensor) -> tuple[Tensor, None, None]:
        return rotary_op(dturned.contiguous(), *ctx.tables, True), None, None
