"""Second moments of the gradients at what layers give: which outputs the loss feels, G = sum_t g_t g_t^T."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import look_at_gradients
from luthier.calibration.moments import Moments, MomentSum
from luthier.data.packing import Pack
from luthier.errors import NumericError, ShapeError, bulleted
from luthier.progress import Progress


def gradient_moments(
    model: PreTrainedModel, packs: Sequence[Pack], names: Sequence[str], *, progress: Progress | None = None
) -> dict[str, Moments]:
    """For each layer the moments of g_t, the gradient of the pack's summed loss at the layer's output, in one pass.

    `second` is G, (out_features, out_features) float64: the output metric of `lowrank.projected`. Each layer has its own.
    Memory: 8 out_features^2 bytes a layer. The model is as it was afterwards. Raises ConfigError for names that are no linear
    layers or the head, ShapeError without packs, NumericError naming layers whose gradients are not finite.
    Source: the output side of the Kronecker factors of the Fisher matrix, arXiv:1503.05671.
    """
    if not packs:
        raise ShapeError("gradients need calibration text; got no packs. Give more text.")
    sums: dict[str, MomentSum] = {}

    def see(name: str, _x: Tensor, gradient: Tensor) -> None:
        sums.setdefault(name, MomentSum(gradient.shape[1])).add(gradient)

    for number, pack in enumerate(packs):
        if progress is not None:
            progress("measuring the layers' gradients", number, len(packs))
        look_at_gradients(model, pack, names, see)
    found = {name: own.moments() for name, own in sums.items()}
    bad = [name for name, own in found.items() if not bool(own.second.isfinite().all())]
    if bad:
        raise NumericError(f"gradients must be finite; NaN or Inf at the output of:\n{bulleted(bad)}\nCheck the model.")
    return found
