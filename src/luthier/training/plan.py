"""What a run will take in memory, time and disk, before any weight is read."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.adapters.targets import low_rank_layers, resolve_saved
from luthier.config import RunConfig
from luthier.errors import PreflightError
from luthier.models.nf4_cache import cached_folder, require_room
from luthier.models.packed import shares_prefixes
from luthier.training.allocator import release_free_memory, set_freed_memory_kept
from luthier.training.blueprint import Blueprint, read_blueprint, stored_bytes
from luthier.training.calibrate import MEMORY_TOKENS, StandIn, TimeCosts, measure_bytes, measure_seconds, stand_in
from luthier.training.depth import Frozen, frozen_layers, refuse_cache, refuse_entry
from luthier.training.events import Listener
from luthier.training.footprint import FLOAT_BYTES, Footprint, Memory
from luthier.training.frozen_cache import held_bytes
from luthier.training.initial_costs import InitialCosts, initial_costs
from luthier.training.memory import available_bytes, rss_bytes
from luthier.training.optimizer import check_optimizer
from luthier.training.planner import PACK_SIZES, Cut, Planner, count_trained
from luthier.training.prepare import (
    RunData,
    check_data_is_there,
    check_rows_fit,
    read_data,
    with_absolute_paths,
)
from luthier.training.recompute import check_recomputed
from luthier.training.rundir import FROZEN
from luthier.training.schedule import total_examples
from luthier.training.workload import workload
from luthier.units import duration_text, parse_size, size_text

SHARE_OF_FREE = 0.8
RUN_FILES_BYTES = 4_000_000


@dataclass(frozen=True)
class Plan:
    """A run's figures. Sizes in bytes, of the whole process; seconds of a step without saving and evaluation.

    micro_batch_tokens, recompute_layers: how steps are cut and how many layers are computed again in backward.
    keeps_freed_memory: what tensors let go of stays for the next ones. footprint: the highest point, part by part.
    peak_flops: of this machine; efficiency: the share of it that a step reaches, None without the native kernels.
    frozen_layers: those below the lowest that trains. frozen_cache_bytes: what cache_frozen keeps of them on disk, 0 without
    it, when frozen_seconds pass before the first step and frozen_share is the part of a step's time that is saved.
    init: what terms start from, made in initial_seconds; moments_bytes: what second moments may hold while it is made.
    suggestions: where the run does not fit, settings with which it does.
    """

    model: str
    method: str
    storage: str
    micro_batch_tokens: int
    recompute_layers: int
    keeps_freed_memory: bool
    layers: int
    footprint: Footprint
    allowed_bytes: int
    total_steps: int
    tokens_per_step: float
    computed_tokens_per_step: float
    seconds_per_step: float
    trainable_parameters: int
    total_parameters: int
    peak_flops: float | None
    efficiency: float | None
    disk_bytes: int
    disk_free_bytes: int
    frozen_layers: int = 0
    frozen_cache_bytes: int = 0
    frozen_seconds: float = 0.0
    frozen_share: float = 0.0
    init: str = "default"
    initial_seconds: float = 0.0
    moments_bytes: int = 0
    suggestions: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return self.footprint.peak_bytes

    @property
    def seconds(self) -> float:
        return self.frozen_seconds + self.initial_seconds + self.total_steps * self.seconds_per_step

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.allowed_bytes and self.disk_bytes <= self.disk_free_bytes

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds and `luthier plan --json` prints."""
        derived = {"peak_bytes": self.peak_bytes, "load_bytes": self.footprint.load_bytes}
        return {**derived, "seconds": self.seconds, "fits": self.fits, **asdict(self)}

    def line(self) -> str:
        """One sentence for the start of a run."""
        again = f", {self.recompute_layers} of {self.layers} layers recomputed" if self.recompute_layers else ""
        return (
            f"planned: {size_text(self.peak_bytes)} of {size_text(self.allowed_bytes)} memory, "
            f"{duration_text(self.seconds_per_step)} a step, {duration_text(self.seconds)} in all; "
            f"packs of up to {self.micro_batch_tokens} tokens{again}."
        )

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with the pack size filled in, which is part of a run's numbers."""
        return config.model_copy(update={"micro_batch_tokens": self.micro_batch_tokens})

    def require_fit(self) -> None:
        """Raise PreflightError, naming settings that fit, if the run would not."""
        if self.fits:
            return
        if self.peak_bytes <= self.allowed_bytes:
            kept, less = "", "set keep_checkpoints=1"
            if self.frozen_cache_bytes:
                kept, less = f", {size_text(self.frozen_cache_bytes)} of it for cache_frozen,", "leave --cache-frozen out"
            raise PreflightError(
                f"all that a run writes must fit the disk; it needs {size_text(self.disk_bytes)}{kept} and "
                f"{size_text(self.disk_free_bytes)} are free. Free some space, choose another --out, or {less}."
            )
        raise PreflightError(
            f"a run must fit in the memory it is allowed; it needs {size_text(self.peak_bytes)} and may have "
            f"{size_text(self.allowed_bytes)}. {self.advice()}"
        )

    def advice(self) -> str:
        """What to try where it does not fit."""
        if self.suggestions:
            return "What fits: " + "; or ".join(self.suggestions) + "."
        return "No setting of this model fits. Try a smaller model, or a machine with more memory."


def plan_run(config: RunConfig, listener: Listener) -> Plan:
    """The plan of a run that is not going to be started: reads and renders the data, loads no model.

    Raises DataError, and ConfigError for an optimiser that cannot run here, besides what `make_plan` raises.
    """
    config = with_absolute_paths(config)
    check_data_is_there(config)
    check_optimizer(config)
    return make_plan(config, read_data(config, listener), listener)


def make_plan(config: RunConfig, data: RunData, listener: Listener, *, started: bool = False) -> Plan:
    """Plan the run of `config` on rows that are rendered already: headers are read, one layer is measured, no weight loaded.

    Settings that `config` leaves open are chosen: the largest packs that fit with everything kept; failing that, packs of
    512 tokens, freed memory given back and as few recomputed layers as fit; failing that, smaller packs. Takes a second or two.
    started: what the terms start from is there already, as in a run that goes on, and takes no work.
    Raises ConfigError, ModelError, AdapterError, PreflightError for what is wrong already. Whether it fits is in the result.
    """
    listener.stage("planning", 0, 0)
    blueprint = read_blueprint(config, listener)
    check_rows_fit(blueprint.skeleton, data)
    load = workload(config, data.train.examples)
    targets, trained = count_trained(blueprint, config)
    frozen = _frozen(blueprint, config, targets, data)
    largest = load.packing(config.micro_batch_tokens or PACK_SIZES[0])
    set_freed_memory_kept(False)
    with torch.random.fork_rng(devices=[]):
        sample = stand_in(blueprint, config, targets, largest.supervised_largest)
        if frozen.cached:
            refuse_entry(sample.model)
        if shares_prefixes(sample.model):
            load = workload(config, data.train.examples, share=True)
        costs = measure_bytes(sample, MEMORY_TOKENS, load.usual_length)
        initial = initial_costs(blueprint, config, targets)
        if started:
            initial = InitialCosts(frozen=initial.frozen)
        full = config.method == "full"
        memory = Memory(_runtime_bytes(sample), blueprint, costs, trained, full, frozen.layers, initial)
        planner = Planner(config, load, memory, allowed_bytes(config), frozen)
        cut, fits = planner.cut()
        set_freed_memory_kept(cut.keeps_freed)
        packing = load.packing(cut.tokens)
        usual = round(packing.tokens / packing.packs)
        times = measure_seconds(sample, usual, load.usual_length, trained)
    del sample
    release_free_memory()
    plan = _figures(planner, cut, times)
    return plan if fits or plan.fits else replace(plan, suggestions=planner.suggestions())


def _runtime_bytes(sample: StandIn) -> int:
    """What the process holds, kernels' scratch memory included, without the stand-in for the model."""
    release_free_memory()
    own = [*sample.model.parameters(), *sample.model.buffers(), *sample.head.linear.parameters(), sample.rows]
    return rss_bytes() - sum({tensor.data_ptr(): tensor.nbytes for tensor in own}.values())


def allowed_bytes(config: RunConfig) -> int:
    """What the process may hold: `config.memory`, by default 80 % of what is free, and never more than there is."""
    held, free = rss_bytes(), available_bytes()
    if config.memory is None:
        return int(held + SHARE_OF_FREE * free)
    return min(parse_size(config.memory), held + free)


def _frozen(blueprint: Blueprint, config: RunConfig, targets: list[str], data: RunData) -> Frozen:
    """What lies below the lowest layer that trains.

    Raises PreflightError if it was to be kept and that saves nothing, ModelError if more layers are to be computed again
    than there are above it.
    """
    layers = 0
    if config.method != "full":
        layers = frozen_layers(blueprint.skeleton, [*targets, *resolve_saved(blueprint.skeleton, config.modules_to_save)])
    check_recomputed(config.recompute_layers or 0, blueprint.layers, layers)
    rows = [len(example.ids) for example in data.train.examples]
    if config.cache_frozen:
        refuse_cache(layers, total_examples(config, len(rows)), len(rows))
    return Frozen(layers, config.cache_frozen, sum(rows), blueprint.hidden_size)


def _figures(planner: Planner, cut: Cut, times: TimeCosts) -> Plan:
    blueprint = planner.memory.blueprint
    seconds = planner.seconds_per_step(cut, times)
    kept = planner.frozen_seconds_per_step(cut, times) if planner.frozen.cached else 0.0
    adapter = 0 if planner.memory.trains_base else planner.memory.trained
    return Plan(
        model=planner.config.model,
        method=planner.config.method,
        storage=", ".join(dict.fromkeys(blueprint.storages.values())),
        micro_batch_tokens=cut.tokens,
        recompute_layers=cut.recomputed,
        keeps_freed_memory=cut.keeps_freed,
        layers=planner.layers,
        footprint=planner.footprint(cut),
        allowed_bytes=planner.allowed,
        total_steps=planner.load.total_steps,
        tokens_per_step=planner.load.tokens_per_step,
        computed_tokens_per_step=planner.load.packing(cut.tokens).tokens,
        seconds_per_step=seconds,
        trainable_parameters=planner.memory.trained,
        total_parameters=sum(parameter.numel() for parameter in blueprint.skeleton.parameters()) + adapter,
        peak_flops=times.peak_flops,
        efficiency=planner.flops_per_step(cut, times) / seconds / times.peak_flops if times.peak_flops else None,
        disk_bytes=_disk_bytes(planner),
        disk_free_bytes=shutil.disk_usage(_existing(Path(planner.config.out or "."))).free,
        frozen_layers=planner.frozen.layers,
        frozen_cache_bytes=planner.frozen.cache_bytes,
        frozen_seconds=kept * planner.frozen.tokens / planner.load.tokens_per_step,
        frozen_share=kept / (seconds + kept) if kept else 0.0,
        init=planner.config.init,
        initial_seconds=planner.initial_seconds(cut, times),
        moments_bytes=planner.moments_bytes(cut),
    )


def _disk_bytes(planner: Planner) -> int:
    """Checkpoints, one more than is kept while a new one is written, the result, the start, and what cache_frozen and
    cache_quantized keep."""
    weights = planner.memory.trained * FLOAT_BYTES
    kept = max(0, planner.frozen.cache_bytes - held_bytes(Path(planner.config.out or ".") / FROZEN))
    kept += _quantized_bytes(planner)
    initial = (planner.memory.initial.kept + planner.memory.initial.frozen) * FLOAT_BYTES
    return (planner.config.keep_checkpoints + 1) * 3 * weights + weights + initial + RUN_FILES_BYTES + kept


def _quantized_bytes(planner: Planner) -> int:
    """What cache_quantized will keep of the model on the disk of the run; 0 without it, and where it is kept already.

    Raises PreflightError where it goes to another disk and that has no room for it.
    """
    config, blueprint = planner.config, planner.memory.blueprint
    if not config.cache_quantized or (folder := cached_folder(Path(blueprint.path), config.nf4_options)).exists():
        return 0
    layers = low_rank_layers(blueprint.skeleton)
    shapes = [layers[key.removesuffix(".weight")].matrix.shape for key, kind in blueprint.storages.items() if kind == "nf4"]
    needed = sum(stored_bytes("nf4", *shape, double=config.double_quant) for shape in shapes)
    if _disk_of(folder.parent) == _disk_of(_existing(Path(config.out or "."))):
        return needed
    require_room(folder, needed)
    return 0


def _disk_of(folder: Path) -> int:
    return folder.stat().st_dev


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
