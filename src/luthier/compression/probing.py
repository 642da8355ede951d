"""How far predictions can be believed: some layers are stored otherwise for a moment, and the loss is measured.

    factor = measured rise of the mean loss / predicted rise

by which predictions of one family of storages are multiplied. Errors of low rank are no noise, and errors of many layers meet:
both make the loss rise by more than the sum of tr(E H E^T), and by other factors for what is cut off than for what is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from luthier.calibration.sensitivity import mean_loss, replaced
from luthier.compression.specs import rank_at
from luthier.compression.walk import Group
from luthier.data.packing import Pack
from luthier.lowrank import Decomposition
from luthier.matrices import FactoredMatrix, Matrix, stored

Family = Literal["low rank", "rounded"]
EACH = 4  # layers of one name that are tried, evenly spread over the model's depth
SHARE = 0.8  # of a matrix's numbers that low rank keeps in them
# Kept-out text of a few thousand tokens tells rises of a few thousandths: what is measured may be off, or below zero.
LEAST_FACTOR, MOST_FACTOR = 0.5, 10.0


@dataclass(frozen=True)
class Probe:
    """Layers that were stored otherwise together. predicted, measured: rises of the mean loss, in nats."""

    layers: int
    predicted: float
    measured: float

    @property
    def factor(self) -> float:
        """measured / predicted, within LEAST_FACTOR and MOST_FACTOR; 1 where nothing was predicted."""
        if not self.predicted > 0:
            return 1.0
        return min(MOST_FACTOR, max(LEAST_FACTOR, self.measured / self.predicted))


@dataclass
class Trial:
    """Matrices that wait to be tried, and the rise that is predicted for all of them together."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    predicted: float = 0.0

    def add(self, name: str, matrix: Matrix, predicted: float) -> None:
        self.matrices[name] = matrix
        self.predicted += predicted


def probed_names(groups: Sequence[Group]) -> frozenset[str]:
    """EACH layers of every name, or all where there are no more: those in the middles of as many equal parts of the model."""
    by_leaf: dict[str, list[str]] = {}
    for group in groups:
        for name in group.names:
            by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    chosen: set[str] = set()
    for names in by_leaf.values():
        parts = min(EACH, len(names))
        chosen |= {names[(2 * part + 1) * len(names) // (2 * parts)] for part in range(parts)}
    return frozenset(chosen)


def truncated(found: Decomposition, shape: tuple[int, int]) -> tuple[FactoredMatrix, float]:
    """The layer at the rank whose pivoted form has SHARE of its numbers, in bfloat16, and what that is predicted to cost."""
    rank = max(1, int(rank_at(shape, SHARE)))
    A, B = found.factors(rank)
    return FactoredMatrix(stored(B, "bf16"), stored(A, "bf16")), found.dropped(rank)


def measure_factors(model: PreTrainedModel, packs: Sequence[Pack], trials: dict[Family, Trial]) -> dict[Family, Probe]:
    """Each trial's layers on the model for one pass over `packs`, which takes one pass more for the model as it is. Trials
    without layers are left out.

    The trials are emptied: their matrices are of no further use.
    """
    before = mean_loss(model, packs)
    probes: dict[Family, Probe] = {}
    for family, trial in trials.items():
        if not trial.matrices:
            continue
        with replaced(model, trial.matrices):
            measured = mean_loss(model, packs) - before
        probes[family] = Probe(len(trial.matrices), trial.predicted, measured)
        trial.matrices.clear()
    return probes
