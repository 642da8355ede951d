"""What merging does to a model: each way of it against base plus adapter as trained, on rows of the run's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier import kernels
from luthier.adapters.targets import low_rank_layers
from luthier.data import Example
from luthier.data.packing import Pack, pack_examples
from luthier.export import forms
from luthier.export.merge import Merge
from luthier.linear import LowRankLinear
from luthier.matrices import Matrix
from luthier.models.blocks.body import without_blocks
from luthier.models.modes import evaluation_mode
from luthier.models.packed import head_of, packed_hidden, packed_logits
from luthier.training.memory import available_bytes

PACK_TOKENS = 4096
# Logits of the reference are kept: supervised tokens times vocabulary, 4 bytes each.
LOGITS_BYTES = 512 << 20
# Of the memory that is free, what merged matrices may take while there is another pack to multiply with them.
KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Difference:
    """How one model differs from another on supervised tokens.

    logits_error: |difference| / |logits|, over all of them; largest_logits_error: the largest difference over the largest
    logit; loss, loss_reference: mean -log p; token_agreement: share of tokens at which both would write the same next
    one; row_agreement: share of rows where they do at every supervised token; tokens, rows: what was compared.
    """

    logits_error: float
    largest_logits_error: float
    loss: float
    loss_reference: float
    token_agreement: float
    row_agreement: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class Reference:
    """The logits (S, vocabulary) of the model as trained, a pack at a time, and for each target the number of its row."""

    packs: list[Pack]
    logits: list[Tensor]
    row_of: list[Tensor]

    @property
    def rows(self) -> int:
        return sum(len(pack.rows) for pack in self.packs)


@torch.no_grad()
def reference_of(model: PreTrainedModel, examples: Sequence[Example], most_bytes: int = LOGITS_BYTES) -> Reference:
    """Logits of as many of the rows, from the first on, as fit into `most_bytes`; of one at least."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    kept: list[Example] = []
    tokens = 0
    for example in examples:
        own = sum(example.supervised[1:])
        if kept and 4 * vocabulary * (tokens + own) > most_bytes:
            break
        if own:
            kept.append(example)
            tokens += own
    packs = pack_examples(kept, max_tokens=PACK_TOKENS)
    rows = [torch.cat([torch.full((sum(kept[row].supervised[1:]),), row) for row in pack.rows]) for pack in packs]
    with evaluation_mode(model):
        return Reference(packs, [_logits(model, pack) for pack in packs], rows)


def difference_to(reference: Reference, logits: Iterator[Tensor]) -> Difference:
    """Compare with the logits of another model on the same packs, in their order."""
    squares = total = largest = size = loss = expected = 0.0
    same: list[Tensor] = []
    for pack, wanted, got in zip(reference.packs, reference.logits, logits, strict=True):
        gap = got - wanted
        squares += float(gap.square().sum(dtype=torch.float64))
        total += float(wanted.square().sum(dtype=torch.float64))
        largest, size = max(largest, float(gap.abs().max())), max(size, float(wanted.abs().max()))
        loss += float(F.cross_entropy(got, pack.targets, reduction="sum"))
        expected += float(F.cross_entropy(wanted, pack.targets, reduction="sum"))
        same.append(got.argmax(1) == wanted.argmax(1))
    agreed, row_of = torch.cat(same), torch.cat(reference.row_of)
    tokens, rows = len(agreed), reference.rows
    differing = len(row_of[~agreed].unique())
    return Difference(
        math.sqrt(squares / max(total, 1e-30)), largest / max(size, 1e-30), loss / tokens, expected / tokens,
        float(agreed.double().mean()), 1 - differing / rows, tokens, rows,
    )  # fmt: skip


def merged_difference(
    reference: Reference, merge: Merge, store: Callable[[str, Tensor], Matrix], plain_kind: str
) -> Difference:
    """Compare the model as trained with its merge, each matrix stored as `store(layer, merged weight)` makes it, norms and
    biases as `plain_kind`.

    A matrix is merged when it is first multiplied with, and kept for the next pack as far as KEPT_SHARE of the free memory
    goes; the others are merged anew for each pack, so that of these memory holds one at a time.
    """
    return difference_to(reference, _merged_logits(reference, merge, store, plain_kind))


def merged_reference(reference: Reference, merge: Merge, store: Callable[[str, Tensor], Matrix], plain_kind: str) -> Reference:
    """The logits of the merge itself on the same rows: what a file made of it must give."""
    logits = list(_merged_logits(reference, merge, store, plain_kind))
    return Reference(reference.packs, logits, reference.row_of)


def _merged_logits(
    reference: Reference, merge: Merge, store: Callable[[str, Tensor], Matrix], plain_kind: str
) -> Iterator[Tensor]:
    room = _Room(int(KEPT_SHARE * available_bytes()) if len(reference.packs) > 1 else 0)
    with torch.no_grad(), evaluation_mode(merge.model), without_blocks(), _merged(merge, store, plain_kind, room):
        for pack in reference.packs:
            yield _logits(merge.model, pack)


def model_difference(reference: Reference, model: PreTrainedModel) -> Difference:
    """Compare the model as trained with any other loaded one, such as an export that was read back."""
    return difference_to(reference, model_logits(model, reference))


def model_logits(model: PreTrainedModel, reference: Reference) -> Iterator[Tensor]:
    """The logits of any loaded model at the reference's supervised tokens, a pack at a time."""
    with torch.no_grad(), evaluation_mode(model):
        for pack in reference.packs:
            yield _logits(model, pack)


def _logits(model: PreTrainedModel, pack: Pack) -> Tensor:
    head = head_of(model)
    if head is None:
        return packed_logits(model, pack.ids, pack.starts, pack.predict)
    return head.logits(packed_hidden(model, pack.ids, pack.starts, pack.predict))


@dataclass
class _Room:
    """left: bytes that merged matrices may still take."""

    left: int


class _MergedMatrix(nn.Module):
    """Stands in a layer's place of its matrix: merges when it is used, and keeps the result where there is room for it.
    Only what a forward pass asks for."""

    def __init__(self, merge: Merge, name: str, store: Callable[[str, Tensor], Matrix], room: _Room):
        super().__init__()
        matrix = merge.matrix(name)
        self._make = lambda: store(name, merge.weight(name))
        self._kept: list[Matrix] = []  # in a list, so that it is no module of the model
        self._room = room
        self.shape, self.weight, self.kind = matrix.shape, matrix.weight, matrix.kind
        self.transposed = False

    def matmul(self, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
        return self._merged().matmul(x, bias, term)

    def rows(self, ids: Tensor) -> Tensor:
        return self._merged().rows(ids)

    def _merged(self) -> Matrix:
        if self._kept:
            return self._kept[0]
        matrix = self._make()
        if matrix.size_bytes <= self._room.left:
            self._room.left -= matrix.size_bytes
            self._kept.append(matrix)
        return matrix


@contextmanager
def _merged(merge: Merge, store: Callable[[str, Tensor], Matrix], plain_kind: str, room: _Room) -> Iterator[None]:
    """Within it every low-rank layer of the model computes with its merged matrix and bias, without terms."""
    layers = low_rank_layers(merge.model)
    before: list[tuple[Any, Any, Any, Any]] = [
        (layer, layer.matrix, getattr(layer, "bias", None), layer.terms) for layer in layers.values()
    ]
    plain = [(parameter, parameter.data) for parameter in _plain_parameters(merge)]
    try:
        for name, layer in layers.items():
            if isinstance(layer, LowRankLinear):
                bias = merge.bias(name)
                layer.bias = None if bias is None else nn.Parameter(_rounded(bias, plain_kind, name), requires_grad=False)
            layer.matrix = _MergedMatrix(merge, name, store, room)  # type: ignore[assignment]
            layer.terms = nn.ModuleDict()
        for parameter, data in plain:
            parameter.data = _rounded(data, plain_kind, "a norm or bias")
        yield
    finally:
        for layer, matrix, bias, terms in before:
            layer.matrix, layer.terms = matrix, terms
            if isinstance(layer, LowRankLinear):
                layer.bias = bias
        for parameter, data in plain:
            parameter.data = data


def _plain_parameters(merge: Merge) -> list[nn.Parameter]:
    """Parameters outside the low-rank layers: norms, position embeddings."""
    inside = tuple(f"{name}." for name in merge.layers)
    return [parameter for name, parameter in merge.model.named_parameters() if not name.startswith(inside)]


def _rounded(value: Tensor, kind: str, name: str) -> Tensor:
    return forms.dense(value.detach(), kind, name).to(torch.float32)
