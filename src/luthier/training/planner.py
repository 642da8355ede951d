"""How the steps of a run are cut so that it fits: the size of packs, layers computed again, and what to try where none fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from luthier.adapters.spec import AdapterSpec
from luthier.adapters.targets import low_rank_layers, resolve_saved, resolve_targets
from luthier.config import RunConfig
from luthier.errors import ModelError
from luthier.linear import LowRankEmbedding
from luthier.training.blueprint import Blueprint, read_blueprint
from luthier.training.calibrate import TimeCosts
from luthier.training.depth import Frozen
from luthier.training.events import Listener
from luthier.training.footprint import Footprint, Memory
from luthier.training.memory import available_bytes, rss_bytes
from luthier.training.prepare import adapter_spec
from luthier.training.workload import Workload

# Packs of more tokens are no faster; of fewer than the third, the products are.
PACK_SIZES = (2048, 1024, 512)
SMALLER_PACKS = (256, 128, 64, 8)
# Cuts are chosen to stay this far below what is allowed, since the plan is off by a few percent.
HEADROOM = 0.97
LEAST_LENGTH = 64


@dataclass(frozen=True)
class Cut:
    """How steps are done: tokens of a pack at most, layers computed again, and whether freed memory is kept."""

    tokens: int
    recomputed: int
    keeps_freed: bool


@dataclass(frozen=True)
class Planner:
    """Chooses how steps are cut, given what everything costs."""

    config: RunConfig
    load: Workload
    memory: Memory
    allowed: int
    frozen: Frozen = field(default_factory=Frozen)

    @property
    def layers(self) -> int:
        return self.memory.blueprint.layers

    @property
    def trained_layers(self) -> int:
        """The layers that a gradient goes through."""
        return self.layers - self.frozen.layers

    def cut(self) -> tuple[Cut, bool]:
        """The fastest cut that fits and True, or the smallest there is and False."""
        for cut in self._cuts():
            if self._peak(cut) <= HEADROOM * self.allowed:
                return cut, True
        return min(self._cuts(), key=self._peak), False

    def _cuts(self) -> Iterator[Cut]:
        """All cuts that the configuration leaves open, the ones to be preferred first.

        Freed memory is only kept where no layer is recomputed: between what layers make twice the gaps grow large.
        """
        own, fixed = self.config.micro_batch_tokens, self.config.recompute_layers
        if not fixed:
            yield from (Cut(tokens, 0, True) for tokens in ([own] if own else PACK_SIZES))
        for tokens in [own] if own else [*(PACK_SIZES if fixed else PACK_SIZES[-1:]), *SMALLER_PACKS]:
            for recomputed in range(self.trained_layers + 1) if fixed is None else [fixed]:
                yield Cut(tokens, recomputed, False)

    def _peak(self, cut: Cut) -> int:
        return self.footprint(cut).peak_bytes

    def footprint(self, cut: Cut) -> Footprint:
        return self.memory.footprint(self.load.packing(cut.tokens), cut.recomputed, keeps_freed=cut.keeps_freed)

    def frozen_seconds_per_step(self, cut: Cut, times: TimeCosts) -> float:
        """The forward pass through the layers below the lowest that trains."""
        packing = self.load.packing(cut.tokens)
        return packing.packs * self.frozen.layers * times.forward.at(packing.tokens / packing.packs)

    def seconds_per_step(self, cut: Cut, times: TimeCosts) -> float:
        """Layers at the usual pack, the second forward of recomputed ones, the head on supervised tokens, the optimiser."""
        packing = self.load.packing(cut.tokens)
        packs, usual = packing.packs, packing.tokens / packing.packs
        once = times.forward.at(usual)
        layers = packs * (self.trained_layers * (once + times.backward.at(usual)) + cut.recomputed * once)
        if not self.frozen.cached:
            layers += self.frozen_seconds_per_step(cut, times)
        return layers + self.load.supervised_per_step * times.head + times.optimizer

    def initial_seconds(self, cut: Cut, times: TimeCosts) -> float:
        """Decompositions, and the pass that measures inputs, whose products cost about as much as the layers' own."""
        initial, packing = self.memory.initial, self.load.packing(cut.tokens)
        usual = packing.tokens / packing.packs
        return initial.seconds + 2 * self.layers * times.forward.at(usual) * initial.tokens / usual

    def moments_bytes(self, cut: Cut) -> int:
        """What second moments may hold: as much as lets the run's highest point stay where it is, or the least there is; 0
        where none are measured."""
        if not self.memory.initial.tokens:
            return 0
        footprint = self.footprint(cut)
        return self.memory.initial.moments_bytes // 2 + footprint.peak_bytes - footprint.initial_bytes

    def flops_per_step(self, cut: Cut, times: TimeCosts) -> float:
        """Products with frozen weights, forward and backward once each, for the tokens that are computed. Layers below the
        lowest that trains go forward only, or not at all where what they give is kept."""
        passes = self.trained_layers + (0 if self.frozen.cached else self.frozen.layers / 2)
        layers = passes * times.layer_flops * self.load.packing(cut.tokens).tokens
        return layers + times.head_flops * self.load.supervised_per_step

    def suggestions(self) -> list[str]:
        """Settings close to the configuration's with which the run fits, as flags."""
        found = []
        chosen = self.config.micro_batch_tokens or self.config.recompute_layers is not None
        if chosen and self._with({"micro_batch_tokens": None, "recompute_layers": None}).cut()[1]:
            found.append("leave micro_batch_tokens and recompute_layers to the plan")
        found += self._other_bases()
        if length := self._fitting_length():
            found.append(f"--max-length {length} --on-long truncate")
        smallest, there_mb = min(map(self._peak, self._cuts())), (rss_bytes() + available_bytes()) // 10**6
        if smallest <= there_mb * 10**6:
            found.append(f"--memory {min(math.ceil(smallest / HEADROOM / 1e6), there_mb)}MB, which is there")
        return found

    def _other_bases(self) -> list[str]:
        """Methods and storages that take less than the configuration's and fit, each as the flags that ask for it."""
        method, base, storage = self.config.method, self.config.base, self.config.storage
        found = []
        if method == "lora" and storage not in ("nf4", "asis"):
            plain: dict[str, dict[str, Any]] = {"leave --base out": {"base": None}} if base else {}
            plain |= {"--base bf16": {"base": "bf16"}} if base != "bf16" else {}
            found += [flags for flags, changes in plain.items() if self._fits_with(changes)][:1]
        if method == "full" and self._fits_with({"method": "lora", "base": None}):
            found.append("--method lora")
        if storage == "asis" and self._fits_with({"method": method, "base": "nf4"}):
            found.append("--base nf4")
        if storage not in ("nf4", "asis") and self._fits_with({"method": "qlora", "base": None}):
            found.append("--method qlora" + (f" without --base {base}" if base else ""))
        return found

    def _fits_with(self, changes: dict[str, Any]) -> bool:
        """Whether the run fits with these changes; not where the model cannot be stored so."""
        try:
            return self._with(changes).cut()[1]
        except ModelError:
            return False

    def _with(self, changes: dict[str, Any]) -> Planner:
        """The planner of a changed configuration; costs of a token are taken to stay as they are."""
        config = self.config.model_copy(update=changes)
        memory = self.memory
        if "base" in changes:
            blueprint = read_blueprint(config, Listener())
            memory = replace(memory, blueprint=blueprint, trained=count_trained(blueprint, config)[1], trains_base=False)
        return replace(self, config=config, memory=memory)

    def _fitting_length(self) -> int | None:
        """The largest multiple of 8 to which rows can be cut so that the run fits, if there is one below the longest."""
        free = self._with({"micro_batch_tokens": None})
        fitting, too_long = 0, self.load.longest // 8 + 1
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            if replace(free, load=self.load.truncated(8 * middle)).cut()[1]:
                fitting = middle
            else:
                too_long = middle
        return 8 * fitting if LEAST_LENGTH <= 8 * fitting < self.load.longest else None


def count_trained(blueprint: Blueprint, config: RunConfig) -> tuple[list[str], int]:
    """The layers that will carry terms, and how many numbers will train. Raises AdapterError where a target matches nothing."""
    skeleton = blueprint.skeleton
    if config.method == "full":
        return [], sum(parameter.numel() for parameter in skeleton.parameters())
    spec = adapter_spec(config)
    saved = resolve_saved(skeleton, spec.modules_to_save) if spec.modules_to_save else []
    targets = resolve_targets(skeleton, spec, saved)
    whole = sum(parameter.numel() for name in saved for parameter in skeleton.get_submodule(name).parameters())
    return targets, whole + sum(_term_numbers(skeleton, spec, target) for target in targets)


def _term_numbers(skeleton: nn.Module, spec: AdapterSpec, target: str) -> int:
    layer = low_rank_layers(skeleton)[target]
    rows, columns = layer.matrix.shape
    lengths = columns if isinstance(layer, LowRankEmbedding) else rows
    return spec.rank_of(target) * (rows + columns) + (lengths if spec.has_magnitude else 0)
