"""Lets the attention of a Transformers model see a row of tokens as documents laid end to end.

A family whose attention is looked up through Transformers' attention interface is switched to ours for the time of
one forward pass; the Trainer, generation and caches keep the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from luthier.models.attention import packed_attention

INTERFACE_NAME = "luthier_packed"

Layout = Callable[[], AbstractContextManager[None]]

_boundaries: ContextVar[tuple[int, ...]] = ContextVar("boundaries")
_layout: ContextVar[Layout] = ContextVar("layout", default=nullcontext)


class NotPackable(Exception):
    """The model's attention is more than causal, windowed attention inside each document; its text says what."""


@contextmanager
def packed_layout(model: PreTrainedModel, starts: Sequence[int]) -> Iterator[None]:
    """Within the block, a row of ids given to `model` is documents with the boundaries `starts`, from 0 to T.

    Every configuration in the model names our attention until the block ends. Layers that recompute their activations
    in backward see the same documents again then. One thread at a time may use the model in this way.
    The forward pass raises NotPackable where the family asks for another kind of mask or bias.
    """
    AttentionInterface.register(INTERFACE_NAME, _attention)
    AttentionMaskInterface.register(INTERFACE_NAME, _mask)
    configs = list({id(config): config for config in map(_config_of, model.modules()) if config is not None}.values())
    layout = partial(_switched, configs, tuple(starts))
    with _recomputing_in(model, layout), layout():
        yield


def is_packed(model: PreTrainedModel) -> bool:
    """Whether `model` is inside `packed_layout`."""
    return model.config.get_text_config()._attn_implementation == INTERFACE_NAME


def current_layout() -> Layout:
    """What makes the present layout again, for a layer that is computed a second time after the block has ended."""
    return _layout.get()


def _config_of(module: nn.Module) -> PretrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PretrainedConfig) else None


@contextmanager
def _switched(configs: list[PretrainedConfig], starts: tuple[int, ...]) -> Iterator[None]:
    names = [config._attn_implementation for config in configs]
    token = _boundaries.set(starts)
    layout = _layout.set(partial(_switched, configs, starts))
    try:
        for config in configs:
            config._attn_implementation = INTERFACE_NAME
        yield
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        _boundaries.reset(token)
        _layout.reset(layout)


@contextmanager
def _recomputing_in(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Make layers with gradient checkpointing, recomputed after this block has ended, recompute inside `layout`."""
    layers: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    layers = [layer for layer in layers if hasattr(layer, "_gradient_checkpointing_func")]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            recomputed = partial(function, use_reentrant=False, context_fn=lambda: (nullcontext(), layout()))
            layer._gradient_checkpointing_func = recomputed
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = function


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Transformers' attention signature. query: (1, H, T, D); key, value: (1, K, T, D) -> ((1, T, H, D), None).

    `_unused` takes what families pass to every attention and that does not change it (positions, flags of other kernels).
    """
    starts = _boundaries.get()
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotPackable("its attention is not causal")
    if position_bias is not None:
        raise NotPackable("its attention has a position bias")
    if query.shape[0] != 1 or query.shape[2] != starts[-1] or key.shape[2] != starts[-1]:
        raise NotPackable("its attention reads other tokens than those of the row")
    windows = [int(window) for window in (sliding_window or None, attention_mask) if window is not None]
    output = packed_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        starts,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        min(windows, default=None),
        softcap,
        dropout=dropout,
        sinks=s_aux,
    )
    return output[None], None


def _mask(
    q_length: int,
    mask_function: Callable[..., Tensor],
    device: torch.device,
    local_size: int | None = None,
    **_unused: object,
) -> Tensor | None:
    """Transformers' mask signature. No mask is made: None, or for sliding layers the window as a (1, 1, 1, 1) tensor.

    `mask_function` says which pairs (query, key) the family lets see each other. A causal band inside each document is
    known from its edges, so these are checked: the token itself, the one before, the one after, and the window's ends.
    """
    starts = torch.tensor(_boundaries.get(), device=device)
    here = torch.arange(q_length, device=device)
    first = torch.repeat_interleave(starts[:-1], starts.diff())
    window = q_length if local_size is None else local_size
    zero = torch.zeros_like(here)
    for distance in {-1, 0, 1, window - 1, window}:
        seen = mask_function(zero, zero, here, (here - distance).clamp(0, q_length - 1))
        expected = (distance >= 0) & (distance < window) & (here - distance >= first)
        inside = (here - distance >= 0) & (here - distance < q_length)
        if bool((torch.as_tensor(seen, device=device).expand_as(here) != expected)[inside].any()):
            raise NotPackable("its mask is not causal inside each document")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size, device=device)


def documents(starts: Sequence[int]) -> list[slice]:
    """The slice of the row that each document covers, empty documents left out."""
    return [slice(first, end) for first, end in pairwise(starts) if end > first]
