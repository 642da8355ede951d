"""What `luthier eval` does once its flags are read: load one model after the other and measure each on every set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.adapters import disabled
from luthier.config import Storage, make_config
from luthier.data import Dataset, Renderer, RowCache, kept_examples, overlap
from luthier.data.read import open_source
from luthier.errors import ConfigError, DataError
from luthier.evaluation import text_metrics
from luthier.evaluation.compare import SetReport, check_same_rows, metrics_for, report_on
from luthier.evaluation.constrain import check_files, read_schema
from luthier.evaluation.evaluate import evaluate
from luthier.evaluation.labels import labels_of_file, read_labels
from luthier.evaluation.measures import WRITTEN
from luthier.evaluation.preflight import check_set
from luthier.evaluation.result import EvalResult
from luthier.evaluation.sets import EvalSet, NamedFile, load_set, parse_files
from luthier.progress import Progress
from luthier.training.load_run import Target, find_target, load_base, load_target
from luthier.training.rundir import read_config

MAX_LENGTH = 1024


@dataclass(frozen=True)
class Request:
    """The flags of `luthier eval`, checked one by one. vs_base: measure the base too, as --guard asks for as well."""

    target: str
    adapter: str | None
    vs: str | None
    vs_base: bool
    storage: Storage | None
    data: list[str]
    guards: list[str]
    metrics: tuple[str, ...] | None
    labels: str | None
    json_schema: str | None
    max_length: int | None
    on_long: Literal["error", "drop", "truncate"]
    max_new_tokens: int
    rows: int | None
    data_cache: bool
    offline: bool


@dataclass
class Comparison:
    """A report on each set, each set's file, and what a person should be told of the models."""

    reports: list[SetReport]
    paths: dict[str, str]
    notes: list[str]


def compare(request: Request, progress: Progress) -> Comparison:
    """Measure the target on every set, then what it is compared with; one model is held at a time."""
    files = parse_files(request.data, request.guards)
    text_metrics.require(request.metrics or ())
    if request.labels is not None:
        read_labels(request.labels)
    check_files(json_schema=request.json_schema)
    for file in files:
        open_source(file.path, offline=request.offline)
    if request.vs is not None:
        find_target(request.vs, offline=request.offline, progress=progress)
    loaded = load_target(
        request.target, adapter=request.adapter, base=request.storage, offline=request.offline, progress=progress
    )
    if request.vs_base and loaded.adapter is None and loaded.run_dir is None:
        flag = "--guard" if request.guards else "--vs-base"
        raise ConfigError(f"{flag} compares a tuned model with its base; {request.target} is not tuned. Add --adapter DIR.")
    view, notes = _view(loaded, request), list(loaded.notes)
    sets = _load_sets(files, loaded, view, request, notes)
    asked = metrics_for(sets, request.metrics)
    _add_labels(sets, asked, view.renderer(loaded.tokenizer), request)
    _add_schema(sets, asked, request)
    for one, metrics in zip(sets, asked, strict=True):
        check_set(loaded.model, one, metrics, request.rows)
    tuned = _measure("model", loaded, view, sets, asked, request, progress)
    notes += _overlaps(loaded, sets, request)
    paths = {one.name: one.path for one in files}
    others, same = _measure_other(loaded, view, files, sets, asked, request, progress, notes)
    reports = [report_on(one, result, other, same_tokens=same) for one, result, other in zip(sets, tuned, others, strict=True)]
    for report, one in zip(reports, sets, strict=True):
        report.notes += one.dataset.manifest["notes"]
    return Comparison(reports, paths, notes)


@dataclass(frozen=True)
class _View:
    """How rows are looked at: as the run of the target saw them in training, where it is of a run.

    data_cache: rows that were rendered before are taken from the cache, and kept there otherwise.
    """

    max_length: int
    loss_on: Literal["assistant", "all"]
    data_cache: bool
    offline: bool

    def renderer(self, tokenizer: Any) -> Renderer:
        return Renderer(tokenizer, max_length=self.max_length, loss_on=self.loss_on)


def _view(loaded: Target, request: Request) -> _View:
    config = None if loaded.run_dir is None else make_config(read_config(loaded.run_dir))
    longest = request.max_length or (config.max_length if config else MAX_LENGTH)
    offline = request.offline or (config is not None and config.offline)
    data_cache = request.data_cache and (config is None or config.data_cache)
    return _View(longest, config.loss_on if config else "assistant", data_cache, offline)


def _load_sets(files: Sequence[NamedFile], loaded: Target, view: _View, request: Request, notes: list[str]) -> list[EvalSet]:
    """Every set, rendered for the model in `loaded`; `notes` takes what the cache of rows has to say."""
    renderer, cache = view.renderer(loaded.tokenizer), RowCache(notes.append) if view.data_cache else None
    return [load_set(file, renderer, on_long=request.on_long, offline=view.offline, cache=cache) for file in files]


def _overlaps(loaded: Target, sets: Sequence[EvalSet], request: Request) -> list[str]:
    """What to say of sets whose rows the run was trained on too, as far as the cache still holds those it was trained on."""
    if loaded.run_dir is None:
        return []
    config = make_config(read_config(loaded.run_dir))
    renderer = Renderer(loaded.tokenizer, max_length=config.max_length, loss_on=config.loss_on)
    notes: list[str] = []
    try:
        train = kept_examples(config.data, renderer, on_long=config.on_long, cache=RowCache(notes.append), offline=True)
    except DataError:  # the file it was trained on is gone: there is nothing to compare with
        train = None
    for one in sets:
        rows = one.dataset.examples[: request.rows]
        if train is not None and (shared := overlap(train, Dataset(rows, {}))):
            notes.append(
                f"{shared} of {len(rows)} rows of {one.name} are also in the training data: their score says how well the "
                "model remembers, not how well it generalises."
            )
    return notes


def _add_labels(sets: Sequence[EvalSet], asked: Sequence[tuple[str, ...]], renderer: Renderer, request: Request) -> None:
    """Put the labels of --labels on the sets that choose among labels. Raises ConfigError if none does."""
    if request.labels is None:
        return
    choosing = [one for one, metrics in zip(sets, asked, strict=True) if "label" in metrics]
    if not choosing:
        raise ConfigError("--labels says what label accuracy chooses from, which is not asked for. Add --metrics label.")
    labels = labels_of_file(request.labels, renderer)
    for one in choosing:
        one.extras.labels = labels


def _add_schema(sets: Sequence[EvalSet], asked: Sequence[tuple[str, ...]], request: Request) -> None:
    """Put the schema of --json-schema on the sets whose answers are written. Raises ConfigError if none is."""
    if request.json_schema is None:
        return
    writing = [one for one, metrics in zip(sets, asked, strict=True) if set(WRITTEN) & set(metrics)]
    if not writing:
        raise ConfigError(
            f"--json-schema says what the model may write, and no metric looks at that. Add one of {', '.join(WRITTEN)} to "
            "--metrics."
        )
    schema = read_schema(request.json_schema)
    for one in writing:
        one.extras.schema = schema


def _measure(
    label: str,
    measured: Target,
    view: _View,
    sets: Sequence[EvalSet],
    asked: Sequence[tuple[str, ...]],
    request: Request,
    progress: Progress,
) -> list[EvalResult]:
    renderer, results = view.renderer(measured.tokenizer), []
    for one, metrics in zip(sets, asked, strict=True):
        name = f"{label} on {one.name}" if len(sets) > 1 else label

        def tell(stage: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}, {stage}", done, total)

        results.append(
            evaluate(
                measured.model, measured.tokenizer, one.dataset, renderer, metrics=metrics, rows=request.rows,
                max_new_tokens=request.max_new_tokens, extras=one.extras, progress=tell,
            )
        )  # fmt: skip
    return results


def _measure_other(
    loaded: Target,
    view: _View,
    files: Sequence[NamedFile],
    sets: Sequence[EvalSet],
    asked: Sequence[tuple[str, ...]],
    request: Request,
    progress: Progress,
    notes: list[str],
) -> tuple[Sequence[EvalResult | None], bool]:
    """The results of the base or of --vs on the same rows, None each without either; and whether its tokens are the same."""
    if request.vs_base and loaded.adapter is not None:
        with disabled(loaded.model):
            return _measure("base", loaded, view, sets, asked, request, progress), True
    if request.vs_base:
        other = load_base(loaded, base=request.storage, offline=request.offline, progress=progress)
        notes += [f"of the base: {note}" for note in other.notes]
        return _measure("base", other, view, sets, asked, request, progress), True
    if request.vs is None:
        return [None] * len(sets), True
    loaded.model = None
    other = load_target(request.vs, base=request.storage, offline=request.offline, progress=progress)
    notes += [f"of {request.vs}: {note}" for note in other.notes]
    theirs = _load_sets(files, other, view, request, notes)
    _add_labels(theirs, asked, view.renderer(other.tokenizer), request)
    _add_schema(theirs, asked, request)
    same = True
    for one, their in zip(sets, theirs, strict=True):
        ours, others = one.dataset.examples[: request.rows], their.dataset.examples[: request.rows]
        check_same_rows(one.name, ours, others)
        same = same and all(
            first.ids == second.ids and first.supervised == second.supervised
            for first, second in zip(ours, others, strict=True)
        )
    return _measure(request.vs, other, view, theirs, asked, request, progress), same
