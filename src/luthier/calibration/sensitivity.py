"""How much the loss rises for an error in a layer: predicted from gradients, and corrected by what noise really does.

For y_t = W x_t and g_t the gradient of the summed loss at y_t, an error E of W changes the mean over S supervised tokens of
the loss, to second order, without cross terms between tokens and with g_t taken as equally likely in every direction, by

    sum_t (g_t . E x_t)^2 / (2 S)  ~  tr(E H E^T),    H = sum_t |g_t|^2 x_t x_t^T / (2 S out_features)

In this metric everything is in nats: what a rank drops, what rounding leaves, what an allocation spends. Its relative error
for a layer is t^2 = tr(E H E^T) / tr(W H W^T), so tr(W H W^T) is the rise for each unit of t^2.
Sources: the empirical Fisher matrix in place of the Hessian, as in Optimal Brain Surgeon and K-FAC (arXiv:1503.05671); loss
quadratic in the layers' relative errors, arXiv:2411.17525 (HIGGS, the linearity theorem).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.calibration.moments import Moments
from luthier.data.packing import Pack
from luthier.errors import NumericError, ShapeError
from luthier.evaluation.loss import supervised_loss
from luthier.matrices import DenseMatrix, Matrix
from luthier.models.modes import evaluation_mode
from luthier.progress import Progress

DEFAULT_RISE = 0.05
LEAST_FACTOR = 0.1


@dataclass(frozen=True)
class Sensitivity:
    """What noise of relative error `relative_error` in every layer of a group did to the mean loss, in nats.

    measured: the mean over the noise and its opposite, so that what is linear in it cancels; below 0 where the rise is
    smaller than what the text can show. predicted: the sum of tr(E H E^T).
    """

    layers: tuple[str, ...]
    relative_error: float
    predicted: float
    measured: float

    @property
    def factor(self) -> float:
        """measured / predicted, by what to multiply predictions for layers of this group; at least 0.1, for a rise that
        the text was too short to show does not make a layer free."""
        return max(LEAST_FACTOR, self.measured / self.predicted)


def loss_metric(moments: Moments, out_features: int, supervised_tokens: int) -> Tensor:
    """H of the module's formula, (in_features, in_features) float64, from moments weighted by |g_t|^2.

    supervised_tokens: S of all packs that the moments were taken over. Raises ShapeError for a count below 1.
    """
    if supervised_tokens < 1 or out_features < 1:
        raise ShapeError(f"a metric is per supervised token; got {supervised_tokens} tokens, {out_features} outputs.")
    return moments.second / (2.0 * supervised_tokens * out_features)


def energy(weight: Tensor, metric: Tensor) -> float:
    """tr(W H W^T), float64 sums of float32 products: the predicted rise of the loss for a relative error of 1."""
    W = weight.to(torch.float32)
    return float(((W @ metric.to(torch.float32)) * W).sum(dtype=torch.float64))


def mean_loss(model: PreTrainedModel, packs: Sequence[Pack]) -> float:
    """Mean over the packs' supervised tokens of -log p(target), in evaluation mode. Raises ShapeError without any."""
    supervised = sum(pack.supervised_tokens for pack in packs)
    if supervised == 0:
        raise ShapeError("a loss needs tokens to predict; got none. Give more text.")
    with evaluation_mode(model), torch.no_grad():
        return sum(supervised_loss(model, pack).item() for pack in packs) / supervised


def measure_sensitivity(
    model: PreTrainedModel,
    packs: Sequence[Pack],
    groups: Mapping[str, Sequence[str]],
    metrics: Mapping[str, Tensor],
    *,
    rise: float = DEFAULT_RISE,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Sensitivity]:
    """For each group of layers: add normal noise to their weights, all with one relative error, and see what the loss does.

    groups: names of linear layers, for example all value projections together; metrics: `loss_metric` of each. The noise
    is as large as is predicted to raise the mean loss by `rise` nats. Two passes a group and one more over `packs`, and float32
    copies of a group's matrices meanwhile; afterwards every layer has the matrix it had.
    Raises ConfigError for names that are no linear layers, NumericError where a group's metrics are zero, so that the loss
    cannot depend on it.
    """
    base = mean_loss(model, packs)
    found = {}
    for number, (group, names) in enumerate(groups.items()):
        if progress is not None:
            progress("measuring what the loss feels", number, len(groups))
        energies = {
            name: energy(layer.matrix.dequantize(), metrics[name]) for name, layer in linear_layers(model, names).items()
        }
        total = sum(energies.values())
        if not total > 0:
            raise NumericError(
                f"the loss must depend on the layers of a group; the metrics of {group!r} are zero. Leave it out."
            )
        measured = 0.0
        for sign in (1.0, -1.0):
            shares = {name: sign * (rise * own / total) ** 0.5 for name, own in energies.items()}
            with replaced(model, _noisy(model, shares, metrics, seed)):
                measured += (mean_loss(model, packs) - base) / 2
        found[group] = Sensitivity(tuple(names), (rise / total) ** 0.5, rise, measured)
    return found


@contextmanager
def replaced(model: PreTrainedModel, matrices: Mapping[str, Matrix]) -> Iterator[None]:
    """Within it the layers of these names have these matrices; afterwards, whatever happened, their own again.

    Raises ConfigError for names that are no linear layers.
    """
    layers = linear_layers(model, list(matrices))
    kept = {name: layer.matrix for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.matrix = matrices[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.matrix = kept[name]


def _noisy(model: PreTrainedModel, shares: Mapping[str, float], metrics: Mapping[str, Tensor], seed: int) -> dict[str, Matrix]:
    """Of each layer W + E, E normal with sqrt(tr(E H E^T)) = |share|, of the share's sign."""
    generator = torch.Generator().manual_seed(seed)
    noisy: dict[str, Matrix] = {}
    for name, layer in linear_layers(model, list(shares)).items():
        W = layer.matrix.dequantize()
        E = torch.randn(W.shape, generator=generator)
        size = energy(E, metrics[name]) ** 0.5
        noisy[name] = DenseMatrix(W + E * (shares[name] / size if size > 0 else 0.0))
    return noisy
