"""The ops behind `frozen_linear`: products with stored matrices and their low-rank terms, as torch.library knows them.

A group of layers that share x is passed as flat lists. For part p: its stored tensors, five integers in `layout` and two
floats in `numbers` (storage.py says which), and optional bias, A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import linear_native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.registry import define_op
from luthier.kernels.storage import KINDS, LAYOUT, NUMBERS, Storage, storages_of

Optional = Tensor | None


@dataclass(frozen=True, eq=False)
class Term:
    """scaling (x A^T) B^T. A: (r, in_features), B: (out_features, r), float32."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Part:
    """One layer of a group: x W^T + bias + its term."""

    storage: Storage
    bias: Tensor | None = None
    term: Term | None = None

    @property
    def rank(self) -> int:
        return 0 if self.term is None else self.term.A.shape[0]


def flatten(
    parts: Sequence[Part],
) -> tuple[list[Tensor], list[int], list[float], list[Optional], list[Optional], list[Optional]]:
    """(stored, layout, numbers, bias, A, B), the ops' arguments."""
    stored: list[Tensor] = []
    layout: list[int] = []
    numbers: list[float] = []
    for part in parts:
        tensors = part.storage.tensors()
        stored += tensors
        rows, columns = part.storage.shape
        layout += [KINDS.index(part.storage.kind), rows, columns, int(part.storage.transposed), len(tensors)]
        numbers += [part.storage.offset, 1.0 if part.term is None else part.term.scaling]
    A = [None if part.term is None else part.term.A for part in parts]
    B = [None if part.term is None else part.term.B for part in parts]
    return stored, layout, numbers, [part.bias for part in parts], A, B


def unflatten(stored, layout, numbers, bias, A, B) -> list[Part]:
    """The inverse of `flatten`."""
    parts = []
    for p, storage in enumerate(storages_of(list(stored), list(layout), list(numbers))):
        term = None if A[p] is None or B[p] is None else Term(A[p], B[p], numbers[p * NUMBERS + 1])
        parts.append(Part(storage, bias[p], term))
    return parts


def _shapes(layout: list[int], A: list[Optional]) -> list[tuple[int, int, int]]:
    """(out_features, in_features, rank) of every part."""
    sizes = (layout[p * LAYOUT + 1 : p * LAYOUT + 3] for p in range(len(A)))
    return [(rows, columns, 0 if a is None else a.shape[0]) for (rows, columns), a in zip(sizes, A, strict=True)]


def _forward_reference(x, stored, layout, numbers, bias, A, B) -> tuple[list[Tensor], list[Tensor]]:
    outputs, inner = [], []
    for part in unflatten(stored, layout, numbers, bias, A, B):
        y = F.linear(x, dequantize_reference(part.storage), part.bias)
        u = x.new_zeros(x.shape[0], 0)
        if part.term is not None:
            u = F.linear(x, part.term.A)
            y = y + part.term.scaling * F.linear(u, part.term.B)
        outputs.append(y)
        inner.append(u)
    return outputs, inner


def _forward_fake(x, stored, layout, numbers, bias, A, B) -> tuple[list[Tensor], list[Tensor]]:
    shapes = _shapes(layout, A)
    return [x.new_empty(x.shape[0], rows) for rows, _, _ in shapes], [x.new_empty(x.shape[0], rank) for _, _, rank in shapes]


def _backward_input_reference(dys, stored, layout, numbers, A, B) -> tuple[Tensor, list[Tensor]]:
    parts = unflatten(stored, layout, numbers, [None] * len(A), A, B)
    dx = dys[0].new_zeros(dys[0].shape[0], parts[0].storage.shape[1])
    inner = []
    for dy, part in zip(dys, parts, strict=True):
        dx = dx + dy @ dequantize_reference(part.storage)
        v = dy.new_zeros(dy.shape[0], 0)
        if part.term is not None:
            v = dy @ part.term.B
            dx = dx + part.term.scaling * (v @ part.term.A)
        inner.append(v)
    return dx, inner


def _backward_input_fake(dys, stored, layout, numbers, A, B) -> tuple[Tensor, list[Tensor]]:
    tokens = dys[0].shape[0]
    shapes = _shapes(layout, A)
    return dys[0].new_empty(tokens, shapes[0][1]), [
        dy.new_empty(tokens, rank) for dy, (_, _, rank) in zip(dys, shapes, strict=True)
    ]


def _outer_reference(inner: Tensor, x: Tensor, scaling: float, turned: bool) -> Tensor:
    product = scaling * (inner.T @ x)
    return product.T.contiguous() if turned else product


def _outer_fake(inner: Tensor, x: Tensor, scaling: float, turned: bool) -> Tensor:
    return x.new_empty(x.shape[1], inner.shape[1]) if turned else x.new_empty(inner.shape[1], x.shape[1])


def _rows_reference(stored, layout, numbers, ids: Optional) -> Tensor:
    (part,) = unflatten(stored, layout, numbers, [None], [None], [None])
    dense = dequantize_reference(part.storage)
    if ids is not None:
        linear_native.check_ids(ids, dense.shape[0])
    return dense.clone(memory_format=torch.contiguous_format) if ids is None else dense[ids].contiguous()


def _rows_fake(stored, layout, numbers, ids: Optional) -> Tensor:
    count = layout[1] if ids is None else ids.shape[0]
    return stored[0].new_empty(count, layout[2], dtype=torch.float32)


_WEIGHTS = "Tensor[] stored, int[] layout, float[] numbers"

# y_p = x W_p^T + bias_p + s_p u_p B_p^T with u_p = x A_p^T (T, rank_p). x: (T, in_features), float32.
forward_op = define_op(
    "frozen_linear",
    f"(Tensor x, {_WEIGHTS}, Tensor?[] bias, Tensor?[] A, Tensor?[] B) -> (Tensor[], Tensor[])",
    reference=_forward_reference,
    fake=_forward_fake,
    native_call=linear_native.forward,
)
# dx = sum_p dy_p W_p + s_p v_p A_p with v_p = dy_p B_p (T, rank_p).
backward_input_op = define_op(
    "frozen_linear_backward_input",
    f"(Tensor[] dys, {_WEIGHTS}, Tensor?[] A, Tensor?[] B) -> (Tensor, Tensor[])",
    reference=_backward_input_reference,
    fake=_backward_input_fake,
    native_call=linear_native.backward_input,
)
# scaling inner^T x, (rank, C), or its transpose (C, rank): dA = s v^T x and dB = s dy^T u.
outer_op = define_op(
    "frozen_linear_backward_factor",
    "(Tensor inner, Tensor x, float scaling, bool turned) -> Tensor",
    reference=_outer_reference,
    fake=_outer_fake,
    native_call=linear_native.outer,
)
# Rows of W in float32: those of `ids`, or all.
rows_op = define_op(
    "dequantize_rows",
    f"({_WEIGHTS}, Tensor? ids) -> Tensor",
    reference=_rows_reference,
    fake=_rows_fake,
    native_call=linear_native.rows,
)


def factor_product(dy: Tensor, B: Tensor) -> Tensor:
    """v = dy B, (T, rank), as `backward_input_op` gives it beside dx, where no dx is wanted.

    dy: (T, out_features), B: (out_features, rank), float32. The order of its sums does not depend on the threads.
    """
    stored, layout, numbers, *rest = flatten([Part(Storage.dense(B, transposed=True))])
    (v,), _ = forward_op(dy, stored, layout, numbers, *rest)
    return v


def column_sums(dy: Tensor) -> Tensor:
    """The sum of dy over tokens, (out_features,): a bias's gradient. Its order does not depend on the threads."""
    return outer_op(dy.new_ones(dy.shape[0], 1), dy, 1.0, False).reshape(-1)
