"""`luthier train` and `luthier resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import flags

if TYPE_CHECKING:
    from luthier.training.run import RunResult


@flags.takes_run_flags
def train(
    run: flags.RunFlags,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that --out already holds.", show_default=False)
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Fine-tune a model on DATA and write a run directory with the adapter and a report."""
    config = run.run_config()

    from luthier.cli.display import live_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with live_display() as listener:
        from luthier.training.run import train as train_run

        result = train_run(config, listener=listener, overwrite=overwrite)
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
