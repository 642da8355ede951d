"""Which way a model, a layer and a half are computed, and the line in the log that says so.

Fused where all of a half is frozen products with low-rank terms; composed of parts where its linear layers compute
more than that; Transformers' own layer where something stands in the way of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier import notices
from luthier.kernels import native
from luthier.linear import LowRankLinear, LowRankTerm
from luthier.models.blocks.description import AttentionHalf, Layer, MlpHalf
from luthier.models.blocks.families import family_of
from luthier.models.blocks.fused_attention import HEAD_UNIT
from luthier.models.blocks.linears import is_one_product

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Transformers' hook on the embeddings with which gradients reach layers that are recomputed; it changes no number.
_HARMLESS_HOOK = "make_inputs_require_grads"
_ORIGINS = ("transformers.", "torch.nn.", "luthier.")


def body_obstacle(body: Any) -> str | None:
    """Why the model runs as Transformers' modules altogether, or None."""
    if family_of(body) is None:
        return "its family has no blocks of its own"
    if not native.use_native():
        return "the compiled kernels are not in use"
    if is_watched(body):
        return "its body has hooks or a forward of its own"
    if any(getattr(hook, "__name__", "") != _HARMLESS_HOOK for hook in _hooks(body.get_input_embeddings())):
        return "its embeddings have hooks"
    if getattr(body.config, "is_causal", True) is False:
        return "its attention is not causal"
    return None


def layer_obstacle(layer: Layer) -> str | None:
    """Why the layer runs as Transformers' own module, or None."""
    if layer.mlp.gate is None:
        return "there is no kernel for its activation"
    if not getattr(layer.module.self_attn, "is_causal", True):
        return "its attention is not causal"
    if any(is_watched(module) for module in layer.bypassed):
        return "it has hooks or a forward of its own"
    if not all(type(module).__module__.startswith(_ORIGINS) for module in layer.bypassed):
        return "a part of it has been replaced"
    if _drops(layer.module):
        return "the base model's own dropout is on"
    weights = [norm.weight for norm in (*layer.attention.norms, *layer.mlp.norms)]
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in weights):
        return "its norms are not in float32 on the CPU"
    return None


def half_obstacle(half: AttentionHalf | MlpHalf) -> str | None:
    """Why the half is composed of parts, or None where it is one operation."""
    if any(norm.weight.requires_grad for norm in half.norms):
        return "norms that train"
    if not all(is_one_product(linear) and not is_watched(linear) for linear in half.linears):
        return "linear layers with more than a frozen product and low-rank terms"
    if isinstance(half, AttentionHalf) and half.head_size % HEAD_UNIT:
        return f"a head size that is no multiple of {HEAD_UNIT}"
    return None


def recomputing(layer: Any) -> Callable[..., Any] | None:
    """What runs the layer a second time in backward, called with a function and its inputs; None where everything is kept.

    torch's checkpoint for layers marked by `set_recomputed`; where Transformers' own switch is on, its function with the
    options that were given to it.
    """
    if getattr(layer, "is_recomputed", False):
        return partial(checkpoint, use_reentrant=False)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return layer._gradient_checkpointing_func
    return None


def fits(hidden: Tensor) -> bool:
    """Whether the kernels take these activations."""
    return hidden.dtype == torch.float32 and hidden.device.type == "cpu"


def say_once(model: nn.Module, text: str) -> None:
    """Tell who listens to a run, and the log the first time it is true of this model."""
    notices.say_once(model, f"{type(model).__name__}: {text}")


def is_watched(module: Any) -> bool:
    """Whether calling the module does more than its class says."""
    own = module.__dict__
    replaced = "forward" in own and not own.get("is_recomputed", False)
    replaced = replaced and not getattr(module.forward, "uses_blocks", False)
    # Asked of every module of every layer in every step.
    return replaced or bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _hooks(module: Any) -> list[Any]:
    return [hook for name in _HOOKS for hook in getattr(module, name).values()]


def draws_masks(layer: Layer) -> bool:
    """Whether a term drops some of its input, each token by a mask of its own."""
    inside = (module for linear in layer.linears for module in _inside(linear))
    return any(isinstance(module, LowRankTerm) and module.dropout and module.training for module in inside)


def _inside(linear: Any) -> Iterable[nn.Module]:
    """Where terms may be. This is asked for every layer in every step, so the usual case does not walk the tree."""
    return linear.terms.values() if type(linear) is LowRankLinear else linear.modules()


def _drops(layer: Any) -> bool:
    drops = layer.self_attn.training and layer.self_attn.attention_dropout > 0
    return drops or any(isinstance(child, nn.Dropout) and child.training and child.p > 0 for child in layer.children())
