"""What healing trains: factors, norms and biases, the model computing all the time with what will be stored.

    used = rounded(latent)        latent <- latent - step(d loss / d used)

so that nothing of what was learnt is lost when training ends (the straight-through estimator, arXiv:1308.3432). A factor
beside a frozen base, and any factor in 4 or 8 bits, is trained whole. The factors of a matrix that has nothing else hold
nearly as many numbers as the matrix had; in 16 or 32 bits each of them gets an update of low rank, F + B A (arXiv:2106.09685),
and is rounded with it once, at the end. Kinds, ranks, pivots and bytes stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.targets import low_rank_layers
from luthier.kernels import Term
from luthier.kernels.storage import DENSE_DTYPES
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, FactoredMatrix, StoredMatrix, stored

UPDATE_RANK = 32
# Updates of low rank learn at so many times the rate of what is trained whole.
UPDATE_RATE = 10.0


@dataclass(eq=False)
class Trained:
    """used: what the model computes with and what gets the gradients; latent: what the optimiser moves, float32; kind: how
    it is stored; rate: times the learning rate. Where rounding changes nothing the two are one."""

    used: nn.Parameter
    latent: nn.Parameter
    kind: str
    rate: float

    @classmethod
    def of(cls, used: nn.Parameter, kind: str, rate: float = 1.0) -> Trained:
        used.requires_grad_(True)
        latent = used if kind == "f32" else nn.Parameter(used.detach().clone())
        one = cls(used, latent, kind, rate)
        one.place()
        return one

    def take_gradient(self) -> None:
        """Hand the gradient of what is used on to the latent."""
        if self.latent is not self.used:
            self.latent.grad, self.used.grad = self.used.grad, None

    @torch.no_grad()
    def place(self) -> None:
        """Let the model compute with the latent as it is stored."""
        if self.latent is self.used:
            return
        latent = self.latent.detach()
        dense = self.kind in DENSE_DTYPES
        self.used.copy_(latent.to(DENSE_DTYPES[self.kind]) if dense else stored(latent, self.kind).dequantize())


class UpdatedMatrix(nn.Module):
    """A frozen factor and its update, F + B A. A: (rank, in), drawn with variance 1 / in; B: (out, rank), 0 at first."""

    transposed = False

    def __init__(self, matrix: StoredMatrix, generator: torch.Generator):
        super().__init__()
        rows, columns = matrix.shape
        rank = min(UPDATE_RANK, rows, columns)
        self.matrix = matrix
        self.A = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def kind(self) -> str:
        return self.matrix.kind

    @property
    def weight(self) -> Tensor:
        return self.matrix.weight

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (F + B A)^T + bias."""
        return self.matrix.matmul(x, bias, Term(self.A, self.B, 1.0))

    @torch.no_grad()
    def merged(self) -> StoredMatrix:
        return stored(self.matrix.dequantize() + self.B @ self.A, self.kind)


Part = DenseMatrix | UpdatedMatrix


class Opened:
    """A model with its factors, norms and biases open to training, and nothing else; `close` stores what was learnt.

    trained: everything that an optimiser is to move. Two openings with one seed are the same. A right factor that layers share
    stays shared. Memory: the numbers that are trained in float32, twice where they are rounded.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0):
        model.requires_grad_(False)
        self.trained: list[Trained] = []
        self._before: list[tuple[LowRankLinear, FactoredMatrix]] = []
        self._parts: dict[int, Part] = {}
        self._generator = torch.Generator().manual_seed(seed)
        for layer in low_rank_layers(model).values():
            if isinstance(layer, LowRankLinear) and isinstance(layer.matrix, FactoredMatrix):
                self._open(layer, layer.matrix)
        self.trained += [Trained.of(vector, _narrowest_kind(vector)) for vector in vectors(model)]

    def close(self) -> None:
        """Put ordinary matrices back, of the same kinds as before."""
        latents = {one.used: one.latent.detach() for one in self.trained}
        closed: dict[int, StoredMatrix] = {}
        for layer, before in self._before:
            for factor in (before.left, before.right):
                if id(factor) not in closed:
                    closed[id(factor)] = _closed(self._parts[id(factor)], factor.kind, latents)
            left, right = closed[id(before.left)], closed[id(before.right)]
            layer.matrix = FactoredMatrix(left, right, base=before.base, places=before.places)
        for one in self.trained:
            one.used.requires_grad_(False)

    def _open(self, layer: LowRankLinear, matrix: FactoredMatrix) -> None:
        for factor in (matrix.left, matrix.right):
            if id(factor) not in self._parts:
                self._parts[id(factor)] = self._part(factor, large=matrix.base is None)
        self._before.append((layer, matrix))
        left: Any = self._parts[id(matrix.left)]
        right: Any = self._parts[id(matrix.right)]
        layer.matrix = FactoredMatrix(left, right, base=matrix.base, places=matrix.places)

    def _part(self, factor: StoredMatrix, *, large: bool) -> Part:
        if large and factor.kind in DENSE_DTYPES:
            updated = UpdatedMatrix(factor, self._generator)
            self.trained += [Trained.of(one, "f32", UPDATE_RATE) for one in (updated.A, updated.B)]
            return updated
        whole = factor.float32_copy()
        self.trained.append(Trained.of(whole.weight, factor.kind))
        return whole


def _closed(part: Part, kind: str, latents: dict[nn.Parameter, Tensor]) -> StoredMatrix:
    return part.merged() if isinstance(part, UpdatedMatrix) else stored(latents[part.weight], kind)


def vectors(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights and biases of norms and the biases of linear layers but the head's: what is stored plain in every format."""
    head = model.get_output_embeddings()
    frozen = [module for module in model.modules() if isinstance(module, StoredMatrix) or module is head]
    kept = {parameter for module in frozen for parameter in module.parameters()}
    return [one for one in model.parameters() if one.ndim == 1 and one.dtype == torch.float32 and one not in kept]


def _narrowest_kind(vector: Tensor) -> str:
    """The 16 bits that hold it as it is, in which it is written; f32 where neither does."""
    return next(
        (kind for kind in ("bf16", "f16") if torch.equal(vector.to(DENSE_DTYPES[kind]).to(vector.dtype), vector)), "f32"
    )
