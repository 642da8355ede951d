"""`luthier train` and `luthier resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import flags

if TYPE_CHECKING:
    from luthier.training.run import RunResult


def train(
    data: flags.Data = None,
    model: flags.Model = None,
    method: flags.Method = None,
    base: flags.Base = None,
    skip_modules: flags.SkipModules = None,
    variant: flags.VariantFlag = None,
    rank: flags.Rank = None,
    alpha: flags.Alpha = None,
    dropout: flags.Dropout = None,
    targets: flags.Targets = None,
    lr: flags.LearningRate = None,
    epochs: flags.Epochs = None,
    steps: flags.Steps = None,
    batch_size: flags.BatchSize = None,
    max_length: flags.MaxLength = None,
    on_long: flags.OnLong = None,
    loss_on: flags.LossOn = None,
    eval_data: flags.EvalData = None,
    eval_every: flags.EvalEvery = None,
    save_every: flags.SaveEvery = None,
    optimizer: flags.OptimizerFlag = None,
    memory: flags.Memory = None,
    seed: flags.Seed = None,
    out: flags.Out = None,
    overwrite: flags.Overwrite = False,
    config: flags.Config = None,
    assignments: flags.Assignments = None,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Fine-tune a model on DATA and write a run directory with the adapter and a report."""
    given = {
        "data": data, "model": model, "method": method, "base": base, "skip_modules": skip_modules,
        "optimizer": optimizer, "variant": variant, "rank": rank, "alpha": alpha, "dropout": dropout,
        "targets": targets, "learning_rate": lr, "epochs": epochs, "steps": steps,
        "batch_size": batch_size, "max_length": max_length, "on_long": on_long, "loss_on": loss_on,
        "eval_data": eval_data, "eval_every": eval_every, "save_every": save_every, "memory": memory, "seed": seed,
        "out": out, "offline": offline,
    }  # fmt: skip
    run_config = flags.build_config(config, assignments, given)

    from luthier.cli.display import live_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with live_display() as listener:
        from luthier.training.run import train as train_run

        result = train_run(run_config, listener=listener, overwrite=overwrite)
    _print_result(result, as_json)


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Go on from the weights alone when optimiser or RNG state is missing.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Go on with an interrupted run from its newest whole checkpoint."""
    from luthier.cli.display import live_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with live_display() as listener:
        from luthier.training.run import resume as resume_run

        result = resume_run(run_dir, listener=listener, weights_only=weights_only)
    _print_result(result, as_json)


def _print_result(result: RunResult, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    from luthier.cli.tables import print_run_summary

    print_run_summary(result)
