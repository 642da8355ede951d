"""Qwen3: Qwen2's layer without biases, and a norm over each head of q and k before they turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.models.blocks import llama
from luthier.models.blocks.description import Layer, plain_norm


def describe(layer: Any) -> Layer:
    own = layer.self_attn
    described = llama.describe(layer, own.sliding_window)
    attention = replace(described.attention, query_norm=plain_norm(own.q_norm), key_norm=plain_norm(own.k_norm))
    return replace(described, attention=attention)
