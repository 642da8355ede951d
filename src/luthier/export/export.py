"""Export: what was trained, written in the form that was asked for, compared on the run's rows, and described."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luthier.disk import staged_folder
from luthier.errors import AdapterError, ConfigError, ModelError, NumericError, PreflightError, one_line
from luthier.export.card import license_of, write_card
from luthier.export.choices import DEQUANTIZED, ORIGINAL, merge_of, size_of
from luthier.export.compare import reference_of
from luthier.export.job import Check, Job
from luthier.export.merge import Merge
from luthier.export.merged_folder import default_kind
from luthier.export.report import ExportReport
from luthier.export.request import ADAPTER_FORMS, DEFAULT_ROWS, MERGED_FORMS, check_data, check_request, file_name, new_folder
from luthier.export.subject import load_original, open_subject, rows_of
from luthier.export.verification import Verification
from luthier.export.write import ADAPTER_WRITERS, write_folder, write_gguf
from luthier.progress import Progress
from luthier.units import percent_text, size_text


def export(
    target: str,
    *,
    to: str,
    out: str | Path,
    dtype: str | None = None,
    base: str | None = None,
    base_model: str | None = None,
    data: str | None = None,
    rows: int = DEFAULT_ROWS,
    verify: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a run's model, an adapter or a model in another form to the new folder `out`, which appears whole or not at all.

    target: a finished run, an adapter folder of PEFT or mlx-lm, or a model.
    to: "merged", a Transformers folder; "gguf", a llama.cpp file; "gguf-adapter", "peft", "mlx": the adapter alone.
    dtype: of merged weights: f32, bf16, f16 or nf4 (default: the base's own, bf16 for one in 4 bits); of a GGUF file: f32,
    bf16, f16 (default), q8_0, q6_k, q4_k, q4_1, q4_0, or asis, which keeps the blocks of a GGUF base.
    base: "dequantized" (default), the weights as they were trained on, or "original", those that QLoRA quantised.
    base_model: the base of an adapter folder. data, rows: the rows to compare on; default: the run's own, 0 rows: none.
    verify: open the result with the program it is for and compare.
    Raises ConfigError for what does not go together or an `out` that exists, PreflightError where it cannot be written,
    NumericError where a number does not fit its type or the verified result computes something else, and what loading raises.
    """
    check_request(to, dtype, base)
    check_data(to, data, rows, verify=verify, offline=offline)
    folder = new_folder(out)
    subject = open_subject(target, base_model=base_model, offline=offline, progress=progress)
    if to in ADAPTER_FORMS and subject.adapter is None:
        raise ConfigError(f"--to {to} writes an adapter; {target} has none. Try --to merged or --to gguf.")
    examples = rows_of(subject, data, rows) if rows and (to in MERGED_FORMS or verify) else []
    if verify and not examples:
        raise ConfigError("--verify compares on rows; there are none. Give --data FILE, and --rows above 0.")
    original = load_original(subject, progress) if to in MERGED_FORMS and (base == ORIGINAL or examples) else None
    reference = reference_of(subject.model, examples) if examples else None
    report = ExportReport(to, str(folder))
    file = f"{file_name(subject.name)}-{(dtype or 'f16') if to == 'gguf' else 'adapter'}.gguf"
    with _published(folder) as stage:
        job = Job(subject, report, stage, file, examples, reference, original, progress)
        license_name = license_of(subject)
        check = _write(job, dtype, base or DEQUANTIZED, license_name)
        if verify:
            report.verification = _verified(check)
            _demand_passed(report.verification)
        _describe(job, license_name)
    report.notes = [*subject.notes, *report.notes]
    return report


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if all ends well; what the disk refuses is a PreflightError."""
    try:
        with staged_folder(folder, _place) as stage:
            yield stage
    except (OSError, SafetensorError, AdapterError) as error:
        cause = _refused(error)
        if cause is None:
            raise
        reason = (cause.strerror if isinstance(cause, OSError) else None) or one_line(cause)
        raise PreflightError(f"{folder} could not be written: {reason}. {_remedy(cause)}") from error


def _place(stage: Path, folder: Path) -> None:
    try:
        stage.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise
        raise ConfigError(
            f"an export goes to a new folder; {folder} was made by another program meanwhile. Choose another --out."
        ) from error


def _refused(error: Exception) -> OSError | SafetensorError | None:
    """The disk's refusal of what was written; None for an error of another kind."""
    cause = error.__cause__ if isinstance(error, AdapterError) else error  # an adapter that could not be saved says why
    return cause if isinstance(cause, OSError | SafetensorError) else None


def _remedy(refusal: OSError | SafetensorError) -> str:
    # numpy and safetensors say of a full disk how much was written, without a number of the error.
    number = refusal.errno if isinstance(refusal, OSError) else None
    of_space = number in (None, errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return "Check the disk's free space." if of_space else "Choose another --out."


def _write(job: Job, dtype: str | None, base: str, license_name: str | None) -> Check:
    """Write the form that the report names; returns what checks it."""
    report, subject = job.report, job.subject
    if report.to in ADAPTER_WRITERS:
        report.notes += [] if subject.base_note is None else [subject.base_note]
        return ADAPTER_WRITERS[report.to](job)
    merge = merge_of(subject.model, job.original, base)
    kind = dtype or (default_kind(merge) if report.to == "merged" else "f16")
    report.dtype, report.base, report.tied = kind, base, merge.tied
    _check_space(Path(report.out).parent, merge, kind)
    if merge.untied:
        report.notes.append("The adapter made head and embedding differ: both are written, untied.")
    return write_folder(job, merge, kind) if report.to == "merged" else write_gguf(job, merge, kind, license_name)


def _check_space(folder: Path, merge: Merge, kind: str) -> None:
    """Raise PreflightError where the weights alone would fill the disk."""
    needed, free = size_of(merge, kind), shutil.disk_usage(folder).free
    if needed > free:
        raise PreflightError(
            f"{folder} must have room for the weights: {size_text(needed)} in {kind}; {size_text(free)} are free. "
            "Free some space, or choose another --out or a smaller --dtype."
        )


def _verified(check: Check) -> list[Verification]:
    """What the check found. What a library says of files that it cannot open is not the disk's refusal to take them."""
    try:
        return list(check())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"--verify opens what was written; that failed: {one_line(error)}. Nothing was written; try without --verify."
        ) from error


def _demand_passed(verification: Sequence[Verification]) -> None:
    for one in verification:
        if not one.passed:
            difference = one.difference
            raise NumericError(
                f"an export must compute what was trained ({one.bound}); {one.by} against {one.against}: error of the "
                f"logits {difference.logits_error:.2g}, of one at most {difference.largest_logits_error:.2g} of the largest; "
                f"loss {difference.loss:.5g} against {difference.loss_reference:.5g}; equal answers "
                f"{_share(one.equal_answers)}, equal tokens {_share(one.equal_tokens)}. Nothing was written."
            )


def _share(share: float | None) -> str:
    return "not compared" if share is None else percent_text(share)


def _describe(job: Job, license_name: str | None) -> None:
    """Write the model card, and name all files and their size in the report."""
    stage, report = job.stage, job.report
    files = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
    write_card(
        stage, job.subject, report.to, files, license_name=license_name, measured=report.measured,
        recommendation=report.recommendation, notes=report.notes,
    )  # fmt: skip
    report.files = [*files, "README.md"]
    report.size_bytes = sum((stage / name).stat().st_size for name in report.files)
