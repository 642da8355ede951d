"""Mistral: Llama's layer, all layers with one sliding window."""

from __future__ import annotations

from typing import Any

from luthier.models.blocks import llama
from luthier.models.blocks.description import Layer


def describe(layer: Any) -> Layer:
    return llama.describe(layer, getattr(layer.self_attn.config, "sliding_window", None))
