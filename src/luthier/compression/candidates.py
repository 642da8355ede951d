"""What each layer could become, and the rise of the loss to expect from it: the choices that a budget is spent on.

Everything is predicted on the model as it was, from one walk through it. For an error E of a layer with the metric H:

    rounded         f g tr(E H E^T), E at nearest codes; g: what rounding in the metric makes of that, measured in one layer
    repaired        f g sum of what rank r drops of E's decomposition
    low rank        d times what rank r drops of W's decomposition
    factors in NF4  besides, f g 2 e of what the factors keep, e: the relative squared error of NF4 in this layer

f, d: by what the loss rose more than predicted where some layers were rounded in the metric, or cut to a lower rank
(`probing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from luthier.calibration.inputs import linear_layers
from luthier.calibration.sensitivity import energy
from luthier.compression.build import IN_METRIC, rounded
from luthier.compression.probing import Family, Probe, Trial, measure_factors, probed_names, truncated
from luthier.compression.settings import Bits
from luthier.compression.specs import Spec, factor_kinds, rank_at, rounded_kinds, spec_bytes, whole, whole_kinds
from luthier.compression.walk import Group, Seen
from luthier.data.packing import Pack
from luthier.errors import NumericError
from luthier.lowrank import Choice, projected
from luthier.matrices import StoredMatrix, stored

REPAIR_RANKS = (8, 16, 32, 64, 96, 128)
RANK_STEP = 16
MOST_OPTIONS = 64


@dataclass(frozen=True)
class Option:
    """One way to store a layer. loss: the expected rise of the mean loss, in nats."""

    spec: Spec
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class LayerFacts:
    """One layer on the model as it was. energies: sigma^2 of its decomposition in the metric, falling, in nats; errors: of each
    kind that is allowed, and of NF4, at nearest codes; repaired: what is left of NF4's error at each rank."""

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
        return self.errors["nf4"] / total if total > 0 else 0.0


@dataclass
class Prober:
    """Visits a walk that changes nothing and collects facts. sixteen: the kind of 16-bit storage; kept_out: text to measure on
    what predictions are to be multiplied by."""

    model: PreTrainedModel
    bits: Bits
    sixteen: str
    groups: InitVar[Sequence[Group]]
    kept_out: Sequence[Pack]
    facts: list[LayerFacts] = field(default_factory=list)
    gains: dict[tuple[str, str], float] = field(default_factory=dict)
    probes: dict[Family, Probe] = field(default_factory=dict)

    def __post_init__(self, groups: Sequence[Group]) -> None:
        self._gain_layers, self._probed = gain_names(groups), probed_names(groups)
        self._trials: dict[Family, Trial] = {
            "low rank": Trial(self.model, self.kept_out),
            "rounded": Trial(self.model, self.kept_out),
        }

    def visit(self, seen: Iterator[Seen]) -> None:
        layers = linear_layers(self.model, None)
        for one in seen:
            self.facts.append(self._layer(layers[one.name].matrix.dequantize(), one))
        for trial in self._trials.values():
            trial.advance()

    def measure(self) -> None:
        """Find by what predictions are to be multiplied, after the walk."""
        self.probes = measure_factors(self.model, self.kept_out, self._trials)
        self._trials.clear()

    def _layer(self, W: Tensor, seen: Seen) -> LayerFacts:
        found, shape = projected(W, seen.metric), (W.shape[0], W.shape[1])
        if not math.isfinite(float(found.energies.sum())):
            raise NumericError(f"what goes into a layer must be finite; NaN or Inf in {seen.name}. Check the model.")
        self._trials["low rank"].add(seen.name, *truncated(found, shape))
        energies, nf4 = found.energies, stored(W, "nf4")
        del found  # more than the weight in float32
        errors = {"nf4": _error(W, nf4, seen.metric)}
        errors |= {
            kind: _error(W, stored(W, kind), seen.metric) for kind in rounded_kinds(shape[1], self.bits) if kind != "nf4"
        }
        repaired: dict[int, float] = {}
        if self.bits != "16":
            repaired = _repaired(W - nf4.dequantize(), seen.metric)
            if seen.name in self._gain_layers:
                self._measure_gains(W, seen, errors)
            if seen.name in self._probed:
                matrix = rounded(W, seen.metric, "nf4", in_metric=True)
                self._trials["rounded"].add(seen.name, matrix, _error(W, matrix, seen.metric))
        return LayerFacts(seen.name, shape, energies, errors, repaired)

    def _measure_gains(self, W: Tensor, seen: Seen, errors: dict[str, float]) -> None:
        for kind in IN_METRIC:
            if kind in errors:
                after = _error(W, rounded(W, seen.metric, kind, in_metric=True), seen.metric)
                self.gains[seen.name.rpartition(".")[2], kind] = ratio(after, errors[kind])

    @property
    def factor_kinds(self) -> list[str]:
        """What factors may be stored in."""
        return factor_kinds(self.bits, self.sixteen)

    def gain(self, name: str, kind: str) -> float:
        """What rounding in the metric leaves of the error at nearest codes, as measured for layers of that name."""
        return self.gains.get((name.rpartition(".")[2], kind), 1.0)

    def factor(self, family: Family) -> float:
        """By what predictions of that family are multiplied; 1 before anything was measured."""
        return self.probes[family].factor if family in self.probes else 1.0


def _error(W: Tensor, matrix: StoredMatrix, metric: Tensor) -> float:
    """What storing W so costs, in nats."""
    return energy(W - matrix.dequantize(), metric)


def _repaired(error: Tensor, metric: Tensor) -> dict[int, float]:
    """What is left of an error that is repaired at each rank."""
    found = projected(error, metric)
    return {rank: found.dropped(rank) for rank in REPAIR_RANKS if rank < found.max_rank / 2}


def ratio(after: float, before: float) -> float:
    """after / before, 1 where there was nothing to lower."""
    return min(1.0, after / before) if before > 0 else 1.0


def layer_options(facts: LayerFacts, prober: Prober, even_shares: Mapping[str, float]) -> list[Option]:
    """The choices of a layer that no other beats in both size and loss, in rising size.

    even_shares: for each kind of factors the share of its numbers that every layer would keep if all had such factors. Ranks
    below half of what that gives are left out: predictions err most where they cut most.
    """
    found = [option_of(facts, spec, prober) for spec in whole_specs(facts, prober) + repair_specs(facts, prober)]
    for option in low_rank_options(facts, prober):
        if 2 * option.spec.rank >= rank_at(facts.shape, min(1.0, even_shares[option.spec.factors])):
            found.append(option)
    return thinned(pruned(found or low_rank_options(facts, prober)), MOST_OPTIONS)


def whole_specs(facts: LayerFacts, prober: Prober) -> list[Spec]:
    """The storages without factors that are allowed."""
    return [whole(kind) for kind in whole_kinds(facts.shape[1], prober.bits, prober.sixteen)]


def repair_specs(facts: LayerFacts, prober: Prober) -> list[Spec]:
    return [Spec("repair", "nf4", rank, factors) for rank in facts.repaired for factors in prober.factor_kinds]


def low_rank_options(facts: LayerFacts, prober: Prober) -> list[Option]:
    """The layer in the pivoted form, at every RANK_STEP ranks that take fewer numbers than the layer has."""
    return [
        option_of(facts, Spec("low-rank", "", rank, factors), prober)
        for rank in range(RANK_STEP, min(facts.shape), RANK_STEP)
        for factors in prober.factor_kinds
    ]


def option_of(facts: LayerFacts, spec: Spec, prober: Prober) -> Option:
    """A layer stored as `spec` says, with what that is expected to cost."""
    rounds = prober.factor("rounded") * prober.gain(facts.name, spec.kind or "nf4")
    in_nf4 = rounds * 2 * facts.nf4_error if spec.factors == "nf4" else 0.0
    loss = 0.0
    if spec.form == "low-rank":
        left = facts.dropped(spec.rank)
        loss = prober.factor("low rank") * left + in_nf4 * (facts.dropped(0) - left)
    elif spec.form == "repair":
        left = facts.repaired[spec.rank]
        loss = rounds * left + in_nf4 * (facts.errors["nf4"] - left)
    elif spec.kind in facts.errors:
        loss = rounds * facts.errors[spec.kind]
    return Option(spec, spec_bytes(spec, facts.shape), max(0.0, loss))


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
    return {name: [Choice(one.spec.label, one.size_bytes, one.loss) for one in own] for name, own in options.items()}


def gain_names(groups: Sequence[Group]) -> frozenset[str]:
    """The layers in which rounding in the metric is measured: those of the middle of the model, one of each name."""
    middle = groups[len(groups) // 2 :]
    found: dict[str, str] = {}
    for group in middle:
        for name in group.names:
            found.setdefault(name.rpartition(".")[2], name)
    return frozenset(found.values())
