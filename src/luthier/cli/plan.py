"""`luthier plan`: what a run would take, before anything heavy is loaded."""

from __future__ import annotations

import json

import typer

from luthier.cli import flags


@flags.takes_run_flags
def plan(run: flags.RunFlags, as_json: flags.Json = False) -> None:
    """Say what `luthier train` with the same flags would take in memory, time and disk, and whether it fits."""
    config = run.run_config()

    from luthier.cli.display import live_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with live_display() as listener:
        from luthier.training.plan import plan_run

        planned = plan_run(config, listener)
    if as_json:
        typer.echo(json.dumps(planned.to_json()))
    else:
        from luthier.cli.plan_table import print_plan

        print_plan(planned)
    planned.require_fit()
