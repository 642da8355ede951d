"""The weights that a quantised model was made from, read again one matrix at a time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from luthier.config import NF4Options
from luthier.models.fill import Filler
from luthier.models.load import open_weights
from luthier.models.skeleton import build_skeleton
from luthier.models.stored import stored_as


class Originals:
    """The matrices of a model folder or GGUF file as they are there; only headers are read until one is asked for.

    Raises what `load` raises for files that are damaged or do not belong together.
    """

    def __init__(self, path: Path):
        config, self._weights = open_weights(path)
        self._filler = Filler(build_skeleton(config, str(path)), self._weights, "f32", str(path), NF4Options())

    def kind(self, layer: str) -> str:
        """How the weight of that linear layer is stored there: f32, bf16, f16, nf4, or a type of GGUF blocks."""
        return stored_as(self._weights, self._filler.source_name(f"{layer}.weight"))

    def weight(self, layer: str) -> Tensor:
        """W of that linear layer, (out_features, in_features) float32, a copy of its own."""
        return self._filler.make_matrix(f"{layer}.weight").dequantize()
