"""Qwen2: Llama's layer with biases on q, k and v, and a sliding window in some layers."""

from __future__ import annotations

from typing import Any

from luthier.models.blocks import llama
from luthier.models.blocks.description import Layer


def describe(layer: Any) -> Layer:
    return llama.describe(layer, layer.self_attn.sliding_window)
