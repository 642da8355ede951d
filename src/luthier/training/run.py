"""One run from its configuration to its finished directory, and going on with one that was interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from luthier.adapters import Start
from luthier.config import RunConfig, make_config
from luthier.disk import flush
from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.notices import heard_by
from luthier.training import rundir
from luthier.training.checkpoint import Checkpoint, read_newest, remove_staging
from luthier.training.environment import describe_environment, numeric_differences
from luthier.training.evaluations import Evaluations
from luthier.training.events import Listener
from luthier.training.files import MANIFEST, explain_write_error
from luthier.training.finish import finish
from luthier.training.frozen_cache import remove_frozen
from luthier.training.initial import read_start, write_start
from luthier.training.interrupts import Interrupts
from luthier.training.loop import Job, train_loop
from luthier.training.memory import (
    explain_out_of_memory,
    explain_out_of_memory_loading,
    explain_out_of_memory_resumed,
    is_out_of_memory,
)
from luthier.training.notes import Notes
from luthier.training.optimizer import Optimizer, check_optimizer, flushed_denormals
from luthier.training.plan import Plan, make_plan
from luthier.training.prepare import (
    RunData,
    RunModel,
    check_data_is_there,
    identity_of,
    read_data,
    read_model,
    with_absolute_paths,
)
from luthier.training.recompute import set_recomputed
from luthier.training.reserve import reopen, reserve, reserve_default
from luthier.training.result import RunResult
from luthier.training.run_index import changed_files
from luthier.training.rundir import RunDir
from luthier.training.state import Identity

__all__ = ["RunResult", "resume", "train"]


def train(config: RunConfig, *, listener: Listener | None = None, overwrite: bool = False) -> RunResult:
    """Fine-tune a model as `config` says and write the run directory.

    Cheap checks come first: the data is there, the directory can be written; then the data, the plan, the model. Ctrl-C or
    SIGTERM saves and raises Interrupted. overwrite: a run already in `config.out` is replaced once this one is ready.
    Raises ConfigError, DataError, ModelError, AdapterError, PreflightError, NumericError, CheckpointError.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    config = with_absolute_paths(config)
    check_data_is_there(config)
    check_optimizer(config)
    with _reserve(config, overwrite) as run:
        config = config.model_copy(update={"out": str(run.path)})
        data = read_data(config, listener)
        plan = make_plan(config, data, listener)
        plan.require_fit()
        listener.note(plan.line())
        config = plan.applied(config)
        with _memory_explained(lambda: explain_out_of_memory_loading(config)):
            prepared = read_model(config, data, listener, moments_bytes=plan.moments_bytes)
        with (
            _memory_explained(lambda: explain_out_of_memory(config, data.longest)),
            _running(Notes(run, listener)) as interrupts,
        ):
            job = _new_job(run, prepared, data, listener, interrupts)
            set_recomputed(prepared.model, plan.recompute_layers, first=prepared.frozen_layers)
            if overwrite:
                run.clear()
            _write_beginning(job, plan)
            return _carry_out(job, started)


def _reserve(config: RunConfig, overwrite: bool) -> RunDir:
    if config.out is None:
        return reserve_default(config.data)
    path = Path(config.out).expanduser()
    if overwrite:
        _check_reads_nothing_in(path, config)
    return reserve(path, overwrite=overwrite)


def _check_reads_nothing_in(out: Path, config: RunConfig) -> None:
    """Raise ConfigError if data or model lie in the run directory, where `overwrite` would delete them."""
    out = out.resolve()
    for key, name in (("data", config.data), ("eval_data", config.eval_data), ("model", config.model)):
        path = Path(name).expanduser() if name else None
        if path is not None and path.exists() and path.resolve().is_relative_to(out):
            raise ConfigError(f"a run must not write where it reads; {key} {name} lies in {out}. Choose another --out.")


def resume(run_dir: Path | str, *, listener: Listener | None = None, weights_only: bool = False) -> RunResult:
    """Go on with a run from its newest whole checkpoint; the result is, bit for bit, that of a run never interrupted.

    A finished run is given back as it is. weights_only: go on with a fresh optimiser where its state is lost.
    Raises CheckpointError where there is no whole checkpoint, or configuration, data or base model have changed.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    path = Path(run_dir).expanduser()
    if rundir.is_finished(path):
        return _finished(path, listener)
    with reopen(path) as run:
        notes = Notes(run, listener)
        config = make_config(rundir.read_config(path))
        run.remove_leftovers()
        remove_staging(run.checkpoints)
        checkpoint = read_newest(run.checkpoints, weights_only=weights_only, note=notes.add)
        data = _read_data_again(config, checkpoint.identity, listener)
        prepared, plan = _prepare_again(path, config, data, checkpoint.identity, listener)
        with (
            _memory_explained(lambda: explain_out_of_memory_resumed(path / rundir.CONFIG, plan.recompute_layers, plan.layers)),
            _running(notes) as interrupts,
        ):
            job = _new_job(run, prepared, data, listener, interrupts)
            set_recomputed(prepared.model, plan.recompute_layers, first=prepared.frozen_layers)
            _restore(job, checkpoint, notes)
            _note_other_machine(path, notes)
            if weights_only:
                notes.add(f"going on from the weights of step {job.state.step} with a fresh optimiser.")
            return _carry_out(job, started)


def _read_data_again(config: RunConfig, identity: Identity, listener: Listener) -> RunData:
    """The data of a run that goes on. Raises CheckpointError where they or the configuration have changed."""
    identity.refuse_other_config(config.model_dump(mode="json"))
    check_data_is_there(config)
    check_optimizer(config)
    data = read_data(config, listener)
    held_out = data.held_out.manifest["sha256"] if data.held_out else None
    identity.refuse_other_data(data.train.manifest["sha256"], held_out)
    return data


def _prepare_again(
    path: Path, config: RunConfig, data: RunData, identity: Identity, listener: Listener
) -> tuple[RunModel, Plan]:
    """The model of a run that goes on, as it was before its first step, and what the plan says for this machine now."""
    start = read_start(path / rundir.INITIAL, identity.initial_sha256) if identity.initial_sha256 else None
    plan = make_plan(config, data, listener, started=start is not None)
    _require_fit_resumed(plan, path)
    listener.note(plan.line())
    with _memory_explained(lambda: explain_out_of_memory_loading(config)):
        prepared = read_model(config, data, listener, refuse_base=identity.refuse_other_base, start=start)
    prepared.start = None
    return prepared, plan


def _finished(path: Path, listener: Listener) -> RunResult:
    """The result of a run that came to its end; files that are not as it wrote them are named."""
    again = f"To write the results again from the last checkpoint, delete {path / MANIFEST} and resume the run."
    try:
        for name in changed_files(path):
            listener.note(f"{path / name} is not as the run wrote it. {again}")
    except ValueError as error:
        listener.note(f"{path}: {error}, so that its files cannot be checked. {again}")
    listener.note(f"{path} is finished; there is nothing to do.")
    try:
        return RunResult.from_file(path / rundir.RESULT)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {again}") from error


def _require_fit_resumed(plan: Plan, path: Path) -> None:
    """As `Plan.require_fit`, saying what can be done in a run that goes on: its settings are those it began with."""
    try:
        plan.require_fit()
    except PreflightError as error:
        raise PreflightError(
            f"{error}\nThat is for a new run. To go on with this one, close other programs or free some disk; "
            f"or change memory, recompute_layers or keep_checkpoints, and nothing else, in {path / rundir.CONFIG}."
        ) from error


def _note_other_machine(path: Path, notes: Notes) -> None:
    """Say what is no longer as it was when the run began and decides the last bits of its numbers."""
    differences = numeric_differences(rundir.read_json(path / rundir.ENVIRONMENT), describe_environment())
    if differences:
        notes.add(
            f"the run goes on under other conditions than it began under ({'; '.join(differences)}): its result may differ "
            "in the last bits from that of a run never interrupted."
        )


@contextlib.contextmanager
def _memory_explained(explain: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation into a PreflightError with what explain() says."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(explain()) from error


@contextlib.contextmanager
def _running(notes: Notes) -> Iterator[Interrupts]:
    """What holds while a job runs: signals and notices are heard, denormals flushed, the caller's random numbers left alone."""
    with (
        Interrupts() as interrupts,
        heard_by(notes.add),
        flushed_denormals() as flushed,
        torch.random.fork_rng(devices=[]),
    ):
        if not flushed:
            notes.add("this processor cannot flush denormal numbers; steps may get slower late in a long run.")
        yield interrupts


def _new_job(run: RunDir, prepared: RunModel, data: RunData, listener: Listener, interrupts: Interrupts) -> Job:
    config = prepared.config
    evaluations = Evaluations(
        run, config, prepared.model, prepared.tokenizer, data.renderer, data.held_out, listener, interrupts
    )
    optimizer = Optimizer(prepared.trainable, config)
    return Job(run, prepared, data, identity_of(prepared, data), optimizer, evaluations, listener, interrupts)


def _write_beginning(job: Job, plan: Plan) -> None:
    """The files that say what the run is; the configuration last, since it is what makes a folder a run."""
    run = job.run
    run.write_json(rundir.ENVIRONMENT, {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **describe_environment()})
    run.write_json(rundir.DATA_MANIFEST, job.data.manifest())
    run.write_json(rundir.SAMPLES, [])
    run.write_json(rundir.PLAN, plan.to_json())
    if job.prepared.start is not None:
        _write_start(run, job.prepared.start)
        job.prepared.start = None
    run.write_config(job.prepared.config.model_dump(mode="json"))


def _write_start(run: RunDir, start: Start) -> None:
    """Keep what the terms start from, which a run that goes on needs. Raises CheckpointError if the disk refuses."""
    path = run.path / rundir.INITIAL
    try:
        write_start(path, start)
        flush(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain_write_error(error, path)) from error


@torch.no_grad()
def _restore(job: Job, checkpoint: Checkpoint, notes: Notes) -> None:
    """Put weights, optimiser, position and the metrics up to there back."""
    own = dict(job.prepared.trainable)
    if own.keys() != checkpoint.weights.keys():
        other = sorted(own.keys() ^ checkpoint.weights.keys())
        raise CheckpointError(
            f"a checkpoint holds the run's trainable weights; {checkpoint.path} differs in {', '.join(other[:5])}."
        )
    for name, parameter in own.items():
        parameter.copy_(checkpoint.weights[name])
    job.optimizer.load_state(checkpoint.optimizer)
    job.state, job.saved_step = checkpoint.state, checkpoint.state.step
    kept = job.run.rewind_metrics(job.state.step)
    job.evaluations.records = {record["step"]: record for record in kept if record.get("kind") == "eval"}
    if job.data.held_out is not None and job.state.step > 0 and 0 not in job.evaluations.records:
        notes.add(f"{rundir.METRICS} has lost the evaluation before training; the result has none.")


def _carry_out(job: Job, started: float) -> RunResult:
    """Train, then write everything a finished run has."""
    prepared = job.prepared
    job.listener.start({
        "run_dir": str(job.run.path), "model": prepared.config.model, "method": prepared.config.method,
        "total_steps": job.total_steps, "first_step": job.state.step + 1,
        "trainable_parameters": prepared.trainable_parameters, "total_parameters": prepared.total_parameters,
        "rows": len(job.data.train.examples), "eval_rows": len(job.data.held_out.examples) if job.data.held_out else 0,
        "batch_size": prepared.config.batch_size, "learning_rate": prepared.schedule.peak,
        "config": prepared.config.model_dump(mode="json"),
    })  # fmt: skip
    train_loop(job)
    if job.frozen is not None:
        job.frozen.close()
    remove_frozen(job.run.path / rundir.FROZEN)
    return finish(job, started)
