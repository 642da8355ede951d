"""Where an adapter's terms start from, other than A random and B = 0."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from luthier.adapters.spec import AdapterSpec
from luthier.adapters.targets import Layer
from luthier.errors import AdapterError, bulleted
from luthier.linear import LowRankEmbedding


@dataclass(frozen=True)
class Start:
    """Factors that terms begin with, and whether what they add is taken off again.

    factors: by the name of a linear layer, A0 (r, in_features) and B0 (out_features, r), float32.
    taken_off: the layer computes x (W + s B A - s B0 A0)^T: it begins as it was, and W, which is never changed, is the base
    that the adapter stands on, with terms of rank 2r. Otherwise it begins as W + s B0 A0, and the adapter has rank r.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    taken_off: bool = False

    def check(self, spec: AdapterSpec, layers: Mapping[str, Layer]) -> None:
        """Raise AdapterError naming every layer whose factors do not fit, or that the adapter does not go to.

        layers: the adapter's targets. A magnitude with `taken_off` is refused: its norm is that of W + s B A alone.
        """
        if self.taken_off and spec.has_magnitude:
            raise AdapterError("terms whose start is taken off again have no magnitude. Use variant lora or rslora.")
        problems = []
        for name, (A, B) in self.factors.items():
            layer = layers.get(name)
            if layer is None or isinstance(layer, LowRankEmbedding):
                problems.append(f"{name} is no linear layer that the adapter goes to")
                continue
            (rows, columns), rank = layer.matrix.shape, spec.rank_of(name)
            if tuple(A.shape) != (rank, columns) or tuple(B.shape) != (rows, rank):
                problems.append(
                    f"{name}: A must be {(rank, columns)} and B {(rows, rank)}; they are {tuple(A.shape)} and {tuple(B.shape)}"
                )
        if problems:
            raise AdapterError(f"the factors to start from must fit the adapter:\n{bulleted(problems)}")

    def sha256(self) -> str:
        """Of all names, shapes and numbers."""
        digest = hashlib.sha256(f"{self.taken_off}".encode())
        for name, pair in sorted(self.factors.items()):
            for tensor in pair:
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()
