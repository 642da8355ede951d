"""Streaming second moments of what goes into each linear layer: H = sum_t w_t x_t x_t^T."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import head_name, linear_layers, look_at_inputs, shared_inputs
from luthier.data.packing import Pack
from luthier.errors import NumericError, PreflightError, bulleted
from luthier.progress import Progress
from luthier.units import size_text

DOUBLE_BYTES = 8
TOKENS_AT_ONCE = 1024
COLUMNS_AT_ONCE = 512


@dataclass
class Moments:
    """What is known of the inputs x_t, t = 1 ... tokens, of one layer, or of several that share one.

    second: sum_t w_t x_t x_t^T, (in_features, in_features) float64, symmetric.
    """

    second: Tensor
    tokens: int


class MomentSum:
    """Takes in inputs a block at a time.

    A block of at most 1024 tokens and 512 columns is multiplied in float32 and added in float64, so that
    |error| <= 1024 * 2^-24 * sum_t w_t |x_ti x_tj| however many tokens come. One triangle is computed and mirrored at the end.
    Memory: in_features^2 float64, and in_features * 512 float32 while a block is multiplied.
    """

    def __init__(self, in_features: int):
        self._second = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._tokens = 0
        pieces = -(-in_features // COLUMNS_AT_ONCE)
        self._columns = [(in_features * n // pieces, in_features * (n + 1) // pieces) for n in range(pieces)]

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x: (T, in_features), any float dtype; weights: (T,), none below 0, or None for ones."""
        for first in range(0, len(x), TOKENS_AT_ONCE):
            rows = x[first : first + TOKENS_AT_ONCE].to(torch.float32)
            self._tokens += len(rows)
            if weights is not None:
                rows = rows * weights[first : first + TOKENS_AT_ONCE].to(torch.float32).sqrt()[:, None]
            turned = rows.T
            for start, stop in self._columns:
                self._second[start:, start:stop] += turned[start:] @ rows[:, start:stop]

    def moments(self) -> Moments:
        """What came in so far. The sum goes on in the same memory if more is added."""
        for start, stop in self._columns:
            block = self._second[start:stop, start:stop]
            block.copy_((block + block.T) / 2)
            self._second[start:stop, stop:] = self._second[stop:, start:stop].T
        return Moments(self._second, self._tokens)


def collect_moments(
    model: PreTrainedModel, packs: Sequence[Pack], names: Sequence[str] | None = None, *, progress: Progress | None = None
) -> dict[str, Moments]:
    """The moments, w_t = 1, of each layer of `names` (default: every linear layer but the head) over `packs`, in one pass.

    Layers that are given one tensor have one Moments object between them. The model is as it was afterwards.
    Memory: beside the pass itself 8 in_features^2 bytes for each input that layers do not share; `moments_in_passes` bounds it.
    Raises ConfigError for names that are no linear layers; NumericError naming the layers whose inputs are not finite.
    """
    return _one_pass(model, packs, _groups(model, names), None, progress)


def moments_in_passes(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    names: Sequence[str] | None = None,
    *,
    max_bytes: int,
    progress: Progress | None = None,
) -> Iterator[dict[str, Moments]]:
    """As `collect_moments`, a few layers at a time in the order they run, so that their moments take at most `max_bytes`.

    Each pass ends at the last layer it is for. Take what is yielded out of its dictionary before the next is asked for, and
    memory holds one pass's at a time. Raises PreflightError, with the bytes needed, if the moments of one layer alone take
    more.
    """
    for groups, last in _fitting_passes(model, _groups(model, names), max_bytes):
        yield _one_pass(model, packs, groups, last, progress)


def _fitting_passes(
    model: PreTrainedModel, groups: list[list[str]], max_bytes: int
) -> list[tuple[list[list[str]], str | None]]:
    """For each pass the groups, one after another, whose moments fit together, and the layer at which it may end."""
    layers = linear_layers(model, [group[0] for group in groups])
    sizes = [DOUBLE_BYTES * layers[group[0]].in_features ** 2 for group in groups]
    if max(sizes, default=0) > max_bytes:
        raise PreflightError(
            f"the second moments of one layer's input must fit; they take {size_text(max(sizes))}, "
            f"allowed are {size_text(max_bytes)}. Allow more memory, or leave the widest layers out."
        )
    passes: list[list[list[str]]] = []
    room = 0
    for group, size in zip(groups, sizes, strict=True):
        if size > room:
            passes.append([])
            room = max_bytes
        passes[-1].append(group)
        room -= size
    return [(own, None if own is passes[-1] else own[-1][-1]) for own in passes]


def _groups(model: PreTrainedModel, names: Sequence[str] | None) -> list[list[str]]:
    """Layers whose moments are one, in the order they run; the head, which runs last, at the end."""
    groups, head = shared_inputs(model, names), head_name(model)
    return sorted(groups, key=lambda group: head in group)


def _one_pass(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Sequence[Sequence[str]],
    last: str | None,
    progress: Progress | None,
) -> dict[str, Moments]:
    layers = linear_layers(model, [group[0] for group in groups])
    # Of layers that share an input the first stands for all; `last` is looked at to know when to stop.
    sums = {name: MomentSum(layer.in_features) for name, layer in layers.items()}
    looked_at = list(sums) if last is None or last in sums else [*sums, last]

    def see(name: str, x: Tensor) -> None:
        if name in sums:
            sums[name].add(x)

    for number, pack in enumerate(packs):
        if progress is not None:
            progress("measuring the layers' inputs", number, len(packs))
        look_at_inputs(model, pack, looked_at, see, last=last)
    moments = {name: own.moments() for name, own in sums.items()}
    _check_finite(moments)
    return {name: moments[group[0]] for group in groups for name in group}


def _check_finite(moments: dict[str, Moments]) -> None:
    bad = [name for name, own in moments.items() if not bool(own.second.isfinite().all())]
    if bad:
        raise NumericError(
            f"what goes into a layer must be finite; NaN or Inf in:\n{bulleted(bad)}\nCheck the model, and its storage."
        )
