"""Decoder layers of known families as two fused operations each, reading the parameters of the Transformers modules."""

from luthier.models.blocks.body import (
    blocks_hidden,
    blocks_inputs,
    blocks_obstacle,
    blocks_range,
    blocks_share,
    without_blocks,
)
from luthier.models.blocks.tokens import Entry, Tokens

__all__ = [
    "Entry",
    "Tokens",
    "blocks_hidden",
    "blocks_inputs",
    "blocks_obstacle",
    "blocks_range",
    "blocks_share",
    "without_blocks",
]
