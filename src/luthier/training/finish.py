"""The last thing a run does: its weights, its result, its report, its manifest."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors import SafetensorError

from luthier.adapters import save_adapter, save_full
from luthier.errors import AdapterError, CheckpointError
from luthier.training import rundir
from luthier.training.files import explain_write_error
from luthier.training.loop import Job
from luthier.training.memory import peak_rss_bytes
from luthier.training.report import write_report
from luthier.training.result import RunResult


def finish(job: Job, started: float) -> RunResult:
    """Write adapter or model, result, report and, last, the manifest that makes the run finished.

    started: time.perf_counter() when this process began with the run. Raises CheckpointError where the disk refuses
    anything; the run then goes on from its last checkpoint.
    """
    job.listener.stage("writing the results", 0, 0)
    try:
        folder = _save_weights(job)
        result = _result(job, folder, time.perf_counter() - started)
        job.run.write_json(rundir.RESULT, result.to_json())
        write_report(job.run.path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain_write_error(error, job.run.path)) from error
    except AdapterError as error:
        if not isinstance(error.__cause__, (OSError, SafetensorError)):
            raise
        raise CheckpointError(explain_write_error(error.__cause__, job.run.path)) from error
    job.run.seal()
    job.listener.finish(result)
    return result


def _save_weights(job: Job) -> Path:
    """Write what was trained and return its folder."""
    prepared = job.prepared
    if prepared.config.method == "full":
        return save_full(prepared.model, job.run.path / rundir.MODEL, prepared.tokenizer)
    return save_adapter(prepared.model, job.run.path / rundir.ADAPTER, base_name=prepared.base_name)


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
        computed_tokens=state.computed_tokens,
    )
