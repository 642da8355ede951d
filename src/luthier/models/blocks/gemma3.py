"""Gemma 3: Gemma 2's layer with norms on q and k instead of capped scores; windowed layers turn by another base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.models.blocks import gemma2
from luthier.models.blocks.description import Layer, gemma_norm


def describe(layer: Any) -> Layer:
    own = layer.self_attn
    described = gemma2.describe(layer)
    attention = replace(
        described.attention,
        softcap=None,
        query_norm=gemma_norm(own.q_norm),
        key_norm=gemma_norm(own.k_norm),
    )
    return replace(described, attention=attention, rotary=own.layer_type)
