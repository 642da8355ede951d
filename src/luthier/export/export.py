"""Export: what was trained, written in the form that was asked for, compared on the run's rows, and described."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from luthier.adapters import save_adapter
from luthier.data import Example, Renderer
from luthier.errors import AdapterError, ConfigError, NumericError, PreflightError, nearest, one_line
from luthier.evaluation.stops import end_tokens
from luthier.export import forms
from luthier.export.card import license_of, write_card
from luthier.export.choices import (
    BASES,
    DEQUANTIZED,
    ORIGINAL,
    Choice,
    Measured,
    choices_for,
    measure,
    merge_of,
    plain_kind,
    recommend,
    size_of,
    storing,
    warning,
)
from luthier.export.compare import Reference, merged_reference, reference_of
from luthier.export.forms import AS_IS
from luthier.export.gguf_adapter import write_adapter
from luthier.export.gguf_model import fallbacks, file_kinds, general_keys, plan_entries, write_model
from luthier.export.gguf_settings import gguf_settings
from luthier.export.gguf_vocabulary import check_vocabulary, copied_vocabulary, gguf_vocabulary
from luthier.export.merge import Merge
from luthier.export.merged_folder import check_kind, default_kind, write_merged
from luthier.export.mlx import write_mlx
from luthier.export.modelfile import modelfile
from luthier.export.subject import Subject, load_original, open_subject, rows_of
from luthier.export.verify import Verification, verify_gguf, verify_gguf_adapter, verify_merge, verify_merged, verify_peft
from luthier.models.cache import publish
from luthier.models.load import Loaded
from luthier.progress import Progress
from luthier.units import size_text

MERGED_FORMS, ADAPTER_FORMS = ("merged", "gguf"), ("peft", "mlx", "gguf-adapter")
FORMS = (*MERGED_FORMS, *ADAPTER_FORMS)
DEFAULT_ROWS = 32
MODELFILE = "Modelfile"


@dataclass
class ExportReport:
    """What was written. files: names in `out`; dtype, base: how and into what it was merged, None for adapters; tied: whether
    head and embedding are one matrix; kinds: tensors of a GGUF file by type; report: each way of merging on the run's rows;
    recommended: which of them to take, in words; verification: what opened it, and how it compared."""

    to: str
    out: str
    files: list[str] = field(default_factory=list)
    size_bytes: int = 0
    dtype: str | None = None
    base: str | None = None
    tied: bool | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    recommended: Measured | None = None
    recommendation: str | None = None
    verification: list[Verification] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: report is a list of choices, recommended one of them or null, verification a list."""
        plain = ("to", "out", "files", "size_bytes", "dtype", "base", "tied", "kinds", "recommendation", "notes")
        return {
            **{key: getattr(self, key) for key in plain},
            "report": [one.to_json() for one in self.measured],
            "recommended": None if self.recommended is None else self.recommended.to_json(),
            "verification": [one.to_json() for one in self.verification],
        }


@dataclass(frozen=True)
class _Job:
    """All that the writers need. stage: the empty folder to write into."""

    subject: Subject
    report: ExportReport
    stage: Path
    file: str
    examples: list[Example]
    reference: Reference | None
    original: Loaded | None
    progress: Progress | None


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
    _check(to, dtype, base)
    folder = _new_folder(out)
    subject = open_subject(target, base_model=base_model, offline=offline, progress=progress)
    if to in ADAPTER_FORMS and subject.adapter is None:
        raise ConfigError(f"--to {to} writes an adapter; {target} has none. Try --to merged or --to gguf.")
    compares = to in MERGED_FORMS or verify
    examples = rows_of(subject, data, rows) if rows and compares else []
    if verify and not examples:
        raise ConfigError("--verify compares on rows; there are none. Give --data FILE, and --rows above 0.")
    original = load_original(subject, progress) if to in MERGED_FORMS and (base == ORIGINAL or examples) else None
    reference = reference_of(subject.model, examples) if examples else None
    report = ExportReport(to, str(folder))
    try:
        with publish(folder) as stage:
            file = f"{_file_name(subject.name)}-{(dtype or 'f16') if to == 'gguf' else 'adapter'}.gguf"
            job = _Job(subject, report, stage, file, examples, reference, original, progress)
            _write(job, to, dtype, base or DEQUANTIZED, verify)
    except (OSError, SafetensorError, AdapterError) as error:
        reason = _refused(error)
        if reason is None:
            raise
        raise PreflightError(f"{folder} could not be written: {reason}. Check the disk's free space.") from error
    report.notes = [*subject.notes, *report.notes]
    return report


def _refused(error: Exception) -> str | None:
    """What the disk said, where it refused what was written; None for an error of another kind."""
    if isinstance(error, AdapterError):  # of an adapter that could not be saved
        return _refused(error.__cause__) if isinstance(error.__cause__, OSError | SafetensorError) else None
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def _check_space(folder: Path, merge: Merge, kind: str) -> None:
    """Raise PreflightError where the weights alone would fill the disk."""
    needed, free = size_of(merge, kind), shutil.disk_usage(folder).free
    if needed > free:
        raise PreflightError(
            f"{folder} must have room for the weights: {size_text(needed)} in {kind}; {size_text(free)} are free. "
            "Free some space, or choose another --out or a smaller --dtype."
        )


def _write(job: _Job, to: str, dtype: str | None, base: str, verify: bool) -> None:
    license_name = license_of(job.subject)
    checked: Callable[[], Sequence[Verification]]
    if to in MERGED_FORMS:
        merge = merge_of(job.subject.model, job.original, base)
        kind = dtype or (default_kind(merge) if to == "merged" else "f16")
        job.report.dtype, job.report.base, job.report.tied = kind, base, merge.tied
        _check_space(Path(job.report.out).parent, merge, kind)
        if merge.untied:
            job.report.notes.append("The adapter made head and embedding differ: both are written, untied.")
        checked = _write_merged(job, merge, kind) if to == "merged" else _write_gguf(job, merge, kind, license_name)
    else:
        checked = _write_adapter(job, to)
    if verify:
        job.report.verification = list(checked())
        _demand_passed(job.report.verification)
    files = sorted(str(path.relative_to(job.stage)) for path in job.stage.rglob("*") if path.is_file())
    write_card(
        job.stage, job.subject, to, files, license_name=license_name, measured=job.report.measured,
        recommendation=job.report.recommendation, notes=job.report.notes,
    )  # fmt: skip
    job.report.files = [*files, "README.md"]
    job.report.size_bytes = sum((job.stage / name).stat().st_size for name in job.report.files)


def _compare(job: _Job, kind: str) -> None:
    """Fill in the report's choices and recommendation where there are rows."""
    if job.reference is None:
        return
    report, is_gguf, base = job.report, job.report.to == "gguf", job.report.base or DEQUANTIZED
    choices = choices_for(kind, "f16" if is_gguf else "bf16", has_original=job.original is not None)
    report.measured = measure(job.reference, job.subject.model, job.original, choices, job.progress)
    kinds = (*forms.GGUF_KINDS, AS_IS) if is_gguf else forms.MERGED_KINDS
    report.recommended, report.recommendation = recommend(report.measured, kinds, base)
    as_written = Choice(base if job.original is not None else DEQUANTIZED, kind)
    told = warning(next(one for one in report.measured if one.choice == as_written))
    report.notes += [told] if told else []


def _write_merged(job: _Job, merge: Merge, kind: str) -> Callable[[], Sequence[Verification]]:
    check_kind(merge, kind)
    _compare(job, kind)
    write_merged(job.stage, merge, job.subject.tokenizer, kind, progress=job.progress)

    def check() -> Sequence[Verification]:
        assert job.reference is not None
        expected = merged_reference(job.reference, merge, storing(merge, kind), plain_kind(kind))
        return [verify_merged(job.stage, expected, kind), *_check_merge(job, merge)]

    return check


def _write_gguf(job: _Job, merge: Merge, kind: str, license_name: str | None) -> Callable[[], Sequence[Verification]]:
    subject, path = job.subject, job.stage / job.file
    settings = gguf_settings(subject.model)
    entries = plan_entries(merge, settings.architecture, kind)
    job.report.notes += [*settings.notes, *fallbacks(entries, merge, kind)]
    job.report.kinds = file_kinds(entries)
    stops = sorted(_stops(subject))
    base_file = subject.source.path if subject.source.path.is_file() else None
    if base_file is not None:
        vocabulary = copied_vocabulary(base_file)
    else:
        others = [token for token in stops if token != subject.tokenizer.eos_token_id]
        rows = merge.layers[merge.embedding].matrix.shape[0]
        vocabulary = gguf_vocabulary(subject.tokenizer, rows, others[0] if others else None)
    _compare(job, kind)
    general = general_keys(kind, subject.name, subject.base_name, license_name, base_file)
    write_model(path, merge, entries, settings, general, vocabulary, progress=job.progress)
    check_vocabulary(path, subject.tokenizer, [str(subject.tokenizer.decode(example.ids)) for example in job.examples])
    _write_modelfile(job, stops, job.file, None)

    def check() -> Sequence[Verification]:
        assert job.reference is not None
        expected = merged_reference(job.reference, merge, storing(merge, kind), "f32")
        return [*verify_gguf(path, subject, expected, job.examples), *_check_merge(job, merge)]

    return check


def _check_merge(job: _Job, merge: Merge) -> list[Verification]:
    """Merged into the weights it was trained on, the merge must compute what was trained; into others it does not."""
    assert job.reference is not None
    into_original = job.report.base == ORIGINAL and job.original is not None
    return [] if into_original else [verify_merge(job.reference, merge)]


def _write_adapter(job: _Job, to: str) -> Callable[[], Sequence[Verification]]:
    subject, stage = job.subject, job.stage
    if subject.base_note is not None:
        job.report.notes.append(subject.base_note)
    if to == "peft":
        scratch = stage / "adapter"
        save_adapter(subject.model, scratch, base_name=_loadable_base(subject))
        for path in scratch.iterdir():
            path.rename(stage / path.name)
        scratch.rmdir()
    elif to == "mlx":
        job.report.notes += write_mlx(stage, subject.model, _loadable_base(subject))
    else:
        general = {"general.name": subject.name, "general.base_model.count": 1, "general.base_model.0.name": subject.base_name}
        job.report.notes += write_adapter(stage / job.file, subject.model, general)
        base_file = subject.source.path.name if subject.source.path.is_file() else "BASE.gguf"
        _write_modelfile(job, sorted(_stops(subject)), base_file, job.file)

    def check() -> Sequence[Verification]:
        assert job.reference is not None
        if to == "gguf-adapter":
            return verify_gguf_adapter(stage / job.file, subject, job.reference, job.examples)
        return [verify_peft(stage, subject, job.reference)]

    return check


def _write_modelfile(job: _Job, stops: Sequence[int], weights: str, adapter: str | None) -> None:
    tokens = [str(job.subject.tokenizer.convert_ids_to_tokens(token)) for token in stops]
    text, note = modelfile(weights, job.subject.tokenizer, tokens, adapter=adapter)
    (job.stage / MODELFILE).write_text(text, encoding="utf-8")
    if note is not None:
        job.report.notes.append(note)


def _stops(subject: Subject) -> frozenset[int]:
    return end_tokens(subject.model, subject.tokenizer, Renderer(subject.tokenizer, max_length=64))


def _loadable_base(subject: Subject) -> str:
    """The name under which PEFT and mlx-lm find the base: the hub's, or where a local model stands."""
    return subject.base_name if subject.source.kind in ("hub", "alias") else str(subject.source.path)


def _demand_passed(verification: Sequence[Verification]) -> None:
    for one in verification:
        if not one.passed:
            difference = one.difference
            raise NumericError(
                f"an export must compute what was trained ({one.bound}); {one.by} against {one.against}: largest difference "
                f"of logits {difference.largest_logits_error:.2g}, loss {difference.loss:.5g} against "
                f"{difference.loss_reference:.5g}, equal answers {one.equal_answers}. Nothing was written."
            )


def _check(to: str, dtype: str | None, base: str | None) -> None:
    if to not in FORMS:
        raise ConfigError(f"--to is one of {', '.join(FORMS)}; got {to!r}.{nearest(to, FORMS)}")
    if to in ADAPTER_FORMS and (dtype is not None or base is not None):
        raise ConfigError(f"--dtype and --base say how weights are merged; --to {to} merges none. Leave them out.")
    if base is not None and base not in BASES:
        raise ConfigError(f"--base is one of {', '.join(BASES)}; got {base!r}.{nearest(base, BASES)}")
    kinds = forms.MERGED_KINDS if to == "merged" else (*forms.GGUF_KINDS, AS_IS)
    if dtype is not None and dtype not in kinds:
        raise ConfigError(f"--dtype with --to {to} is one of {', '.join(kinds)}; got {dtype!r}.{nearest(dtype, kinds)}")


def _new_folder(out: str | Path) -> Path:
    folder = Path(out).expanduser().absolute()
    if folder.exists():
        raise ConfigError(f"an export goes to a new folder; {folder} exists. Choose another --out, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"{folder.parent} must be a folder that can be written to; {error.strerror}.") from error
    return folder


def _file_name(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name).strip(".") or "model"
