"""Looking on while a model runs: what goes into each linear layer, and the gradient at what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.targets import all_linear, low_rank_layers
from luthier.data.packing import Pack
from luthier.errors import ConfigError, bulleted, nearest
from luthier.evaluation.loss import supervised_loss
from luthier.linear import LowRankLinear
from luthier.models.modes import evaluation_mode, inputs_require_grads
from luthier.models.packed import packed_hidden
from luthier.notices import heard_by

PROBE_TOKENS = 2

See = Callable[[str, Tensor], None]


class _SeenEnough(Exception):
    """No layer that is still to run is looked at."""


def linear_layers(model: PreTrainedModel, names: Sequence[str] | None) -> dict[str, LowRankLinear]:
    """The layers of these names, or every linear layer but the head. Raises ConfigError naming those that are none."""
    layers = low_rank_layers(model)
    wanted = all_linear(model) if names is None else list(names)
    chosen: dict[str, LowRankLinear] = {}
    problems = []
    for name in wanted:
        layer = layers.get(name)
        if isinstance(layer, LowRankLinear):
            chosen[name] = layer
        else:
            problems.append(f"{name!r} is none.{nearest(name, list(layers))}")
    if problems:
        raise ConfigError(f"calibration looks at linear layers of the model:\n{bulleted(problems)}")
    return chosen


def head_name(model: PreTrainedModel) -> str | None:
    """The output head's name among the layers, which reads what the body gives and is not called with it in a pass."""
    head = model.get_output_embeddings()
    return next((name for name, layer in low_rank_layers(model).items() if layer is head), None)


def shared_inputs(model: PreTrainedModel, names: Sequence[str] | None = None) -> list[list[str]]:
    """The layers in groups that are given one and the same tensor (q, k and v; gate and up), in the order they run.

    Found by running two tokens. Raises ConfigError for names that are no linear layers; a layer that is not run stands alone.
    """
    layers = linear_layers(model, names)
    groups: list[tuple[Tensor | None, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        elif not any(name in group for _, group in groups):
            groups.append((x, [name]))

    ids = torch.arange(PROBE_TOKENS, device=model.device)
    starts = torch.tensor([0, PROBE_TOKENS])
    run_looking(model, layers, see, lambda: packed_hidden(model, ids, starts))
    found = [group for _, group in groups]
    seen = {name for group in found for name in group}
    return found + [[name] for name in layers if name not in seen]


def look_at_inputs(model: PreTrainedModel, pack: Pack, names: Sequence[str], see: See, *, last: str | None = None) -> None:
    """Run the pack and call see(name, x) for each layer of `names` with its input x, (T, in_features), no graph.

    The head is given what the body gives. last: the layer after which nothing more is run; None runs all. In evaluation
    mode, adapters included as they are; nothing is left on the model, whatever happens.
    """
    layers = linear_layers(model, names)
    head = head_name(model)

    def see_flat(name: str, x: Tensor) -> None:
        see(name, x.detach().reshape(-1, x.shape[-1]))

    def run() -> None:
        hidden = packed_hidden(model, pack.ids, pack.starts)
        if head in layers:
            see(head, hidden)

    run_looking(model, layers, see_flat, run, last=last)


def look_at_output_gradients(model: PreTrainedModel, pack: Pack, names: Sequence[str], see: See) -> None:
    """Run the pack forward and backward: see(name, g), g (T', out_features) the gradient of the loss, summed over the pack's
    supervised tokens, at the output of each layer of `names` that it depends on.

    T' is T, and in the last decoder layer may be those tokens alone that a loss depends on. Parameters get no gradient.
    Raises ConfigError for the head, whose logits are never whole.
    """
    layers = linear_layers(model, names)
    if head_name(model) in layers:
        raise ConfigError("gradients are seen below the head, whose logits are never whole. Leave the head out.")

    def watch(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: see(name, g.detach().reshape(-1, g.shape[-1])))

        return hook

    with (
        evaluation_mode(model),
        heard_by(_nobody),
        hooked({name: layer.register_forward_hook(watch(name)) for name, layer in layers.items()}),
        inputs_require_grads(model) as entered,
        torch.enable_grad(),
    ):
        loss = supervised_loss(model, pack)
        if entered and loss.requires_grad:
            loss.backward(inputs=entered)


def run_looking(
    model: PreTrainedModel,
    layers: Mapping[str, LowRankLinear],
    see: See,
    run: Callable[[], Any],
    *,
    last: str | None = None,
) -> None:
    """run(), and see(name, what it is given) as each of `layers` is reached. last: the layer that ends the run, uncomputed."""

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def look(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            see(name, inputs[0])
            if name == last:
                raise _SeenEnough

        return look

    hooks = {name: layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()}
    with evaluation_mode(model), heard_by(_nobody), hooked(hooks), torch.no_grad():
        try:
            run()
        except _SeenEnough:
            return


def _nobody(_text: str) -> None:
    """What is said of a pass that is looked at holds for no other."""


@contextmanager
def hooked(handles: Mapping[str, Any]) -> Iterator[None]:
    """Within it hooks are on; their handles are removed afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()
