"""Phi-3: Llama's layer with q, k, v in one matrix and gate, up in one; only part of a head may turn."""

from __future__ import annotations

from typing import Any

from luthier.models.blocks.description import GATES, AttentionHalf, Layer, MlpHalf, plain_norm


def describe(layer: Any) -> Layer:
    own, config = layer.self_attn, layer.config
    attention = AttentionHalf(
        plain_norm(layer.input_layernorm),
        (own.qkv_proj,),
        own.o_proj,
        config.num_attention_heads,
        config.num_key_value_heads,
        own.head_dim,
        own.scaling,
        getattr(config, "sliding_window", None),
    )
    norm = plain_norm(layer.post_attention_layernorm)
    return Layer(layer, attention, MlpHalf(norm, (layer.mlp.gate_up_proj,), layer.mlp.down_proj, GATES.get(config.hidden_act)))
