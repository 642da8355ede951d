"""Through a model layer by layer: the moments of what goes into each linear layer, given what stands below it now.

Tokens count by how much the loss feels what a layer gives for them:

    H = sum_t w_t x_t x_t^T / (2 S)     w_t = |g_t|^2 / out_features     g_t: gradient of the summed loss at the layer's output

so that tr(E H E^T) is the rise of the mean loss over S supervised tokens that an error E of the weight leads one to expect
(calibration/sensitivity.py). Weights are taken once, on the model as it was; inputs are those of the model as it is when its
layer is reached. Layers that are given one tensor (q, k and v; gate and up) form a group: they are reached together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers, look_at_inputs, look_at_output_gradients, run_looking, shared_inputs
from luthier.calibration.moments import MomentSum
from luthier.data.packing import Pack
from luthier.errors import NumericError, bulleted
from luthier.models.packed import entry_obstacle, packed_inputs, packed_layers
from luthier.progress import Progress
from luthier.training.allocator import trim_free_memory
from luthier.training.recompute import decoder_layers, set_recomputed


@dataclass(frozen=True)
class Group:
    """Linear layers of one input. weights: w of each layer and pack, (T,) float32."""

    names: tuple[str, ...]
    weights: dict[str, list[Tensor]]


@dataclass(frozen=True, eq=False)
class Seen:
    """A layer with the metric of its present inputs, (in_features, in_features) float64, in nats."""

    name: str
    metric: Tensor


Visit = Callable[[Iterator[Seen]], None]


def weighted_groups(model: PreTrainedModel, packs: Sequence[Pack], progress: Progress | None = None) -> list[Group]:
    """The groups of all linear layers but the head, in the order they run, with the weights of tokens: a backward pass a pack.

    Memory: beside the weights the hidden state of one pack at every decoder layer, and what one layer keeps for backward; in
    families without blocks of their own, what all layers keep. Raises NumericError where gradients are not finite.
    """
    groups = shared_inputs(model)
    felt: dict[str, list[Tensor]] = {name: [] for group in groups for name in group}
    with _recomputed(model):
        for number, pack in enumerate(packs):
            _report(progress, "measuring what the loss feels", number, len(packs))
            for name, squares in _gradient_squares(model, pack, list(felt)).items():
                felt[name].append(squares)
            trim_free_memory()
    bad = [name for name, own in felt.items() if not all(bool(weights.isfinite().all()) for weights in own)]
    if bad:
        raise NumericError(f"gradients must be finite; NaN or Inf at the output of:\n{bulleted(bad)}\nCheck the model.")
    return [Group(tuple(names), {name: felt[name] for name in names}) for names in groups]


@contextmanager
def _recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Within it decoder layers keep their inputs alone for backward, in families with blocks of their own."""
    if entry_obstacle(model) is not None:
        yield
        return
    set_recomputed(model, len(decoder_layers(model)))
    try:
        yield
    finally:
        set_recomputed(model, 0)


def _gradient_squares(model: PreTrainedModel, pack: Pack, names: Sequence[str]) -> dict[str, Tensor]:
    """|g_t|^2 / out_features at the output of each layer, (T,) float32; 0 where the loss does not depend on it."""
    found = {name: torch.zeros(pack.tokens) for name in names}

    def see(name: str, gradient: Tensor) -> None:
        squares = gradient.square().mean(1)
        # The last decoder layer may compute the tokens alone that a loss depends on.
        found[name][torch.arange(pack.tokens) if len(squares) == pack.tokens else pack.predict.unique()] = squares

    look_at_output_gradients(model, pack, names, see)
    return found


def walk(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Sequence[Group],
    visit: Visit,
    *,
    changes: bool,
    progress: Progress | None = None,
    stage: str = "",
) -> None:
    """Call visit with the layers of each group in the order they run; changes: it replaces their matrices, and later groups
    see what that did. Each layer's moments live until visit asks for the next one.

    Memory: beside the model one hidden state for every token, (tokens, hidden) float32, and one group's moments, or, where
    nothing changes, those of one decoder layer. A family without blocks of its own runs from its beginning for each group.
    """
    if entry_obstacle(model) is None:
        _walk_down(model, packs, groups, visit, changes, partial(_report, progress, stage))
        return
    for number, group in enumerate(groups):
        _report(progress, stage, number, len(groups))
        visit(_seen_from_the_beginning(model, packs, group))


def _walk_down(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Sequence[Group],
    visit: Visit,
    changes: bool,
    report: Callable[[int, int], None],
) -> None:
    """Decoder layer by decoder layer, each run on the hidden states that the one before gave."""
    hidden = [packed_inputs(model, pack.ids, pack.starts, 0) for pack in packs]
    depth = len(decoder_layers(model))
    for layer, own in enumerate(_by_layer(model, groups)):
        report(layer, depth)
        for together in [[group] for group in own] if changes else [own]:
            if together:
                visit(_seen_in_layer(model, packs, hidden, layer, together))
        for own_hidden, pack in zip(hidden, packs, strict=True):
            # In the same memory: states that move leave gaps which no other finds room in.
            own_hidden.copy_(packed_layers(model, own_hidden, pack.starts, layer, layer + 1))
        trim_free_memory()


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def _by_layer(model: PreTrainedModel, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups of each decoder layer."""
    names = {id(module): name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        prefix = f"{names[id(layer)]}."
        yield [group for group in groups if group.names[0].startswith(prefix)]


def _seen_in_layer(
    model: PreTrainedModel, packs: Sequence[Pack], hidden: list[Tensor], layer: int, groups: Sequence[Group]
) -> Iterator[Seen]:
    sums, last = _Sums(model, groups), groups[-1].names[0]
    for number, pack in enumerate(packs):

        def see(leader: str, x: Tensor, number: int = number) -> None:
            sums.add(number, leader, x.reshape(-1, x.shape[-1]))

        run = partial(packed_layers, model, hidden[number], pack.starts, layer, layer + 1)
        run_looking(model, sums.leaders, see, run, last=last)
    return sums.seen(packs)


def _seen_from_the_beginning(model: PreTrainedModel, packs: Sequence[Pack], group: Group) -> Iterator[Seen]:
    sums, leader = _Sums(model, [group]), group.names[0]
    for number, pack in enumerate(packs):
        look_at_inputs(model, pack, [leader], partial(sums.add, number), last=leader)
    return sums.seen(packs)


class _Sums:
    """The moments of some groups' layers; what goes into the first layer of a group goes into all of them."""

    def __init__(self, model: PreTrainedModel, groups: Sequence[Group]):
        self.leaders = linear_layers(model, [group.names[0] for group in groups])
        self._groups = {group.names[0]: group for group in groups}
        self._sums = {name: MomentSum(self.leaders[group.names[0]].in_features) for group in groups for name in group.names}

    def add(self, pack: int, leader: str, x: Tensor) -> None:
        for name, weights in self._groups[leader].weights.items():
            self._sums[name].add(x, weights[pack])

    def seen(self, packs: Sequence[Pack]) -> Iterator[Seen]:
        """Layer by layer; what was yielded is not held here any longer."""
        supervised = max(1, sum(pack.supervised_tokens for pack in packs))
        for name in list(self._sums):
            trim_free_memory()  # what a layer leaves has other sizes than what the next one takes, so that both would be held
            yield Seen(name, self._sums.pop(name).moments().second.div_(2.0 * supervised))
        trim_free_memory()
