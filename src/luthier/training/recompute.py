"""Layers whose activations are not kept: backward computes them a second time from the layer's input."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import ModelError
from luthier.models.pack_layout import current_layout


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers of a causal language model, first to last: the outermost list as long as the model is deep.

    Raises ModelError where there is none.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and isinstance(module[0], GradientCheckpointingLayer):
            return list(module)
    raise ModelError(f"{type(model).__name__} has no list of {depth} decoder layers. Use a model of a known family.")


def check_recomputed(count: int, layers: int, first: int) -> None:
    """Raise ModelError if a model has fewer than `count` layers from layer `first` on."""
    most = layers - first
    if count > most:
        which = f"all {most}" if first == 0 else f"the {most} trained"
        raise ModelError(f"at most {which} decoder layers can be computed again; got {count}. Try {most}.")


def set_recomputed(model: Any, count: int, *, first: int = 0) -> None:
    """From now on `count` decoder layers, from layer `first` on, keep only their input for backward; the others everything.

    first: the lowest layer that trains, below which nothing is kept anyway. The lowest ones, since backward reaches them
    last: the layers after them have let go of their activations by then.
    Gradients are those of a model that keeps everything: the second pass is over the same documents and, where
    something is dropped, with the same random numbers. Without gradients nothing changes.
    Raises ModelError where the model has fewer layers.
    """
    layers = decoder_layers(model)
    check_recomputed(count, len(layers), first)
    for number, layer in enumerate(layers):
        layer.__dict__.pop("forward", None)
        again = first <= number < first + count
        layer.__dict__["is_recomputed"] = again  # for the fused blocks, which do not call forward
        if again:
            layer.forward = partial(_recomputed, layer)


def _recomputed(layer: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """The layer's own forward, through torch's non-reentrant checkpoint; the signature is the layer's."""
    forward = partial(type(layer).forward, layer)
    if not is_grad_enabled():
        return forward(*inputs, **settings)
    layout = current_layout()
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), layout()), **settings)
