"""One run from its configuration to its finished directory, and going on with one that was interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from luthier.adapters import save_adapter, save_full
from luthier.config import RunConfig, make_config
from luthier.errors import CheckpointError, ConfigError, PreflightError
from luthier.training import rundir
from luthier.training.checkpoint import Checkpoint, read_newest, remove_staging
from luthier.training.environment import describe_environment
from luthier.training.evaluations import Evaluations
from luthier.training.events import Listener
from luthier.training.files import explain_write_error
from luthier.training.interrupts import Interrupts
from luthier.training.loop import Job, train_loop
from luthier.training.memory import explain_out_of_memory, is_out_of_memory, peak_rss_bytes
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
from luthier.training.report import write_report
from luthier.training.result import RunResult
from luthier.training.rundir import RunDir

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
    path = Path(config.out).expanduser() if config.out else rundir.default_run_dir(config.data)
    if overwrite:
        _check_reads_nothing_in(path, config)
    with rundir.reserve(path, overwrite=overwrite) as run:
        try:
            config = config.model_copy(update={"out": str(run.path)})
            data = read_data(config, listener)
            plan = _planned(config, data, listener)
            prepared = read_model(plan.applied(config), data, listener)
            if overwrite:
                run.clear()
        except BaseException:
            run.remove_if_unused()
            raise
        with _running(prepared, data, listener) as interrupts:
            job = _new_job(run, prepared, data, listener, interrupts)
            set_recomputed(prepared.model, plan.recompute_layers)
            _write_beginning(job, plan)
            return _carry_out(job, started)


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
        for name in rundir.changed_files(path):
            listener.note(f"{path / name} is not as the run wrote it.")
        listener.note(f"{path} is finished; there is nothing to do.")
        return RunResult.from_file(path / rundir.RESULT)
    with rundir.reopen(path) as run:
        config = make_config(rundir.read_config(path))
        run.remove_leftovers()
        remove_staging(run.checkpoints)
        checkpoint = read_newest(run.checkpoints, weights_only=weights_only, note=listener.note)
        checkpoint.identity.refuse_other_config(config.model_dump(mode="json"))
        check_data_is_there(config)
        check_optimizer(config)
        data = read_data(config, listener)
        held_out = data.held_out.manifest["sha256"] if data.held_out else None
        checkpoint.identity.refuse_other_data(data.train.manifest["sha256"], held_out)
        plan = _planned(config, data, listener)
        prepared = read_model(config, data, listener, checkpoint.identity.refuse_other_base)
        with _running(prepared, data, listener) as interrupts:
            job = _new_job(run, prepared, data, listener, interrupts)
            set_recomputed(prepared.model, plan.recompute_layers)
            _restore(job, checkpoint)
            if weights_only:
                listener.note(f"going on from the weights of step {job.state.step} with a fresh optimiser.")
            return _carry_out(job, started)


def _planned(config: RunConfig, data: RunData, listener: Listener) -> Plan:
    """The plan of the run, told in one line. Raises PreflightError, naming settings that fit, where it does not fit."""
    plan = make_plan(config, data, listener)
    plan.require_fit()
    listener.note(plan.line())
    return plan


@contextlib.contextmanager
def _running(prepared: RunModel, data: RunData, listener: Listener) -> Iterator[Interrupts]:
    """What holds while a job runs: signals are noted, denormals flushed, the caller's random numbers left alone."""
    try:
        with Interrupts() as interrupts, flushed_denormals() as flushed, torch.random.fork_rng(devices=[]):
            if not flushed:
                listener.note("this processor cannot flush denormal numbers; steps may get slower late in a long run.")
            yield interrupts
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PreflightError(explain_out_of_memory(prepared.config, data.longest)) from error


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
    run.write_config(job.prepared.config.model_dump(mode="json"))


@torch.no_grad()
def _restore(job: Job, checkpoint: Checkpoint) -> None:
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
    return _finish(job, started)


def _finish(job: Job, started: float) -> RunResult:
    """Write adapter or model, result, report and, last, the manifest that makes the run finished."""
    run, prepared = job.run, job.prepared
    job.listener.stage("writing the results", 0, 0)
    folder = run.path / (rundir.MODEL if prepared.config.method == "full" else rundir.ADAPTER)
    try:
        if prepared.config.method == "full":
            save_full(prepared.model, folder, prepared.tokenizer)
        else:
            save_adapter(prepared.model, folder, base_name=prepared.base_name)
        result = _result(job, folder, time.perf_counter() - started)
        run.write_json(rundir.RESULT, result.to_json())
        write_report(run.path)
    except OSError as error:
        raise CheckpointError(explain_write_error(error, run.path)) from error
    run.seal()
    job.listener.finish(result)
    return result


def _result(job: Job, folder: Path, total_seconds: float) -> RunResult:
    state, prepared = job.state, job.prepared
    full = prepared.config.method == "full"
    return RunResult(
        run_dir=str(job.run.path),
        adapter_dir=None if full else str(folder),
        model_dir=str(folder) if full else None,
        report=str(job.run.path / rundir.REPORT),
        steps=state.step,
        skipped_steps=state.skipped,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        seconds=state.seconds,
        total_seconds=total_seconds,
        loss_first=state.loss_first,
        loss_last=state.loss_last,
        peak_rss_bytes=max(state.peak_rss_bytes, peak_rss_bytes()),
        trainable_parameters=prepared.trainable_parameters,
        total_parameters=prepared.total_parameters,
        eval=job.evaluations.result(job.total_steps),
        samples=job.evaluations.samples(),
    )
