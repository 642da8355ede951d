"""Makes the matrices that were chosen, group by group, each for the inputs that the layers before it give by then."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.compression.specs import Spec
from luthier.compression.walk import Group, Seen, walk
from luthier.data.packing import Pack
from luthier.errors import NumericError
from luthier.kernels.storage import DENSE_DTYPES
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.lowrank import Pivoted, pivoted, projected, rebalanced, refit_left, round_gguf, round_nf4
from luthier.matrices import FactoredMatrix, Matrix, stored
from luthier.matrices.factored import StoredMatrix
from luthier.progress import Progress

DAMPING = 1e-4


def build(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Sequence[Group],
    plan: Mapping[str, Spec],
    tables: Mapping[str, str],
    progress: Progress | None = None,
    *,
    in_metric: bool = True,
) -> None:
    """Replace the matrices of `model` as the plan says. tables: the kind of embedding and head, which go first.

    in_metric: rounding makes up for its errors in the metric of the inputs; False takes the nearest codes.
    """
    for name, kind in tables.items():
        replace_table(model, name, kind)

    def visit(seen: list[Seen]) -> None:
        layers = linear_layers(model, [one.name for one in seen])
        made = {one.name: layer_matrix(layers[one.name].matrix, one.metric, plan[one.name], in_metric) for one in seen}
        for name, matrix in made.items():
            layers[name].matrix = matrix

    walk(model, packs, groups, visit, changes=True, progress=progress, stage="compressing")


def replace_table(model: PreTrainedModel, name: str, kind: str) -> None:
    """Store the embedding or head called `name` as `kind`, and whatever shares its matrix with it."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear | LowRankEmbedding)
    if layer.matrix.kind == kind:
        return
    before, after = layer.matrix, stored(layer.matrix.dequantize(), kind)
    for module in model.modules():
        if isinstance(module, LowRankLinear | LowRankEmbedding) and module.matrix is before:
            module.matrix = after


def layer_matrix(matrix: Matrix, metric: Tensor, spec: Spec, in_metric: bool = True) -> Matrix:
    """The new matrix of a layer for the metric of its inputs."""
    if spec.form == "whole" and matrix.kind == spec.kind:
        return matrix
    W = matrix.dequantize()
    if spec.form == "low-rank":
        return _pivoted(W, metric, spec, in_metric)
    base = rounded(W, metric, spec.kind, in_metric)
    if spec.form == "whole":
        return base
    left = W - base.dequantize()
    factors = rebalanced(projected(left, metric).factors(spec.rank))
    A = rounded(factors.A, metric, spec.factors, in_metric)
    return FactoredMatrix(_fitted(left, A, factors.B, metric, spec.factors, in_metric), A, base=base)


def _pivoted(W: Tensor, metric: Tensor, spec: Spec, in_metric: bool) -> FactoredMatrix:
    """Rows of the best matrix of that rank, and the other rows fitted to those as they are stored."""
    parts = pivoted(projected(W, metric).factors(spec.rank))
    basis = rounded(parts.basis, metric, spec.factors, in_metric)
    left = _fitted(W[parts.others], basis, parts.coefficients, metric, spec.factors, in_metric)
    return FactoredMatrix(left, basis, places=places_of(parts))


def places_of(parts: Pivoted) -> Tensor:
    """Of each row of a pivoted matrix its place among the pivots, or behind them among the others; int32."""
    rank = len(parts.pivots)
    places = torch.empty(rank + len(parts.others), dtype=torch.int32)
    places[parts.pivots] = torch.arange(rank, dtype=torch.int32)
    places[parts.others] = torch.arange(rank, len(places), dtype=torch.int32)
    return places


def _fitted(W: Tensor, right: StoredMatrix, B: Tensor, metric: Tensor, kind: str, in_metric: bool) -> StoredMatrix:
    """The left factor for the right one as it is stored: fitted anew where its rows are told apart by the inputs, else B."""
    A = right.dequantize()
    seen = metric + DAMPING * float(metric.diagonal().mean()) * torch.eye(len(metric), dtype=metric.dtype)
    with contextlib.suppress(NumericError):  # rows of A that no input tells apart: the fit has no single answer, B is one
        B = refit_left(W, A, seen)
    wide = A.to(torch.float64)
    return rounded(B, wide @ seen @ wide.T, kind, in_metric)


def rounded(W: Tensor, metric: Tensor, kind: str, in_metric: bool) -> StoredMatrix:
    """W stored as `kind`; in the metric where that kind can be rounded so."""
    if kind in DENSE_DTYPES or kind == "q8_0" or not in_metric or not bool((metric.diagonal() > 0).any()):
        return stored(W, kind)
    matrix = round_nf4(W, metric) if kind == "nf4" else round_gguf(W, metric, kind)
    return matrix
