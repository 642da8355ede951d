"""Llama and its likes (SmolLM2 among them): the plain layer."""

from __future__ import annotations

from typing import Any

from luthier.models.blocks.description import Layer, plain_norm, separate_gate, separate_projections


def describe(layer: Any, window: int | None = None) -> Layer:
    """A pre-norm layer with grouped queries and a gated MLP. window: the sliding window of families that have one."""
    return Layer(
        layer,
        separate_projections(layer.self_attn, plain_norm(layer.input_layernorm), window),
        separate_gate(layer.mlp, plain_norm(layer.post_attention_layernorm), layer.mlp.config.hidden_act),
    )
