"""How much the loss rises for an error in a layer: as gradients tell it, and as it is measured with the layer replaced.

For y_t = W x_t and g_t the gradient of the summed loss at y_t, an error E of W changes the mean over S supervised tokens of
the loss, to second order, without cross terms between tokens and with g_t taken as equally likely in every direction, by

    sum_t (g_t . E x_t)^2 / (2 S)  ~  tr(E H E^T),    H = sum_t |g_t|^2 x_t x_t^T / (2 S out_features)

In this metric everything is in nats: what a rank drops, what rounding leaves, what an allocation spends. A layer's relative
error is t^2 = tr(E H E^T) / tr(W H W^T), so tr(W H W^T) is the rise for each unit of t^2.
Sources: the empirical Fisher matrix in place of the Hessian, as in Optimal Brain Surgeon and K-FAC (arXiv:1503.05671); loss
quadratic in the layers' relative errors, arXiv:2411.17525 (HIGGS, the linearity theorem).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.data.packing import Pack
from luthier.errors import ShapeError
from luthier.evaluation.loss import supervised_loss
from luthier.matrices import Matrix
from luthier.models.modes import evaluation_mode


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
