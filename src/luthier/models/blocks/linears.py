"""Frozen linear layers that share an input, inside a half: forward, and backward written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier import kernels
from luthier.kernels.linear_ops import backward_input_op, column_sums, factor_product, flatten, forward_op, outer_op
from luthier.linear import LowRankLinear, enabled_terms, joined
from luthier.matrices import FactoredMatrix

Small = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Linears:
    """`count` layers of one input: their stored matrices as the kernels take them.

    What may train is not part of it: `small` is count biases, then count A, then count B, each a tensor or None, which
    go through autograd as inputs of a half.
    """

    count: int
    stored: list[Tensor]
    layout: list[int]
    numbers: list[float]

    @property
    def small_count(self) -> int:
        return 3 * self.count

    def forward(self, x: Tensor, small: Small) -> tuple[list[Tensor], list[Tensor]]:
        """(y, u) of each layer: y (T, out_features), and u = x A^T (T, rank), which backward needs where B trains."""
        bias, A, B = self._split(small)
        return forward_op(x, self.stored, self.layout, self.numbers, bias, A, B)

    def backward(
        self, dys: list[Tensor], x: Tensor | None, inner: Small, small: Small, wants: Sequence[bool], wants_dx: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, gradients of `small`). x is needed where an A trains; `inner` are the u where their B does."""
        _, A, B = self._split(small)
        wants_bias, wants_A, wants_B = self._split(wants)
        if wants_dx:
            dx, v = backward_input_op(dys, self.stored, self.layout, self.numbers, A, B)
        else:
            dx, v = None, [factor_product(dy, b) if wanted else None for dy, b, wanted in zip(dys, B, wants_A, strict=True)]
        scalings = self.numbers[1::2]
        dbias = [column_sums(dy) if wanted else None for dy, wanted in zip(dys, wants_bias, strict=True)]
        dA = _gradients_of_A(v, x, scalings, wants_A)
        dB = [outer_op(inner[p], dys[p], scalings[p], True) if wants_B[p] else None for p in range(self.count)]
        return dx, [*dbias, *dA, *dB]

    def kept_inner(self, inner: list[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
        """The u that backward will need, None for the others."""
        _, _, wants_B = self._split(wants)
        return [u if wanted else None for u, wanted in zip(inner, wants_B, strict=True)]

    def wants_input(self, wants: Sequence[bool]) -> bool:
        """Whether an A trains, so that backward needs x."""
        return any(self._split(wants)[1])

    def _split(self, small: Sequence) -> tuple[list, list, list]:
        return list(small[: self.count]), list(small[self.count : 2 * self.count]), list(small[2 * self.count :])


@dataclass(frozen=True, eq=False)
class FirstAtRows:
    """Layers of one input, as `Linears`, the first of them at the positions `rows`, (S,) int64, only.

    `small` is that of the first, then that of the rest.
    """

    first: Linears
    rest: Linears
    rows: Tensor

    @property
    def count(self) -> int:
        return self.first.count + self.rest.count

    @property
    def small_count(self) -> int:
        return self.first.small_count + self.rest.small_count

    def forward(self, x: Tensor, small: Small) -> tuple[list[Tensor], list[Tensor]]:
        """(y, u) of each layer; (S, ...) of the first, (T, ...) of the others."""
        own, others = self._split(small)
        y, u = self.first.forward(x[self.rows], own)
        rest_y, rest_u = self.rest.forward(x, others)
        return [*y, *rest_y], [*u, *rest_u]

    def backward(
        self, dys: list[Tensor], x: Tensor | None, inner: Small, small: Small, wants: Sequence[bool], wants_dx: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As `Linears.backward`; the first of dys and of inner are (S, ...)."""
        own, others = self._split(small)
        wants_own, wants_others = self._split(wants)
        x_own = x[self.rows] if x is not None and self.first.wants_input(wants_own) else None
        dx_own, gradients = self.first.backward(dys[:1], x_own, inner[:1], own, wants_own, wants_dx)
        dx, rest = self.rest.backward(dys[1:], x, inner[1:], others, wants_others, wants_dx)
        if dx is not None and dx_own is not None:
            dx.index_add_(0, self.rows, dx_own)
        return dx, [*gradients, *rest]

    def kept_inner(self, inner: list[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
        """The u that backward will need, None for the others."""
        own, others = self._split(wants)
        return [*self.first.kept_inner(inner[:1], own), *self.rest.kept_inner(inner[1:], others)]

    def wants_input(self, wants: Sequence[bool]) -> bool:
        """Whether an A trains, so that backward needs x."""
        own, others = self._split(wants)
        return self.first.wants_input(own) or self.rest.wants_input(others)

    def _split(self, small: Sequence) -> tuple[Sequence, Sequence]:
        return small[: self.first.small_count], small[self.first.small_count :]


def _gradients_of_A(
    v: Sequence[Tensor], x: Tensor | None, scalings: Sequence[float], wants: Sequence[bool]
) -> list[Tensor | None]:
    """s v^T x of each layer that wants it. What such products cost is reading x: equal scalings share one reading."""
    chosen = [p for p, wanted in enumerate(wants) if wanted]
    if len(chosen) < 2 or len({scalings[p] for p in chosen}) > 1:
        return [outer_op(v[p], x, scalings[p], False) if wanted else None for p, wanted in enumerate(wants)]
    together = outer_op(torch.cat([v[p] for p in chosen], 1), x, scalings[chosen[0]], False)
    gradients: list[Tensor | None] = [None] * len(wants)
    for p, gradient in zip(chosen, together.split([v[p].shape[1] for p in chosen]), strict=True):
        gradients[p] = gradient
    return gradients


def wants_of(needs_input_grad: Sequence[bool], first_count: int) -> tuple[bool, tuple[bool, ...], tuple[bool, ...]]:
    """Which gradients a half is asked for: of x, of its first `first_count` small tensors, and of the rest.

    needs_input_grad: autograd's, for (x, plan, *small).
    """
    wants_dx, _, *small = needs_input_grad
    return wants_dx, tuple(small[:first_count]), tuple(small[first_count:])


def linears_of(layers: Sequence[LowRankLinear]) -> tuple[Linears, list[Tensor | None]]:
    """The layers' matrices, and `small`: their biases and terms, several terms of a layer joined into one."""
    stored, layout, numbers, bias, A, B = flatten([_part(layer) for layer in layers])
    return Linears(len(layers), stored, layout, numbers), [*bias, *A, *B]


def is_one_product(layer: object) -> bool:
    """Whether x W^T + bias + terms is all the layer computes, W frozen and in the CPU's memory."""
    if type(layer) is not LowRankLinear or layer.weight.requires_grad or layer.weight.device.type != "cpu":
        return False
    if isinstance(layer.matrix, FactoredMatrix):
        return False
    return all(term.is_fused and not term.lora_A.is_meta for term in enabled_terms(layer))


def _part(layer: LowRankLinear) -> kernels.Part:
    terms = enabled_terms(layer)
    shifts = [term.scaling * term.lora_B_bias for term in terms if term.lora_B_bias is not None]
    bias = sum(shifts, layer.bias) if layer.bias is not None else (torch.stack(shifts).sum(0) if shifts else None)
    term = joined(terms)
    if term is not None and not (term.A.is_contiguous() and term.B.is_contiguous()):
        term = kernels.Term(term.A.contiguous(), term.B.contiguous(), term.scaling)
    assert not isinstance(layer.matrix, FactoredMatrix)
    return kernels.Part(layer.matrix.storage(), bias, term)
