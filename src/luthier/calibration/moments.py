"""Streaming second moments of what goes into each linear layer: H = sum_t w_t x_t x_t^T."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import head_name, linear_layers, look_at_gradients, look_at_inputs, shared_inputs
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

    second: sum_t w_t x_t x_t^T, (in_features, in_features) float64, symmetric; weight: sum_t w_t, which is `tokens` where
    every w_t = 1; abs_sum: sum_t |x_t|, (in_features,) float64.
    """

    second: Tensor
    tokens: int
    weight: float
    abs_sum: Tensor

    @property
    def mean_second(self) -> Tensor:
        """sum_t w_t x_t x_t^T / sum_t w_t, float64; zero where nothing was seen."""
        return self.second / self.weight if self.weight > 0 else self.second

    @property
    def mean_abs(self) -> Tensor:
        """The mean of |x|, (in_features,) float64."""
        return self.abs_sum / max(1, self.tokens)


class MomentSum:
    """Takes in inputs a block at a time.

    A block of at most 1024 tokens and 512 columns is multiplied in float32 and added in float64, so that
    |error| <= 1024 * 2^-24 * sum_t w_t |x_ti x_tj| however many tokens come. One triangle is computed and mirrored at the end.
    Memory: in_features^2 float64, and in_features * 512 float32 while a block is multiplied.
    """

    def __init__(self, in_features: int):
        self._second = torch.zeros(in_features, in_features, dtype=torch.float64)
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64)
        self._tokens, self._weight = 0, 0.0
        pieces = -(-in_features // COLUMNS_AT_ONCE)
        self._columns = [(in_features * n // pieces, in_features * (n + 1) // pieces) for n in range(pieces)]

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x: (T, in_features), any float dtype; weights: (T,), none below 0, or None for ones."""
        for first in range(0, len(x), TOKENS_AT_ONCE):
            rows = x[first : first + TOKENS_AT_ONCE].to(torch.float32)
            self._abs_sum += rows.abs().sum(0)
            self._tokens += len(rows)
            if weights is None:
                self._weight += len(rows)
            else:
                own = weights[first : first + TOKENS_AT_ONCE].to(torch.float32)
                self._weight += float(own.to(torch.float64).sum())
                rows = rows * own.sqrt()[:, None]
            turned = rows.T
            for start, stop in self._columns:
                self._second[start:, start:stop] += turned[start:] @ rows[:, start:stop]

    def moments(self) -> Moments:
        """What came in so far. The sum goes on in the same memory if more is added."""
        for start, stop in self._columns:
            block = self._second[start:stop, start:stop]
            block.copy_((block + block.T) / 2)
            self._second[start:stop, stop:] = self._second[stop:, start:stop].T
        return Moments(self._second, self._tokens, self._weight, self._abs_sum)


def collect_moments(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    names: Sequence[str] | None = None,
    *,
    gradient_weights: bool = False,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """The moments of each layer of `names` (default: every linear layer but the head) over `packs`, in one pass.

    Layers that are given one tensor have one Moments object between them. gradient_weights: w_t = |g_t|^2, g_t the gradient
    of the pack's summed loss at the layer's output; one backward pass a pack, and each layer has moments of its own, for each
    has gradients of its own. Otherwise w_t = 1. The model is as it was afterwards, and so are gradients.
    Memory: `moments_bytes` of the names, beside the pass itself; `moments_in_passes` bounds it.
    Raises ConfigError for names that are no linear layers, or for the head with gradient_weights; NumericError naming the
    layers whose inputs are not finite.
    """
    groups = _groups(model, names, gradient_weights)
    return _one_pass(model, packs, groups, gradient_weights, None, progress)


def moments_in_passes(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    names: Sequence[str] | None = None,
    *,
    max_bytes: int,
    gradient_weights: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Moments]]:
    """As `collect_moments`, a few layers at a time in the order they run, so that their moments take at most `max_bytes`.

    Each pass without gradients ends at the last layer it is for. Take what is yielded out of its dictionary before the next is
    asked for, and memory holds one pass's at a time. Raises PreflightError, with the bytes needed, if the moments of one layer
    alone take more.
    """
    groups = _groups(model, names, gradient_weights)
    layers = linear_layers(model, [name for group in groups for name in group])
    sizes = [DOUBLE_BYTES * layers[group[0]].in_features ** 2 for group in groups]
    if max(sizes) > max_bytes:
        raise PreflightError(
            f"the second moments of one layer's input must fit; they take {size_text(max(sizes))}, "
            f"allowed are {size_text(max_bytes)}. Allow more memory, or leave the widest layers out."
        )
    begin = 0
    while begin < len(groups):
        end = begin + 1
        while end < len(groups) and sum(sizes[begin : end + 1]) <= max_bytes:
            end += 1
        last = groups[end - 1][-1] if end < len(groups) else None
        yield _one_pass(model, packs, groups[begin:end], gradient_weights, last, progress)
        begin = end


def moments_bytes(model: PreTrainedModel, names: Sequence[str] | None = None, *, gradient_weights: bool = False) -> int:
    """What `collect_moments` of these layers holds at once: 8 in_features^2 bytes for each input they do not share."""
    groups = _groups(model, names, gradient_weights)
    layers = linear_layers(model, [name for group in groups for name in group])
    return sum(DOUBLE_BYTES * layers[group[0]].in_features ** 2 for group in groups)


def _groups(model: PreTrainedModel, names: Sequence[str] | None, gradient_weights: bool) -> list[list[str]]:
    """Layers whose moments are one, in the order they run; the head, which runs last, at the end."""
    groups = shared_inputs(model, names)
    if gradient_weights:
        groups = [[name] for group in groups for name in group]
    head = head_name(model)
    return [group for group in groups if head not in group] + [group for group in groups if head in group]


def _one_pass(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Sequence[Sequence[str]],
    gradient_weights: bool,
    last: str | None,
    progress: Progress | None,
) -> dict[str, Moments]:
    names = [name for group in groups for name in group]
    layers = linear_layers(model, names)
    sums = {group[0]: MomentSum(layers[group[0]].in_features) for group in groups}
    # Of layers that share an input the first stands for all; `last` is looked at to know when to stop.
    leaders = list(sums)

    def see(name: str, x: Tensor) -> None:
        if name in sums:
            sums[name].add(x)

    def see_gradient(name: str, x: Tensor, gradient: Tensor) -> None:
        sums[name].add(x, gradient.to(torch.float64).square().sum(1))

    for number, pack in enumerate(packs):
        if progress is not None:
            progress("measuring the layers' inputs", number, len(packs))
        if gradient_weights:
            look_at_gradients(model, pack, leaders, see_gradient)
        else:
            looked_at = leaders if last is None or last in sums else [*leaders, last]
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
