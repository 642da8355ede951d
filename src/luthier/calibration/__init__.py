"""Calibration: a loaded model run over rows, to learn what goes into its linear layers and how its loss feels their errors."""

from luthier.calibration.inputs import shared_inputs
from luthier.calibration.moments import Moments, collect_moments, moments_in_passes
from luthier.calibration.rows import row_packs, text_packs
from luthier.calibration.sensitivity import energy, mean_loss, replaced

__all__ = [
    "Moments", "collect_moments", "energy", "mean_loss", "moments_in_passes", "replaced", "row_packs", "shared_inputs",
    "text_packs",
]  # fmt: skip
