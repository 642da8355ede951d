"""A model's body over packed texts, its decoder layers as two fused halves each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.models.blocks import choice
from luthier.models.blocks.composed import composed_attention, composed_mlp
from luthier.models.blocks.description import Layer
from luthier.models.blocks.families import family_of
from luthier.models.blocks.fused_attention import fused_attention
from luthier.models.blocks.fused_mlp import fused_mlp
from luthier.models.blocks.tokens import Entry, Tables, Tokens, is_static, rotary_tables
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


def are_switched_on() -> bool:
    """False inside `without_blocks`."""
    return _switched_on.get()


def blocks_hidden(model: Any, ids: Tensor, tokens: Tokens, rows: Tensor | None, entry: Entry | None = None) -> Tensor | None:
    """Hidden states after the final norm, (T, hidden) or at `rows` (S, hidden); None where the model has no blocks.

    ids: (T,) int64; tokens: the texts that they make up. With `rows`, which differ, the last layer computes nothing for
    other tokens but the keys and values they are read by. With `entry` the layers below it are not run.
    What runs another way than fused is said once a model in the log.
    """
    if not are_switched_on():
        return None
    if rows is not None and bool((rows.diff() < 0).any()):
        rising, places = rows.sort()
        hidden = blocks_hidden(model, ids, tokens, rising, entry)
        return None if hidden is None else hidden.index_select(0, places.argsort())
    body = model.base_model
    family, obstacle = family_of(body), choice.body_obstacle(body)
    if family is not None and obstacle is None:
        first, hidden = (0, body.embed_tokens(ids)) if entry is None else (entry.layer, entry.hidden)
        if choice.fits(hidden):
            layers = [family.describe(layer) for layer in body.layers[first:]]
            hidden = _run_layers(model, layers, hidden, tokens, rows)
            if rows is not None and not layers:
                hidden = hidden[rows]
            return family.norm(body.norm)(hidden) if _is_plain(body.norm) else body.norm(hidden)
        obstacle = f"its activations are {hidden.dtype} on {hidden.device}"
    choice.say_once(model, f"layers run as Transformers' modules: {obstacle}.")
    return None


@torch.no_grad()
def blocks_inputs(model: Any, ids: Tensor, tokens: Tokens, layer: int) -> Tensor:
    """What goes into decoder layer `layer`, (T, hidden) float32, for a model whose `blocks_obstacle` is None."""
    body = model.base_model
    family = family_of(body)
    assert family is not None
    below = [family.describe(module) for module in body.layers[:layer]]
    return _run_layers(model, below, body.embed_tokens(ids), tokens, None)


@torch.no_grad()
def blocks_range(model: Any, hidden: Tensor, tokens: Tokens, first: int, last: int) -> Tensor:
    """Decoder layers first ... last - 1, (T, hidden) float32 in and out, for a model whose `blocks_obstacle` is None."""
    body = model.base_model
    family = family_of(body)
    assert family is not None
    return _run_layers(model, [family.describe(module) for module in body.layers[first:last]], hidden, tokens, None)


@torch.no_grad()
def blocks_obstacle(model: Any) -> str | None:
    """Why the model runs as Transformers' modules altogether, or None."""
    if not are_switched_on():
        return "blocks are switched off"
    body = model.base_model
    if (obstacle := choice.body_obstacle(body)) is not None:
        return obstacle
    hidden = body.embed_tokens(torch.zeros(1, dtype=torch.int64, device=model.device))
    return None if choice.fits(hidden) else f"its activations are {hidden.dtype} on {hidden.device}"


def forward_obstacle(body: Any) -> str | None:
    """Why not every layer of the body runs as halves that compute what Transformers' forward computes, or None."""
    obstacle = blocks_obstacle(body)
    if obstacle is not None:
        return obstacle
    layers = _described(body)
    obstacles = [obstacle for layer in layers if (obstacle := choice.layer_obstacle(layer)) is not None]
    if obstacles:
        return obstacles[0]
    return None if _is_static(body, layers) else "its rotary frequencies depend on the length of the batch"


def blocks_share(model: Any) -> bool:
    """Whether every layer runs as halves whose tokens may go on from a segment that several texts share.

    Not where dropout draws a mask for each token of each text: shared tokens would have one mask for all.
    """
    body = model.base_model
    if blocks_obstacle(model) is not None:
        return False
    layers = _described(body)
    if any(choice.layer_obstacle(layer) for layer in layers):
        return False
    reason = None
    if not _is_static(body, layers):
        reason = "rotary frequencies depend on the length of a text"
    elif any(choice.draws_masks(layer) for layer in layers):
        reason = "dropout draws a mask for each of them"
    if reason is not None:
        choice.say_once(model, f"tokens that rows begin with in common are computed for each row: {reason}.")
    return reason is None


def _described(body: Any) -> list[Layer]:
    family = family_of(body)
    assert family is not None
    return [family.describe(layer) for layer in body.layers]


def _is_static(body: Any, layers: list[Layer]) -> bool:
    return all(is_static(body.rotary_emb, kind) for kind in {layer.rotary for layer in layers})


def _is_plain(norm: Any) -> bool:
    return norm.weight.dtype == torch.float32 and not choice.is_watched(norm)


def _run_layers(model: Any, layers: list[Layer], hidden: Tensor, tokens: Tokens, rows: Tensor | None) -> Tensor:
    rotary = model.base_model.rotary_emb
    tables = {kind: rotary_tables(rotary, hidden, tokens, kind) for kind in {layer.rotary for layer in layers}}
    ways = [_way_of(layer) for layer in layers]
    _say(model, ways)
    with ExitStack() as stack:
        if any(way.obstacle for way in ways):
            stack.enter_context(packed_layout(model, tokens.starts.tolist()))
        for number, way in enumerate(ways):
            wanted = rows if number == len(layers) - 1 else None
            run = _own_layer if way.obstacle else _maybe_recomputed(way.layer)
            hidden = run(hidden, way, tokens, tables[way.layer.rotary], wanted)
    return hidden


@dataclass(frozen=True)
class _Way:
    """How a layer is computed: obstacle, to its being ours; and to its halves being one operation each."""

    layer: Layer
    obstacle: str | None
    attention_obstacle: str | None = None
    mlp_obstacle: str | None = None


def _way_of(layer: Layer) -> _Way:
    obstacle = choice.layer_obstacle(layer)
    if obstacle is not None:
        return _Way(layer, obstacle)
    return _Way(layer, None, choice.half_obstacle(layer.attention), choice.half_obstacle(layer.mlp))


def _maybe_recomputed(layer: Layer) -> Any:
    again = choice.recomputing(layer.module) if torch.is_grad_enabled() else None
    return _two_halves if again is None else partial(again, _two_halves)


def _two_halves(hidden: Tensor, way: _Way, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    attention = composed_attention if way.attention_obstacle else fused_attention
    mlp = composed_mlp if way.mlp_obstacle else fused_mlp
    return mlp(attention(hidden, way.layer.attention, tokens, tables, rows), way.layer.mlp)


def _own_layer(hidden: Tensor, way: _Way, tokens: Tokens, tables: Tables, rows: Tensor | None) -> Tensor:
    """Transformers' own module, inside `packed_layout`; its attention is told its window by the module itself."""
    positions, embeddings = tokens.positions[None], (tables[0][None], tables[1][None])
    output = way.layer.module(hidden[None], attention_mask=None, position_ids=positions, position_embeddings=embeddings)[0]
    return output if rows is None else output[rows]


def _say(model: Any, ways: list[_Way]) -> None:
    """One line in the log for each reason, the first time it holds for this model."""
    obstacles = [way.obstacle for way in ways]
    for obstacle in {obstacle for obstacle in obstacles if obstacle}:
        choice.say_once(model, f"{obstacles.count(obstacle)} layers run as Transformers' modules: {obstacle}.")
    reasons = [reason for way in ways if not way.obstacle for reason in (way.attention_obstacle, way.mlp_obstacle)]
    for reason in {reason for reason in reasons if reason}:
        choice.say_once(model, f"{reasons.count(reason)} of {len(reasons)} half layers are composed of parts: {reason}.")
