"""Weights that can train: float32 copies of stored matrices, in place of them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from luthier.errors import AdapterError
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import DenseMatrix, Matrix, StoredMatrix


class Widener:
    """Gives modules float32 parameters of their own that require gradients. What was shared before is shared after."""

    def __init__(self) -> None:
        # The originals are kept so that no later object can take the id of one.
        self._matrices: dict[int, tuple[nn.Module, DenseMatrix]] = {}
        self._parameters: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def widen(self, root: nn.Module) -> None:
        """Replace every matrix and parameter under `root`. Raises AdapterError if a layer there carries a term."""
        for name, module in list(root.named_modules()):
            if isinstance(module, (LowRankLinear, LowRankEmbedding)):
                if len(module.terms):
                    listed = ", ".join(module.terms)
                    raise AdapterError(
                        f"a layer that trains whole must carry no term; {name or 'it'} has: {listed}. Detach first."
                    )
                module.matrix = self._matrix(module.matrix)
        for module in list(root.modules()):
            if isinstance(module, StoredMatrix):
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, self._parameter(parameter))
        root.requires_grad_(True)

    def _matrix(self, matrix: Matrix) -> DenseMatrix:
        if id(matrix) not in self._matrices:
            self._matrices[id(matrix)] = (matrix, matrix.float32_copy())
        return self._matrices[id(matrix)][1]

    def _parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._parameters:
            self._parameters[id(parameter)] = (parameter, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
        return self._parameters[id(parameter)][1]


def trained_copy(module: nn.Module, widener: Widener) -> nn.Module:
    """A copy of `module` with float32 parameters of its own; the stored weights are never copied in between."""
    kept: dict[int, nn.Module | nn.Parameter] = {id(parameter): parameter for parameter in module.parameters()}
    layers = [layer for layer in module.modules() if isinstance(layer, (LowRankLinear, LowRankEmbedding))]
    kept |= {id(layer.matrix): layer.matrix for layer in layers}
    copied = copy.deepcopy(module, kept)
    widener.widen(copied)
    return copied
