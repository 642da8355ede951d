"""Which families have blocks, and where the differences between them are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.models.blocks import gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3
from luthier.models.blocks.description import Layer, Norm, gemma_norm, plain_norm


@dataclass(frozen=True)
class Family:
    """describe: a decoder layer in our words; norm: the norm after the last layer."""

    describe: Callable[[Any], Layer]
    norm: Callable[[Any], Norm]


# By the body's class in Transformers.
FAMILIES = {
    "LlamaModel": Family(llama.describe, plain_norm),
    "MistralModel": Family(mistral.describe, plain_norm),
    "Qwen2Model": Family(qwen2.describe, plain_norm),
    "Qwen3Model": Family(qwen3.describe, plain_norm),
    "Gemma2Model": Family(gemma2.describe, gemma_norm),
    "Gemma3TextModel": Family(gemma3.describe, gemma_norm),
    "Phi3Model": Family(phi3.describe, plain_norm),
}


def family_of(body: Any) -> Family | None:
    """The family of a model without its head, or None. A class derived from Transformers' own is not taken for it."""
    kind = type(body)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
