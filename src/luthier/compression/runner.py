"""One compression from a model's name to a folder: measure, plan, build, heal, compare, write."""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.calibration.sensitivity import mean_loss
from luthier.compression.candidates import LayerFacts, Prober
from luthier.compression.contest import WORK, Job, built, finish, fitting_candidates
from luthier.compression.footprint import footprint_of
from luthier.compression.heal import Teacher, healing_packs, known_head, teacher_of
from luthier.compression.measure import cost_of, measure_windows, quality_of
from luthier.compression.page import write_report
from luthier.compression.planning import Plan, Table, allocated_plan, fixed_bytes, nf4_plan, tables_of, uniform_plan
from luthier.compression.preflight import Survey, survey
from luthier.compression.report import ORIGINAL, PLAIN, Candidate, Report
from luthier.compression.settings import CompressSettings
from luthier.compression.tasks import measure_task
from luthier.compression.texts import Texts, read_texts
from luthier.compression.walk import Group, walk, weighted_groups
from luthier.config import Storage
from luthier.disk import STAGING_PREFIX, staged_folder
from luthier.errors import ConfigError, PreflightError
from luthier.models.compressed_description import is_compressed
from luthier.models.compressed_folder import stored_bytes
from luthier.models.load import Loaded, load, load_tokenizer
from luthier.progress import Progress
from luthier.training.allocator import keep_small_freed_memory, release_free_memory
from luthier.training.memory import peak_rss_bytes


def compress(settings: CompressSettings, progress: Progress | None = None) -> Report:
    """Write the compressed model and its report to the new folder `settings.out`; it appears whole or not at all.

    The budget is spent over layers, ranks and bits by the loss that each choice is expected to cost; the result is compared
    with the best uniform plan and with plain NF4 where that fits, by loss on text that neither was fitted to, and the best of
    them is kept. Memory: one model at a time, in 16 bits at most; the process's allocator stays as `keep_small_freed_memory`
    leaves it.
    Raises PreflightError for a budget that cannot be met, a folder that cannot be written to and a full disk, as far as can be
    known before any weight is read; ConfigError, DataError, and what `load` raises.
    """
    began = time.monotonic()
    keep_small_freed_memory()  # pages that are mapped anew for every tensor took a fifth of a run; walks trim
    found = survey(settings, progress)
    settings = replace(settings, window=found.window)
    try:
        with staged_folder(settings.out, _place) as stage:
            report = _run(settings, found, stage, progress)
            report.seconds = time.monotonic() - began
            write_report(stage, report)
    except OSError as error:
        if not _is_of_writing(error, settings.out):
            raise
        raise PreflightError(
            f"{settings.out} could not be written: {error.strerror or error}. Check the folder and the disk's free space."
        ) from error
    return report


def _place(stage: Path, out: Path) -> None:
    """Put the finished folder where it is to be. Raises ConfigError where something else came to stand there meanwhile."""
    if out.exists():
        raise ConfigError(f"a compressed model goes to a new folder; {out} came to be while this one was made. Run it again.")
    stage.rename(out)


def _run(settings: CompressSettings, found: Survey, stage: Path, progress: Progress | None) -> Report:
    loaded, texts = _load_with_texts(settings, found.sixteen, progress)
    if settings.heal:
        known_head(loaded.model)  # which healing would miss only after all else
    release_free_memory()  # of whole files in tokens, windows are kept
    notes = [*found.notes, *loaded.notes, *texts.notes]
    original = _measured_original(loaded, texts, progress)
    groups = weighted_groups(loaded.model, texts.calibration, progress)
    release_free_memory()
    prober, plans = _planned(settings, found, loaded.model, texts, groups, progress)
    teacher = _teacher(loaded.model, texts, settings.heal) if settings.heal else None
    job = Job(settings, stage, progress, found, texts, groups, original, teacher, notes)
    candidates = [original, built(job, loaded, plans[0])]
    del loaded, prober.model
    for plan in plans[1:]:
        release_free_memory()
        candidates.append(built(job, load(settings.model, base=found.sixteen, offline=settings.offline), plan))
    chosen = finish(job, fitting_candidates(candidates[1:], found.budget, settings.bits))
    if chosen.healed:
        candidates.append(chosen)
    if settings.footprints:
        _add_footprints(job, chosen, next(one for one in candidates if one.name == PLAIN))
    shutil.rmtree(stage / WORK)
    return _report(job, candidates, chosen, prober.facts)


def _measured_original(loaded: Loaded, texts: Texts, progress: Progress | None) -> Candidate:
    model = loaded.model
    windows = measure_windows(model, texts.evaluation)
    found = Candidate(
        ORIGINAL, windows.mean_loss, mean_loss(model, texts.validation), 0.0, stored_bytes(model), windows=windows
    )
    found.quality, found.cost = quality_of(windows, windows), cost_of(model, texts.evaluation[0].ids)
    if texts.task is not None:
        found.task = measure_task(model, loaded.tokenizer, texts.task, progress)
    return found


def _planned(
    settings: CompressSettings, found: Survey, model: Any, texts: Texts, groups: list[Group], progress: Progress | None
) -> tuple[Prober, list[Plan]]:
    """What every layer could become, and the plans that are built."""
    prober = Prober(model, settings.bits, found.sixteen, groups, texts.validation)
    walk(model, texts.calibration, groups, prober.visit, changes=False, progress=progress, stage="trying every layer")
    prober.measure()
    tables = tables_of(model, texts.validation, prober, progress)
    return prober, _plans(prober, tables, found.budget - fixed_bytes(model), heals=settings.heal > 0)


def _report(job: Job, candidates: list[Candidate], chosen: Candidate, facts: list[LayerFacts]) -> Report:
    settings, texts = job.settings, job.texts
    assert chosen.plan is not None
    return Report(
        model=settings.model,
        budget_text=settings.budget.text,
        budget_bytes=job.found.budget,
        bits=settings.bits,
        form="luthier" if is_compressed(job.stage) else "bitsandbytes",
        candidates=candidates,
        chosen=chosen.name,
        facts=facts,
        layers=chosen.plan.layers,
        tables=chosen.plan.tables,
        origin=texts.origin,
        measured_on=texts.measured_on,
        calibration_tokens=texts.calibration_tokens,
        heal_steps=settings.heal,
        notes=job.notes,
        peak_rss_bytes=peak_rss_bytes(),
        out=str(settings.out),
    )


def _load_with_texts(settings: CompressSettings, sixteen: Storage, progress: Progress | None) -> tuple[Loaded, Texts]:
    """The model in 16 bits, and the texts, which are read first where they need no model."""
    texts = None
    if settings.data is not None:
        texts = read_texts(settings, None, load_tokenizer(settings.model, offline=settings.offline, progress=progress))
    loaded = load(settings.model, base=sixteen, offline=settings.offline, progress=progress)
    return loaded, texts or read_texts(settings, loaded.model, loaded.tokenizer, progress)


def _teacher(model: Any, texts: Texts, steps: int) -> Teacher:
    width = model.config.get_text_config().hidden_size
    return teacher_of(model, healing_packs(texts.calibration, texts.healing, steps, width))


def _plans(prober: Prober, tables: list[Table], budget: int, *, heals: bool) -> list[Plan]:
    """The allocated plan, the best uniform one where it is another, and plain NF4 for comparison.

    heals: one in which all layers have factors too, where neither of these has any.
    """
    plans = [allocated_plan(prober.facts, tables, prober, budget)]
    uniform = uniform_plan(prober.facts, tables, prober, budget)
    if uniform is not None and uniform.layers != plans[0].layers:
        plans.append(uniform)
    if heals and not any(plan.has_factors for plan in plans):
        factored = uniform_plan(prober.facts, tables, prober, budget, factored=True)
        plans += [] if factored is None else [factored]
    return [*plans, nf4_plan(prober.facts, tables, budget)]


def _add_footprints(job: Job, chosen: Candidate, plain: Candidate) -> None:
    """Memory of the original, of plain NF4 and of the result; where it cannot be measured, a note says why."""
    settings = job.settings
    models = [(job.original, settings.model, job.found.sixteen), (chosen, str(job.stage), None)]
    if plain is not chosen:
        models.append((plain, str(plain.folder), None))
    for number, (one, model, base) in enumerate(models):
        if job.progress is not None:
            job.progress("measuring memory", number, len(models))
        one.footprint, reason = footprint_of(model, base=base, offline=settings.offline, threads=torch.get_num_threads())
        if one.footprint is None:
            job.notes.append(f"The memory of {one.name} could not be measured: {reason}.")


def _is_of_writing(error: OSError, out: Path) -> bool:
    """Whether the error is of a full disk, or of what is to become `out`, and not of a file that is read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if not isinstance(error.filename, str):
        return False
    path, folder = Path(error.filename).absolute(), out.absolute().parent
    return path == folder or (path.is_relative_to(folder) and path.relative_to(folder).parts[0].startswith(STAGING_PREFIX))
