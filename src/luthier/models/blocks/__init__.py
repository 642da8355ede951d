"""Decoder layers of known families as two fused operations each, reading the parameters of the Transformers modules."""

from luthier.models.blocks.body import blocks_hidden, without_blocks

__all__ = ["blocks_hidden", "without_blocks"]
