"""Makes the matrices that were chosen, group by group, each for the inputs that the layers before it give by then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.compression.specs import Spec
from luthier.compression.walk import Group, Seen, walk
from luthier.data.packing import Pack
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.lowrank import damped, pivoted, projected, round_factors, round_gguf, round_nf4, round_pivoted
from luthier.matrices import Matrix, StoredMatrix, converted, stored
from luthier.progress import Progress
from luthier.training.allocator import trim_free_memory

# Of the inputs' mean square, given to every direction when a left factor is fitted: text of finite length leaves some empty.
DAMPING = 1e-4
IN_METRIC = ("nf4", "q4_0", "q4_k")


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

    def visit(seen: Iterator[Seen]) -> None:
        layers = linear_layers(model, None)
        for one in seen:
            layer = layers[one.name]
            layer.matrix = layer_matrix(layer.matrix, one.metric, plan[one.name], in_metric)

    walk(model, packs, groups, visit, changes=True, progress=progress, stage="compressing")


def replace_table(model: PreTrainedModel, name: str, kind: str) -> None:
    """Store the embedding or head called `name` as `kind`, and whatever shares its matrix with it."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear | LowRankEmbedding)
    if layer.matrix.kind == kind:
        return
    before, after = layer.matrix, converted(layer.matrix, kind)
    for module in model.modules():
        if isinstance(module, LowRankLinear | LowRankEmbedding) and module.matrix is before:
            module.matrix = after


def layer_matrix(matrix: Matrix, metric: Tensor, spec: Spec, in_metric: bool = True) -> Matrix:
    """The new matrix of a layer for the metric of its inputs."""
    if spec.form == "whole":
        return matrix if matrix.kind == spec.kind else rounded(matrix.dequantize(), metric, spec.kind, in_metric)
    W = matrix.dequantize()

    def rounder(weight: Tensor, moments: Tensor) -> StoredMatrix:
        return rounded(weight, moments, spec.factors, in_metric)

    if spec.form == "low-rank":
        return round_pivoted(W, damped(metric, DAMPING), pivoted(projected(W, metric).factors(spec.rank)), rounder)
    base = rounded(W, metric, spec.kind, in_metric)
    left = W - base.dequantize()
    return round_factors(left, damped(metric, DAMPING), projected(left, metric).factors(spec.rank), rounder, base=base)


def rounded(W: Tensor, metric: Tensor, kind: str, in_metric: bool) -> StoredMatrix:
    """W stored as `kind`; in the metric where that kind can be rounded so."""
    if kind not in IN_METRIC or not in_metric or not bool((metric.diagonal() > 0).any()):
        return stored(W, kind)
    trim_free_memory()  # rounding takes several times as much as what goes into it
    return round_nf4(W, metric) if kind == "nf4" else round_gguf(W, metric, kind)
