"""Weights of a folder some of which are matrices, put together from several of its tensors, and the others plain."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from luthier.matrices import Matrix
from luthier.models.checkpoint import SafetensorsCheckpoint


class MixedCheckpoint:
    """A WeightSource over `plain` where `matrices`, by their weights' names, stand for the tensors called `parts`."""

    def __init__(self, plain: SafetensorsCheckpoint, matrices: Mapping[str, Matrix], parts: AbstractSet[str]):
        self._plain = plain
        self._matrices = matrices
        self._names = [*(name for name in plain.names() if name not in parts), *matrices]

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._matrices[name].shape if name in self._matrices else self._plain.shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        return torch.float32 if name in self._matrices else self._plain.dtype(name)

    def kind(self, name: str) -> str | None:
        return self._matrices[name].kind if name in self._matrices else None

    def matrix(self, name: str) -> Matrix:
        return self._matrices[name]

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        if name in self._matrices:
            return self._matrices[name].dequantize()
        return self._plain.tensor(name, mapped=mapped)
