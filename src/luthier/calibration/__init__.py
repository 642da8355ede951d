"""Calibration: a loaded model run over rows, to learn what goes into its linear layers and how its loss feels their errors."""

from luthier.calibration.inputs import shared_inputs
from luthier.calibration.moments import Moments, collect_moments, moments_bytes, moments_in_passes
from luthier.calibration.rows import row_packs, text_packs
from luthier.calibration.sensitivity import Sensitivity, energy, loss_metric, mean_loss, measure_sensitivity, replaced

__all__ = [
    "Moments", "Sensitivity", "collect_moments", "energy", "loss_metric", "mean_loss", "measure_sensitivity", "moments_bytes",
    "moments_in_passes", "replaced", "row_packs", "shared_inputs", "text_packs",
]  # fmt: skip
