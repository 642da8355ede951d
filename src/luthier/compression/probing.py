"""How far predictions can be believed: some layers are stored otherwise for a moment, and the loss is measured.

    factor = measured rise of the mean loss / predicted rise

by which predictions of one family of storages are multiplied. Errors of low rank are no noise, and errors of many layers meet:
both make the loss rise by more than the sum of tr(E H E^T), and by other factors for what is cut off than for what is rounded.
What is cut is cut in every layer, since errors of low rank add up the more, the more layers have them; rounding does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from luthier.calibration.sensitivity import mean_loss, replaced
from luthier.compression.specs import rank_at
from luthier.compression.walk import Group
from luthier.data.packing import Pack
from luthier.evaluation.loss import supervised_loss
from luthier.lowrank import Decomposition
from luthier.matrices import FactoredMatrix, Matrix, stored
from luthier.models.blocks import Entry
from luthier.models.modes import evaluation_mode
from luthier.models.packed import entry_obstacle, packed_inputs, packed_layers

Family = Literal["low rank", "rounded"]
EACH = 4  # layers of one name that are rounded, evenly spread over the model's depth: rounding in the metric takes time
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
    """Kept-out text on its way through a model some of whose layers are stored otherwise, while a walk visits them.

    At each decoder layer the text goes through what was added there, which is then let go: memory is one hidden state for every
    token of it. In families without blocks of their own matrices are kept, and text goes through them all at the end.
    """

    model: PreTrainedModel
    packs: Sequence[Pack]
    layers: int = 0
    predicted: float = 0.0

    def __post_init__(self) -> None:
        self._matrices: dict[str, Matrix] = {}
        self._depth, self._streams = 0, entry_obstacle(self.model) is None
        packs = self.packs if self._streams else []
        self._hidden = [packed_inputs(self.model, pack.ids, pack.starts, 0) for pack in packs]

    def add(self, name: str, matrix: Matrix, predicted: float) -> None:
        self._matrices[name] = matrix
        self.layers += 1
        self.predicted += predicted

    def advance(self) -> None:
        """What was added since are all layers of the next decoder layer."""
        if not self._streams:
            return
        with replaced(self.model, self._matrices), evaluation_mode(self.model):
            for hidden, pack in zip(self._hidden, self.packs, strict=True):
                hidden.copy_(packed_layers(self.model, hidden, pack.starts, self._depth, self._depth + 1))
        self._matrices, self._depth = {}, self._depth + 1

    def loss(self) -> float:
        """The mean loss at the end of the way."""
        if not self._streams:
            with replaced(self.model, self._matrices):
                return mean_loss(self.model, self.packs)
        with evaluation_mode(self.model), torch.no_grad():
            ways = zip(self.packs, self._hidden, strict=True)
            total = sum(supervised_loss(self.model, pack, Entry(self._depth, own)).item() for pack, own in ways)
        return total / sum(pack.supervised_tokens for pack in self.packs)


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


def measure_factors(model: PreTrainedModel, packs: Sequence[Pack], trials: Mapping[Family, Trial]) -> dict[Family, Probe]:
    """What each trial did to the mean loss over `packs`, after the walk; those without layers are left out."""
    before = mean_loss(model, packs)
    return {
        family: Probe(trial.layers, trial.predicted, trial.loss() - before) for family, trial in trials.items() if trial.layers
    }
