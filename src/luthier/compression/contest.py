"""Plans built, measured and kept on disk one after another, and the best of them, healed where that makes it better."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.calibration.sensitivity import mean_loss
from luthier.compression.build import build
from luthier.compression.heal import Teacher, heal
from luthier.compression.measure import cost_of, measure_windows, quality_of
from luthier.compression.planning import Plan
from luthier.compression.preflight import Survey
from luthier.compression.report import PLAIN, Candidate
from luthier.compression.settings import CompressSettings
from luthier.compression.tasks import measure_task
from luthier.compression.texts import Texts
from luthier.compression.walk import Group
from luthier.errors import NumericError, PreflightError
from luthier.models.compressed_folder import write_compressed
from luthier.models.load import Loaded, load
from luthier.progress import Progress
from luthier.units import size_text

WORK = ".work"


@dataclass
class Job:
    """What the stages of one run hand on to each other. found: what was known before any weight was read."""

    settings: CompressSettings
    stage: Path
    progress: Progress | None
    found: Survey
    texts: Texts
    groups: list[Group]
    original: Candidate
    teacher: Teacher | None
    notes: list[str]

    def say(self, stage: str) -> Progress | None:
        """Progress whose stages say of which model they are."""
        if self.progress is None:
            return None
        report = self.progress
        return lambda what, done, total: report(f"{stage}: {what}", done, total)


def built(job: Job, loaded: Loaded, plan: Plan) -> Candidate:
    """Build one plan on a dense model, measure it and keep it on disk."""
    model, say = loaded.model, job.say(plan.name)
    build(model, job.texts.calibration, job.groups, plan.layers, plan.tables, say, in_metric=plan.name != PLAIN)
    folder = job.stage / WORK / plan.name.replace(" ", "-")
    folder.mkdir(parents=True)
    write_compressed(folder, model, loaded.tokenizer, origin=job.settings.model, progress=say)
    found = Candidate(
        plan.name, 0.0, mean_loss(model, job.texts.validation), plan.rise, weights_bytes(folder), plan=plan, folder=folder
    )
    _measure(job, loaded, found)
    return found


def _measure(job: Job, loaded: Loaded, found: Candidate) -> None:
    model, task, original = loaded.model, job.texts.task, job.original.windows
    assert original is not None
    found.windows = measure_windows(model, job.texts.evaluation)
    found.quality = quality_of(found.windows, original)
    found.cost = cost_of(model, job.texts.evaluation[0].ids)
    found.loss = found.quality.loss
    if task is not None:
        found.task = measure_task(model, loaded.tokenizer, task, job.say(found.name))


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fitting_candidates(candidates: Sequence[Candidate], budget: int, bits: str) -> list[Candidate]:
    """Those that may be the result: within the budget, and not in 4 bits where 16 were asked for; the best first."""
    found = [one for one in candidates if one.size_bytes <= budget and not (bits == "16" and one.name == PLAIN)]
    if not found:
        smallest = min(candidates, key=lambda one: one.size_bytes)
        raise PreflightError(
            f"the budget is {size_text(budget)}; the smallest result takes {size_text(smallest.size_bytes)}. Raise --budget."
        )
    return sorted(found, key=lambda one: one.validation_loss)


def finish(job: Job, fitting: Sequence[Candidate]) -> Candidate:
    """The result, its files where they are to be. fitting: the best first.

    Healing is tried on the best that has factors, else on the best, and kept where that is then the best of all.
    """
    best = fitting[0]
    if job.teacher is not None:
        candidate = next((one for one in fitting if one.plan is not None and one.plan.has_factors), best)
        healed = _healed(job, job.teacher, candidate, best)
        if healed is not None:
            return healed
    assert best.folder is not None
    for path in sorted(best.folder.iterdir()):
        shutil.move(path, job.stage / path.name)
    return best


def _healed(job: Job, teacher: Teacher, candidate: Candidate, best: Candidate) -> Candidate | None:
    """The candidate after healing, written as the result; None, with a note, where another is still better or numbers did not
    stay finite."""
    loaded, settings = load(str(candidate.folder)), job.settings
    model = loaded.model
    try:
        heal(model, teacher, settings.heal, seed=settings.seed, progress=job.say("healing"))
    except NumericError as error:
        job.notes.append(f"Healing {candidate.name} failed, and the best plan without it was kept: {error}")
        return None
    before, after = candidate.validation_loss, mean_loss(model, job.texts.validation)
    if not after < best.validation_loss:  # nor is NaN
        job.notes.append(
            f"Healing {candidate.name} took its loss on kept-out text from {before:.4f} to {after:.4f}, and {best.name} "
            f"without healing has {best.validation_loss:.4f}: healing was dropped."
        )
        return None
    write_compressed(job.stage, model, loaded.tokenizer, origin=settings.model)
    found = replace(candidate, name=f"{candidate.name}, healed", healed=True, validation_loss=after, folder=None)
    found.size_bytes = weights_bytes(job.stage)
    _measure(job, loaded, found)
    return found
