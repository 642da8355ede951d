"""One export under way: what is written, from what, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.data import Example, Renderer
from luthier.evaluation.stops import end_tokens
from luthier.export import forms
from luthier.export.choices import DEQUANTIZED, ORIGINAL, Choice, choices_for, measure, recommend, warning
from luthier.export.compare import Reference
from luthier.export.forms import AS_IS
from luthier.export.merge import Merge
from luthier.export.report import ExportReport
from luthier.export.subject import Subject
from luthier.export.verification import Verification
from luthier.export.verify import verify_merge
from luthier.models.load import Loaded
from luthier.progress import Progress

# Opens what was written and compares it on the rows.
Check = Callable[[], Sequence[Verification]]


@dataclass(frozen=True)
class Job:
    """All that the writers need. stage: the empty folder to write into; file: the name of a GGUF file in it; examples: the
    rows to compare on, reference: the trained model's logits on them, None without rows; original: the published weights,
    where the subject holds quantised ones."""

    subject: Subject
    report: ExportReport
    stage: Path
    file: str
    examples: list[Example]
    reference: Reference | None
    original: Loaded | None
    progress: Progress | None

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer, in ascending order."""
        tokenizer = self.subject.tokenizer
        return sorted(end_tokens(self.subject.model, tokenizer, Renderer(tokenizer, max_length=64)))

    @property
    def base_file(self) -> Path | None:
        """The GGUF file that the base was read from, None for a base of another kind."""
        path = self.subject.source.path
        return path if path.is_file() else None

    def needed_reference(self) -> Reference:
        """The reference, for checks, which are never made without rows."""
        assert self.reference is not None
        return self.reference


def compare_choices(job: Job, kind: str) -> None:
    """Fill in the report's choices and recommendation where there are rows. kind: what the export is stored in."""
    if job.reference is None:
        return
    report, is_gguf, base = job.report, job.report.to == "gguf", job.report.base or DEQUANTIZED
    choices = choices_for(job.subject.model, kind, "f16" if is_gguf else "bf16", has_original=job.original is not None)
    report.measured = measure(job.reference, job.subject.model, job.original, choices, job.progress)
    kinds = (*forms.GGUF_KINDS, AS_IS) if is_gguf else forms.MERGED_KINDS
    report.recommended, report.recommendation = recommend(report.measured, kinds, base)
    as_written = Choice(base if job.original is not None else DEQUANTIZED, kind)
    told = warning(next(one for one in report.measured if one.choice == as_written))
    report.notes += [told] if told else []


def check_merge(job: Job, merge: Merge) -> list[Verification]:
    """Merged into the weights it was trained on, the merge must compute what was trained; into others it does not."""
    into_original = job.report.base == ORIGINAL and job.original is not None
    return [] if into_original else [verify_merge(job.needed_reference(), merge)]
