"""Calibration: a loaded model run over rows, to learn what goes into its linear layers."""

from luthier.calibration.inputs import shared_inputs
from luthier.calibration.moments import Moments, collect_moments, moments_bytes, moments_in_passes
from luthier.calibration.rows import row_packs, text_packs

__all__ = [
    "Moments", "collect_moments", "moments_bytes", "moments_in_passes", "row_packs", "shared_inputs", "text_packs",
]  # fmt: skip
