"""`luthier plan`: what a run would take, before anything heavy is loaded."""

from __future__ import annotations

import json

import typer

from luthier.cli import flags


def plan(
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
    config: flags.Config = None,
    assignments: flags.Assignments = None,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Say what `luthier train` with the same flags would take in memory, time and disk, and whether it fits."""
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
        from luthier.training.plan import plan_run

        planned = plan_run(run_config, listener)
    if as_json:
        typer.echo(json.dumps(planned.to_json()))
    else:
        from luthier.cli.plan_table import print_plan

        print_plan(planned)
    planned.require_fit()
