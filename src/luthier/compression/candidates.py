"""What each layer could become, and the rise of the loss to expect from it: the choices that a budget is spent on.

Everything is predicted on the model as it was, from one walk through it. For an error E of a layer with the metric H:

    rounded         g tr(E H E^T), E at nearest codes; g: what rounding in the metric makes of that, measured in one layer
    repaired        g sum of what rank r drops of E's decomposition
    low rank        what rank r drops of the decomposition of the group's layers stacked
    factors in NF4  besides, 2 e of what the factors keep, e: the relative squared error of NF4 in this layer
"""

from __future__ import annotations

import itertools
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
from luthier.lowrank import Choice, projected, round_gguf, round_nf4, stacked
from luthier.matrices import stored

REPAIR_RANKS = (8, 16, 32, 64, 96, 128)
RANK_STEP = 16
MOST_COMBINED = 48
IN_METRIC = ("nf4", "q4_0", "q4_k")


@dataclass(frozen=True)
class Option:
    """One way to store all layers of a group. specs: one a layer, in the group's order."""

    specs: tuple[Spec, ...]
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class LayerFacts:
    """One layer on the model as it was. energy: tr(W H W^T), its share of the group's in it; errors: of each kind at nearest
    codes; repaired: what is left of NF4's error at each rank."""

    shape: tuple[int, int]
    energy: float
    errors: dict[str, float]
    repaired: dict[int, float]

    @property
    def nf4_error(self) -> float:
        """The relative squared error of NF4."""
        return self.errors["nf4"] / self.energy if self.energy > 0 and "nf4" in self.errors else 0.0


@dataclass(frozen=True)
class GroupFacts:
    """A group on the model as it was. energies: of its layers stacked, falling, in nats."""

    names: tuple[str, ...]
    layers: dict[str, LayerFacts]
    energies: Tensor

    def dropped(self, rank: int) -> float:
        return float(self.energies[rank:].sum())


@dataclass
class Prober:
    """Visits a walk and collects facts. sixteen: the kind of 16-bit storage; gain_layers: where rounding in the metric is
    measured against nearest codes."""

    model: PreTrainedModel
    bits: Bits
    sixteen: str
    gain_groups: frozenset[str]
    facts: list[GroupFacts] = field(default_factory=list)
    gains: dict[tuple[str, str], float] = field(default_factory=dict)

    def visit(self, seen: Seen) -> None:
        layers = linear_layers(self.model, list(seen.group.names))
        weights = {name: layer.matrix.dequantize() for name, layer in layers.items()}
        metric = seen.metric.to(torch.float32)
        own = {name: self._layer(name, weights[name], metric, seen) for name in seen.group.names}
        shares = seen.group.shares
        together = stacked([weights[name] * shares[name] ** 0.5 for name in seen.group.names])
        energies = projected(together, seen.metric).energies
        self.facts.append(GroupFacts(seen.group.names, own, energies))

    def _layer(self, name: str, W: Tensor, metric: Tensor, seen: Seen) -> LayerFacts:
        share = seen.group.shares[name]
        errors: dict[str, float] = {}
        repaired: dict[int, float] = {}
        for kind in rounded_kinds(W.shape[1], self.bits):
            left = W - stored(W, kind).dequantize()
            errors[kind] = share * energy(left, metric)
            if name in self.gain_groups and kind in IN_METRIC:
                in_metric = round_nf4(W, seen.metric) if kind == "nf4" else round_gguf(W, seen.metric, kind)
                self.gains[name.rpartition(".")[2], kind] = ratio(
                    share * energy(W - in_metric.dequantize(), metric), errors[kind]
                )
            if kind == "nf4":
                found = projected(left, seen.metric)
                repaired = {r: share * found.dropped(r) for r in REPAIR_RANKS if r < found.max_rank / 2}
        shape = (W.shape[0], W.shape[1])
        total = share * energy(W, metric)
        if not math.isfinite(total):
            raise NumericError(f"what goes into a layer must be finite; NaN or Inf in {name}. Check the model.")
        return LayerFacts(shape, total, errors, repaired)

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


def group_options(facts: GroupFacts, prober: Prober) -> list[Option]:
    """The choices of a group that no other beats in both size and loss, in rising size."""
    single = [_pruned(_layer_options(name, facts.layers[name], prober)) for name in facts.names]
    combined = [
        Option(sum((one.specs for one in chosen), ()), sum(one.size_bytes for one in chosen), sum(one.loss for one in chosen))
        for chosen in itertools.product(*single)
    ]
    return _thinned(_pruned([*combined, *low_rank_options(facts, prober)]), MOST_COMBINED)


def _layer_options(name: str, facts: LayerFacts, prober: Prober) -> list[Option]:
    options = []
    if prober.bits != "4":
        options.append(option_of((whole(prober.sixteen),), [facts.shape], 0.0))
    for kind, error in facts.errors.items():
        options.append(option_of((whole(kind),), [facts.shape], prober.gain(name, kind) * error))
    for rank, left in facts.repaired.items():
        error = prober.gain(name, "nf4")
        for factors in factor_kinds(prober):
            kept = (facts.errors["nf4"] - left) if factors == "nf4" else 0.0
            loss = error * (left + 2 * facts.nf4_error * kept)
            options.append(option_of((Spec("repair", "nf4", rank, factors),), [facts.shape], loss))
    return options


def low_rank_options(facts: GroupFacts, prober: Prober) -> list[Option]:
    """The group's layers in one right factor and a left one each, at every RANK_STEP ranks below what the layers have."""
    shapes = [facts.layers[name].shape for name in facts.names]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    total = float(facts.energies.sum())
    error = max(layer.nf4_error for layer in facts.layers.values())
    options = []
    for rank in range(RANK_STEP, len(facts.energies), RANK_STEP):
        if rank * (rows + columns) >= rows * columns:
            break
        left = facts.dropped(rank)
        for factors in factor_kinds(prober):
            loss = left + (2 * error * (total - left) if factors == "nf4" else 0.0)
            options.append(option_of((Spec("low-rank", "", rank, factors),) * len(shapes), shapes, loss))
    return options


def factor_kinds(prober: Prober) -> list[str]:
    return {"16": [prober.sixteen], "4": ["nf4"], "auto": [prober.sixteen, "nf4"]}[prober.bits]


def option_of(specs: tuple[Spec, ...], shapes: Sequence[tuple[int, int]], loss: float) -> Option:
    """Layers that are all low-rank have one right factor between them."""
    joint = all(spec.form == "low-rank" for spec in specs)
    size = sum(
        spec_bytes(spec, shape, with_right=not joint or number == 0)
        for number, (spec, shape) in enumerate(zip(specs, shapes, strict=True))
    )
    return Option(specs, size, max(0.0, loss))


def _pruned(options: Iterable[Option]) -> list[Option]:
    """Those that none other beats: in rising size, each with less loss than all smaller ones."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.size_bytes, one.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _thinned(options: list[Option], most: int) -> list[Option]:
    if len(options) <= most:
        return options
    return [options[round(number * (len(options) - 1) / (most - 1))] for number in range(most)]


def choices_of(options: Mapping[str, Sequence[Option]]) -> dict[str, list[Choice]]:
    """As the allocation takes them."""
    return {
        name: [Choice(" | ".join(spec.label for spec in one.specs), one.size_bytes, one.loss) for one in own]
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
