"""Gemma 2: norms of 1 + weight before and after each half, capped scores, windows in every other layer, GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.models.blocks.description import Layer, gemma_norm, separate_gate, separate_projections


def describe(layer: Any) -> Layer:
    attention = separate_projections(layer.self_attn, gemma_norm(layer.input_layernorm), layer.self_attn.sliding_window)
    mlp = separate_gate(layer.mlp, gemma_norm(layer.pre_feedforward_layernorm), layer.mlp.config.hidden_activation)
    return Layer(
        layer,
        replace(
            attention,
            softcap=layer.self_attn.attn_logit_softcapping,
            post_norm=gemma_norm(layer.post_attention_layernorm),
        ),
        replace(mlp, post_norm=gemma_norm(layer.post_feedforward_layernorm)),
    )
