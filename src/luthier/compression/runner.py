"""One compression from a model's name to a folder: measure, plan, build, heal, compare, write."""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from luthier.calibration.sensitivity import mean_loss
from luthier.compression.build import build
from luthier.compression.candidates import GroupFacts, Prober, gain_names
from luthier.compression.heal import Teacher, heal, teacher_of
from luthier.compression.measure import Windows, cost_of, measure_windows, quality_of
from luthier.compression.planning import Plan, Table, allocated_plan, fixed_bytes, nf4_plan, tables_of, uniform_plan
from luthier.compression.report import Candidate, Report, write_report
from luthier.compression.settings import CompressSettings
from luthier.compression.texts import Texts, read_texts
from luthier.compression.walk import Group, walk, weighted_groups
from luthier.config import Storage
from luthier.errors import PreflightError
from luthier.linear import count_numbers
from luthier.models.cache import publish
from luthier.models.compressed_folder import stored_bytes, write_compressed
from luthier.models.load import Loaded, load, open_weights
from luthier.models.source import resolve
from luthier.progress import Progress
from luthier.units import size_text

WORK = ".work"
# Weights in these blocks lie on a grid of 4 bits already, which storages of this kind find again.
FOUR_BIT_BLOCKS = ("q4_0", "q4_1", "q4_k")


@dataclass
class _Job:
    """What the stages of one run hand on to each other."""

    settings: CompressSettings
    stage: Path
    progress: Progress | None
    sixteen: Storage
    texts: Texts
    groups: list[Group]
    facts: list[GroupFacts]
    tables: list[Table]
    budget: int
    original: Windows
    teacher: Teacher | None
    notes: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    def look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss)

    def say(self, stage: str) -> Progress | None:
        """Progress whose stages say of which model they are."""
        if self.progress is None:
            return None
        report = self.progress
        return lambda what, done, total: report(f"{stage}: {what}", done, total)


def compress(settings: CompressSettings, progress: Progress | None = None) -> Report:
    """Write the compressed model and its report to the new folder `settings.out`; it appears whole or not at all.

    The budget is spent over layers, ranks and bits by the loss that each choice is expected to cost; the result is compared
    with the best uniform plan and with plain NF4 where that fits, by loss on text that neither was fitted to, and the best of
    them is kept. Memory: one model at a time, in 16 bits at most.
    Raises PreflightError for a budget that cannot be met or a full disk, ConfigError, DataError, and what `load` raises.
    """
    began = time.monotonic()
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with publish(settings.out) as stage:
            report = _run(settings, stage, progress)
            report.seconds = time.monotonic() - began
            write_report(stage, report)
    except OSError as error:
        raise PreflightError(
            f"{settings.out} could not be written: {error.strerror or error}. Check the disk's free space."
        ) from error
    return report


def _run(settings: CompressSettings, stage: Path, progress: Progress | None) -> Report:
    loaded, sixteen, notes = _load_dense(settings, progress)
    model = loaded.model
    numbers = count_numbers(model)
    texts = read_texts(settings, model, loaded.tokenizer, progress)
    budget = settings.budget.bytes_of(numbers)
    original = measure_windows(model, texts.evaluation)
    before = Candidate("original", original.mean_loss, _mean(model, texts), 0.0, stored_bytes(model))
    before.quality, before.cost = quality_of(original, original), cost_of(model, texts.evaluation[0].ids)
    groups = weighted_groups(model, texts.calibration, progress)
    prober = Prober(model, settings.bits, sixteen, gain_names(groups))
    walk(model, texts.calibration, groups, prober.visit, changes=False, progress=progress, stage="trying every layer")
    tables = tables_of(model, texts.validation, prober, progress)
    plans = _plans(prober, tables, budget - fixed_bytes(model))
    teacher = teacher_of(model, texts.calibration) if settings.heal else None
    job = _Job(settings, stage, progress, sixteen, texts, groups, prober.facts, tables, budget, original, teacher, notes)
    notes += [*loaded.notes, *texts.notes]
    job.look()
    candidates = [before, _build(job, loaded, plans[0])]
    del loaded, model, prober.model
    for plan in plans[1:]:
        gc.collect()
        candidates.append(_build(job, load(settings.model, base=sixteen, offline=settings.offline), plan))
    chosen = _chosen(candidates[1:], budget)
    form = _finish(job, chosen)
    _remove_work(stage)
    return Report(
        model=settings.model,
        budget_text=settings.budget.text,
        budget_bytes=budget,
        bits=settings.bits,
        form=form,
        candidates=candidates,
        chosen=chosen.name,
        groups=prober.facts,
        layers=chosen.plan.layers if chosen.plan else {},
        tables=chosen.plan.tables if chosen.plan else {},
        origin=texts.origin,
        calibration_tokens=texts.calibration_tokens,
        healed=settings.heal,
        notes=notes,
        peak_rss_bytes=job.peak_bytes,
        out=str(settings.out),
    )


def _load_dense(settings: CompressSettings, progress: Progress | None) -> tuple[Loaded, Storage, list[str]]:
    """The model in 16 bits, which 16 these are, and what should be known of where its weights come from."""
    source = resolve(settings.model, offline=settings.offline, progress=progress)
    _, weights = open_weights(source.path)
    kinds = {weights.kind(name) for name in weights.names()}
    dtypes = {weights.dtype(name) for name in weights.names() if weights.kind(name) is None}
    sixteen: Storage = "f16" if dtypes == {torch.float16} else "bf16"
    notes = []
    blocks = sorted(kind for kind in kinds if kind in FOUR_BIT_BLOCKS)
    if blocks:
        notes.append(
            f"This model comes in {', '.join(blocks)} blocks: it was rounded to 4 bits before, so storages whose grid holds "
            "that one (q8_0, 16 bits) lose nothing more, and keeping the file as it is may serve as well."
        )
    return load(settings.model, base=sixteen, offline=settings.offline, progress=progress), sixteen, notes


def _mean(model: Any, texts: Texts) -> float:
    return mean_loss(model, texts.validation)


def _plans(prober: Prober, tables: list[Table], budget: int) -> list[Plan]:
    """The allocated plan, the best uniform one where it is another, and plain NF4 for comparison."""
    plans = [allocated_plan(prober.facts, tables, prober, budget)]
    uniform = uniform_plan(prober.facts, tables, prober, budget)
    if uniform is not None and uniform.layers != plans[0].layers:
        plans.append(uniform)
    if prober.bits != "16":
        plans.append(nf4_plan(prober.facts, tables, prober, budget))
    return plans


def _build(job: _Job, loaded: Loaded, plan: Plan) -> Candidate:
    """Build one plan on a dense model, measure it and keep it on disk."""
    model, say = loaded.model, job.say(plan.name)
    build(model, job.texts.calibration, job.groups, plan.layers, plan.tables, say, in_metric=plan.name != "plain nf4")
    job.look()
    folder = job.stage / WORK / plan.name.replace(" ", "-")
    folder.mkdir(parents=True)
    write_compressed(folder, model, loaded.tokenizer, origin=job.settings.model, progress=say)
    found = Candidate(plan.name, 0.0, _mean(model, job.texts), plan.rise, _weights_bytes(folder), plan=plan, folder=folder)
    _measure(job, model, found)
    return found


def _measure(job: _Job, model: Any, found: Candidate) -> None:
    found.quality = quality_of(measure_windows(model, job.texts.evaluation), job.original)
    found.cost = cost_of(model, job.texts.evaluation[0].ids)
    found.loss = found.quality.loss
    job.look()


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _chosen(candidates: list[Candidate], budget: int) -> Candidate:
    """The one with the least loss on text that none was fitted to, of those within the budget."""
    fitting = [one for one in candidates if one.size_bytes <= budget]
    if not fitting:
        smallest = min(candidates, key=lambda one: one.size_bytes)
        raise PreflightError(
            f"the budget is {size_text(budget)}; the smallest result takes {size_text(smallest.size_bytes)}. Raise --budget."
        )
    return min(fitting, key=lambda one: one.validation_loss)


def _finish(job: _Job, chosen: Candidate) -> str:
    """Heal the chosen model where that was asked for, and put its files where the result is to be."""
    assert chosen.folder is not None
    if job.teacher is None or not _has_factors(chosen):
        if job.settings.heal:
            job.notes.append(
                f"Nothing was healed: the plan that was chosen ({chosen.name}) has no factors to train at this budget."
            )
        for path in sorted(chosen.folder.iterdir()):
            shutil.move(path, job.stage / path.name)
        return "bitsandbytes" if not (job.stage / "compression.json").exists() else "luthier"
    loaded = load(str(chosen.folder))
    model = loaded.model
    before = chosen.validation_loss
    heal(model, job.teacher, job.texts.calibration, job.settings.heal, seed=job.settings.seed, progress=job.say("healing"))
    after = _mean(model, job.texts)
    job.look()
    if after >= before:
        job.notes.append(f"Healing did not help ({before:.4f} before, {after:.4f} after on kept-out text) and was dropped.")
        for path in sorted(chosen.folder.iterdir()):
            shutil.move(path, job.stage / path.name)
        return "luthier"
    chosen.validation_loss, chosen.healed = after, True
    _measure(job, model, chosen)
    form = write_compressed(job.stage, model, loaded.tokenizer, origin=job.settings.model)
    chosen.size_bytes = _weights_bytes(job.stage)
    return form


def _has_factors(candidate: Candidate) -> bool:
    return candidate.plan is not None and any(spec.rank for spec in candidate.plan.layers.values())


def _remove_work(stage: Path) -> None:
    shutil.rmtree(stage / WORK, ignore_errors=True)
