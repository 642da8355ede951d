"""A model's body over packed documents, its decoder layers as two fused halves each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.models.blocks import choice
from luthier.models.blocks.composed import composed_attention, composed_mlp
from luthier.models.blocks.description import Layer
from luthier.models.blocks.families import family_of
from luthier.models.blocks.fused_attention import fused_attention
from luthier.models.blocks.fused_mlp import fused_mlp
from luthier.models.blocks.tokens import Tables, Tokens, rotary_tables
from luthier.models.pack_layout import packed_layout

_switched_on: ContextVar[bool] = ContextVar("blocks", default=True)


@contextmanager
def without_blocks() -> Iterator[None]:
    """Within it every model runs as Transformers' modules: the reference for tests and benchmarks."""
    token = _switched_on.set(False)
    try:
        yield
    finally:
        _switched_on.reset(token)


def blocks_hidden(model: Any, ids: Tensor, boundaries: list[int], rows: Tensor | None) -> Tensor | None:
    """Hidden states after the final norm, (T, hidden) or at `rows` (S, hidden); None where the model has no blocks.

    ids: (T,) int64; boundaries: N + 1 of them from 0 to T. With `rows` the last layer computes nothing for other tokens
    but the keys and values they are read by. What runs another way than fused is said once a model in the log.
    """
    if not _switched_on.get():
        return None
    body = model.base_model
    family, obstacle = family_of(body), choice.body_obstacle(body)
    if family is not None and obstacle is None:
        hidden = body.embed_tokens(ids)
        if choice.fits(hidden):
            hidden = _run_layers(model, [family.describe(layer) for layer in body.layers], hidden, boundaries, rows)
            return family.norm(body.norm)(hidden) if _is_plain(body.norm) else body.norm(hidden)
        obstacle = f"its activations are {hidden.dtype} on {hidden.device}"
    choice.say_once(model, f"layers run as Transformers' modules: {obstacle}.")
    return None


def _is_plain(norm: Any) -> bool:
    return norm.weight.dtype == torch.float32 and not choice.is_watched(norm)


def _run_layers(model: Any, layers: list[Layer], hidden: Tensor, boundaries: list[int], rows: Tensor | None) -> Tensor:
    tokens = Tokens.between(boundaries)
    rotary = model.base_model.rotary_emb
    tables = {kind: rotary_tables(rotary, hidden, tokens, kind) for kind in {layer.rotary for layer in layers}}
    obstacles = [choice.layer_obstacle(layer) for layer in layers]
    _say(model, layers, obstacles)
    with ExitStack() as stack:
        if any(obstacles):
            stack.enter_context(packed_layout(model, boundaries))
        for number, (layer, obstacle) in enumerate(zip(layers, obstacles, strict=True)):
            wanted = rows if number == len(layers) - 1 else None
            run = _own_layer if obstacle else _maybe_recomputed(layer)
            hidden = run(hidden, layer, tokens, tables[layer.rotary], wanted)
    return hidden


def _maybe_recomputed(layer: Layer) -> Any:
    if torch.is_grad_enabled() and choice.is_recomputed(layer.module):
        return partial(checkpoint, _two_halves, use_reentrant=False)
    return _two_halves


def _two_halves(hidden: Tensor, layer: Layer, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    attention = composed_attention if choice.half_obstacle(layer.attention) else fused_attention
    mlp = composed_mlp if choice.half_obstacle(layer.mlp) else fused_mlp
    return mlp(attention(hidden, layer.attention, tokens, tables, rows), layer.mlp)


def _own_layer(hidden: Tensor, layer: Layer, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    """Transformers' own module, inside `packed_layout`; its attention is told its window by the module itself."""
    positions, embeddings = tokens.positions[None], (tables[0][None], tables[1][None])
    output = layer.module(hidden[None], attention_mask=None, position_ids=positions, position_embeddings=embeddings)[0]
    return output if rows is None else output[rows]


def _say(model: Any, layers: list[Layer], obstacles: list[str | None]) -> None:
    """One line in the log for each reason, the first time it holds for this model."""
    for obstacle in {obstacle for obstacle in obstacles if obstacle}:
        choice.say_once(model, f"{obstacles.count(obstacle)} layers run as Transformers' modules: {obstacle}.")
    ours = [layer for layer, obstacle in zip(layers, obstacles, strict=True) if not obstacle]
    reasons = [choice.half_obstacle(half) for layer in ours for half in (layer.attention, layer.mlp)]
    for reason in {reason for reason in reasons if reason}:
        choice.say_once(model, f"{reasons.count(reason)} of {len(reasons)} half layers are composed of parts: {reason}.")
