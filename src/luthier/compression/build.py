"""Makes the matrices that were chosen, group by group, each for the inputs that the layers before it give by then."""

from __future__ import annotations

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
from luthier.lowrank import Factors, projected, rebalanced, refit_left, round_gguf, round_nf4, stacked
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

    def visit(seen: Seen) -> None:
        matrices = group_matrices(model, seen, [plan[name] for name in seen.group.names], in_metric)
        for name, layer in linear_layers(model, list(seen.group.names)).items():
            layer.matrix = matrices[name]

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


def group_matrices(model: PreTrainedModel, seen: Seen, specs: Sequence[Spec], in_metric: bool) -> dict[str, Matrix]:
    """The new matrix of each layer of a group."""
    layers = linear_layers(model, list(seen.group.names))
    if all(spec.form == "low-rank" for spec in specs):
        weights = {name: layer.matrix.dequantize() for name, layer in layers.items()}
        return dict(_joint(weights, seen, specs[0], in_metric))
    return {
        name: _one(layer.matrix, seen.metric, spec, in_metric)
        for (name, layer), spec in zip(layers.items(), specs, strict=True)
    }


def _one(matrix: Matrix, metric: Tensor, spec: Spec, in_metric: bool) -> Matrix:
    if spec.form == "whole" and matrix.kind == spec.kind:
        return matrix
    W = matrix.dequantize()
    base = rounded(W, metric, spec.kind, in_metric)
    if spec.form == "whole":
        return base
    left = W - base.dequantize()
    factors = projected(left, metric).factors(spec.rank)
    A = rounded(rebalanced(factors).A, metric, spec.factors, in_metric)
    return FactoredMatrix(_left(left, A, rebalanced(factors), metric, spec.factors, in_metric), A, base=base)


def _joint(weights: Mapping[str, Tensor], seen: Seen, spec: Spec, in_metric: bool) -> Mapping[str, FactoredMatrix]:
    """One decomposition of the stacked layers, each weighed by its share of what the loss feels; a left factor each."""
    shares = [max(seen.group.shares[name], 1e-12) ** 0.5 for name in weights]
    together = stacked([W * share for W, share in zip(weights.values(), shares, strict=True)])
    factors = rebalanced(projected(together, seen.metric).factors(spec.rank))
    right = rounded(factors.A, seen.metric, spec.factors, in_metric)
    found, row = {}, 0
    for (name, W), share in zip(weights.items(), shares, strict=True):
        own = Factors(factors.A, factors.B[row : row + len(W)] / share)
        row += len(W)
        found[name] = FactoredMatrix(_left(W, right, own, seen.metric, spec.factors, in_metric), right)
    return found


def _left(W: Tensor, right: StoredMatrix, factors: Factors, metric: Tensor, kind: str, in_metric: bool) -> StoredMatrix:
    """The left factor for the right one as it is stored: fitted anew where its rows are told apart by the inputs."""
    A = right.dequantize()
    seen = metric + DAMPING * float(metric.diagonal().mean()) * torch.eye(len(metric), dtype=metric.dtype)
    try:
        B = refit_left(W, A, seen)
    except NumericError:  # rows of A that no input tells apart: the fit has no single answer, the product as it was has
        B = factors.B
    wide = A.to(torch.float64)
    return rounded(B, wide @ seen @ wide.T, kind, in_metric)


def rounded(W: Tensor, metric: Tensor, kind: str, in_metric: bool) -> StoredMatrix:
    """W stored as `kind`; in the metric where that kind can be rounded so."""
    if kind in DENSE_DTYPES or kind == "q8_0" or not in_metric or not bool((metric.diagonal() > 0).any()):
        return stored(W, kind)
    matrix = round_nf4(W, metric) if kind == "nf4" else round_gguf(W, metric, kind)
    return matrix
