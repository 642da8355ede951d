"""The five forms: each writes its files into the job's folder and returns what checks them."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.adapters import save_adapter
from luthier.export.choices import plain_kind, storing
from luthier.export.compare import merged_reference
from luthier.export.gguf_adapter import write_adapter
from luthier.export.gguf_model import fallbacks, file_kinds, general_keys, plan_entries, write_model
from luthier.export.gguf_settings import gguf_settings
from luthier.export.gguf_vocabulary import check_vocabulary, copied_vocabulary, gguf_vocabulary
from luthier.export.job import Check, Job, check_merge, compare_choices
from luthier.export.merge import Merge
from luthier.export.merged_folder import check_kind, write_merged
from luthier.export.mlx import write_mlx
from luthier.export.modelfile import modelfile
from luthier.export.subject import Subject
from luthier.export.verification import Verification
from luthier.export.verify import verify_gguf, verify_gguf_adapter, verify_merged, verify_mlx, verify_peft

MODELFILE = "Modelfile"


def write_folder(job: Job, merge: Merge, kind: str) -> Check:
    """A Transformers folder."""
    check_kind(merge, kind)
    compare_choices(job, kind)
    write_merged(job.stage, merge, job.subject.tokenizer, kind, progress=job.progress)

    def check() -> Sequence[Verification]:
        expected = merged_reference(job.needed_reference(), merge, storing(merge, kind), plain_kind(kind))
        return [verify_merged(job.stage, expected, kind), *check_merge(job, merge)]

    return check


def write_gguf(job: Job, merge: Merge, kind: str, license_name: str | None) -> Check:
    """A GGUF file of the merged model and a Modelfile."""
    subject, path = job.subject, job.stage / job.file
    settings = gguf_settings(subject.model)
    entries = plan_entries(merge, settings.architecture, kind)
    job.report.notes += [*settings.notes, *fallbacks(entries, merge, kind)]
    job.report.kinds = file_kinds(entries)
    stops, vocabulary = job.stops, _vocabulary(job, merge)
    compare_choices(job, kind)
    general = general_keys(kind, subject.name, subject.public_base_name, license_name, job.base_file)
    write_model(path, merge, entries, settings, general, vocabulary, progress=job.progress)
    check_vocabulary(path, subject.tokenizer, [str(subject.tokenizer.decode(example.ids)) for example in job.examples])
    _write_modelfile(job, stops, job.file, None)

    def check() -> Sequence[Verification]:
        expected = merged_reference(job.needed_reference(), merge, storing(merge, kind), "f32")
        return [*verify_gguf(path, subject, expected, job.examples), *check_merge(job, merge)]

    return check


def write_peft(job: Job) -> Check:
    """The adapter in PEFT's layout."""
    scratch = job.stage / "adapter"
    save_adapter(job.subject.model, scratch, base_name=_loadable_base(job.subject))
    for path in scratch.iterdir():
        path.rename(job.stage / path.name)
    scratch.rmdir()
    return lambda: [verify_peft(job.stage, job.subject, job.needed_reference())]


def write_mlx_adapter(job: Job) -> Check:
    """The adapter in mlx-lm's layout."""
    job.report.notes += write_mlx(job.stage, job.subject.model, _loadable_base(job.subject))
    return lambda: [verify_mlx(job.stage, job.subject, job.needed_reference())]


def write_gguf_adapter(job: Job) -> Check:
    """The adapter as a GGUF file and a Modelfile that puts it on the base."""
    subject, path = job.subject, job.stage / job.file
    general = {"general.name": subject.name, "general.base_model.count": 1}
    general["general.base_model.0.name"] = subject.public_base_name
    job.report.notes += write_adapter(path, subject.model, general)
    _write_modelfile(job, job.stops, job.base_file.name if job.base_file is not None else "BASE.gguf", job.file)
    return lambda: verify_gguf_adapter(path, subject, job.needed_reference(), job.examples)


ADAPTER_WRITERS = {"peft": write_peft, "mlx": write_mlx_adapter, "gguf-adapter": write_gguf_adapter}


def _vocabulary(job: Job, merge: Merge) -> dict[str, object]:
    """The tokenizer.* keys: those of the base's own GGUF file, or made of the tokenizer."""
    if job.base_file is not None:
        return copied_vocabulary(job.base_file)
    tokenizer = job.subject.tokenizer
    others = [token for token in job.stops if token != tokenizer.eos_token_id]
    rows = merge.layers[merge.embedding].matrix.shape[0]
    return gguf_vocabulary(tokenizer, rows, others[0] if others else None)


def _write_modelfile(job: Job, stops: Sequence[int], weights: str, adapter: str | None) -> None:
    tokens = [str(job.subject.tokenizer.convert_ids_to_tokens(token)) for token in stops]
    text, note = modelfile(weights, job.subject.tokenizer, tokens, adapter=adapter)
    (job.stage / MODELFILE).write_text(text, encoding="utf-8")
    if note is not None:
        job.report.notes.append(note)


def _loadable_base(subject: Subject) -> str:
    """The name under which PEFT and mlx-lm find the base: the hub's, or where a local model stands."""
    return subject.base_name if subject.source.kind in ("hub", "alias") else str(subject.source.path)
