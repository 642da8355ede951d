"""What each layer could become, and the rise of the loss to expect from it: the choices that a budget is spent on.

Everything is predicted on the model as it was, from one walk through it. For an error E of a layer with the metric H:

    rounded         g tr(E H E^T), E at nearest codes; g: what rounding in the metric makes of that, measured in one layer
    repaired        g sum of what rank r drops of E's decomposition
    low rank        what rank r drops of W's decomposition
    factors in NF4  besides, 2 e of what the factors keep, e: the relative squared error of NF4 in this layer
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.calibration.sensitivity import energy
from luthier.compression.settings import Bits
from luthier.compression.specs import Spec, spec_bytes, whole
from luthier.compression.walk import Group, Seen
from luthier.errors import NumericError
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.lowrank import Choice, projected, round_gguf, round_nf4
from luthier.matrices import stored

REPAIR_RANKS = (8, 16, 32, 64, 96, 128)
RANK_STEP = 16
MOST_OPTIONS = 64
IN_METRIC = ("nf4", "q4_0", "q4_k")


@dataclass(frozen=True)
class Option:
    """One way to store a layer. loss: the expected rise of the mean loss, in nats."""

    spec: Spec
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class LayerFacts:
    """One layer on the model as it was. energies: sigma^2 of its decomposition in the metric, falling, in nats; errors: of each
    kind at nearest codes; repaired: what is left of NF4's error at each rank."""

    name: str
    shape: tuple[int, int]
    energies: Tensor
    errors: dict[str, float]
    repaired: dict[int, float]

    def dropped(self, rank: int) -> float:
        return float(self.energies[rank:].sum())

    @property
    def nf4_error(self) -> float:
        """The relative squared error of NF4."""
        total = self.dropped(0)
        return self.errors["nf4"] / total if total > 0 and "nf4" in self.errors else 0.0


@dataclass
class Prober:
    """Visits a walk and collects facts. sixteen: the kind of 16-bit storage; gain_layers: where rounding in the metric is
    measured against nearest codes; steps: ranks that are tried, every so many."""

    model: PreTrainedModel
    bits: Bits
    sixteen: str
    gain_layers: frozenset[str]
    facts: list[LayerFacts] = field(default_factory=list)
    gains: dict[tuple[str, str], float] = field(default_factory=dict)

    def visit(self, seen: list[Seen]) -> None:
        layers = linear_layers(self.model, [one.name for one in seen])
        self.facts += [self._layer(layers[one.name].matrix.dequantize(), one) for one in seen]

    def _layer(self, W: Tensor, seen: Seen) -> LayerFacts:
        metric = seen.metric.to(torch.float32)
        errors: dict[str, float] = {}
        repaired: dict[int, float] = {}
        for kind in rounded_kinds(W.shape[1], self.bits):
            left = W - stored(W, kind).dequantize()
            errors[kind] = energy(left, metric)
            if seen.name in self.gain_layers and kind in IN_METRIC:
                in_metric = round_nf4(W, seen.metric) if kind == "nf4" else round_gguf(W, seen.metric, kind)
                gain = ratio(energy(W - in_metric.dequantize(), metric), errors[kind])
                self.gains[seen.name.rpartition(".")[2], kind] = gain
            if kind == "nf4":
                found = projected(left, seen.metric)
                repaired = {r: found.dropped(r) for r in REPAIR_RANKS if r < found.max_rank / 2}
        energies = projected(W, seen.metric).energies
        if not math.isfinite(float(energies.sum())):
            raise NumericError(f"what goes into a layer must be finite; NaN or Inf in {seen.name}. Check the model.")
        return LayerFacts(seen.name, (W.shape[0], W.shape[1]), energies, errors, repaired)

    def gain(self, name: str, kind: str) -> float:
        """What rounding in the metric leaves of the error at nearest codes, as measured for layers of that name."""
        return self.gains.get((name.rpartition(".")[2], kind), 1.0)


def ratio(after: float, before: float) -> float:
    """after / before, 1 where there was nothing to lower."""
    return min(1.0, after / before) if before > 0 else 1.0


def rounded_kinds(columns: int, bits: Bits) -> list[str]:
    """The storages without factors, but 16 bits, that a row of so many weights can have."""
    if bits == "16":
        return []
    kinds = ["nf4", "q4_0", "q4_k", *(["q8_0"] if bits == "auto" else [])]
    return [kind for kind in kinds if kind not in GGUF_BLOCKS or columns % GGUF_BLOCKS[kind][0] == 0]


def layer_options(facts: LayerFacts, prober: Prober) -> list[Option]:
    """The choices of a layer that no other beats in both size and loss, in rising size."""
    specs = [] if prober.bits == "4" else [whole(prober.sixteen)]
    specs += [whole(kind) for kind in facts.errors]
    specs += [Spec("repair", "nf4", rank, factors) for rank in facts.repaired for factors in factor_kinds(prober)]
    found = [option_of(facts, spec, prober) for spec in specs]
    return thinned(pruned([*found, *low_rank_options(facts, prober)]), MOST_OPTIONS)


def low_rank_options(facts: LayerFacts, prober: Prober) -> list[Option]:
    """The layer in the pivoted form, at every RANK_STEP ranks that take fewer numbers than the layer has."""
    return [
        option_of(facts, Spec("low-rank", "", rank, factors), prober)
        for rank in range(RANK_STEP, min(facts.shape), RANK_STEP)
        for factors in factor_kinds(prober)
    ]


def option_of(facts: LayerFacts, spec: Spec, prober: Prober) -> Option:
    """A layer stored as `spec` says, with what that is expected to cost."""
    gain = prober.gain(facts.name, "nf4")
    loss = 0.0
    if spec.form == "low-rank":
        loss = facts.dropped(spec.rank)
        kept = (facts.dropped(0) - loss) if spec.factors == "nf4" else 0.0
        loss += 2 * gain * facts.nf4_error * kept
    elif spec.form == "repair":
        left = facts.repaired[spec.rank]
        kept = (facts.errors["nf4"] - left) if spec.factors == "nf4" else 0.0
        loss = gain * (left + 2 * facts.nf4_error * kept)
    elif spec.kind in facts.errors:
        loss = prober.gain(facts.name, spec.kind) * facts.errors[spec.kind]
    return Option(spec, spec_bytes(spec, facts.shape), max(0.0, loss))


def factor_kinds(prober: Prober) -> list[str]:
    return {"16": [prober.sixteen], "4": ["nf4"], "auto": [prober.sixteen, "nf4"]}[prober.bits]


def pruned(options: Iterable[Option]) -> list[Option]:
    """Those that none other beats: in rising size, each with less loss than all smaller ones."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.size_bytes, one.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def thinned(options: list[Option], most: int) -> list[Option]:
    if len(options) <= most:
        return options
    return [options[round(number * (len(options) - 1) / (most - 1))] for number in range(most)]


def choices_of(options: Mapping[str, Sequence[Option]]) -> dict[str, list[Choice]]:
    """As the allocation takes them."""
    return {
        name: [Choice(one.spec.label, one.size_bytes, one.loss, one.spec.rank or None) for one in own]
        for name, own in options.items()
    }


def gain_names(groups: Sequence[Group]) -> frozenset[str]:
    """The layers in which rounding in the metric is measured: those of the middle of the model, one of each name."""
    middle = groups[len(groups) // 2 :]
    found: dict[str, str] = {}
    for group in middle:
        for name in group.names:
            found.setdefault(name.rpartition(".")[2], name)
    return frozenset(found.values())
