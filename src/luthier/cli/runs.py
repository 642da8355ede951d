"""`luthier runs ls` and `luthier runs show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import flags

app = typer.Typer(help="List training runs and show one.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--root", help="Folder that holds run directories.")]


@app.command("ls")
def list_(root: Root = Path("runs"), as_json: flags.Json = False) -> None:
    """List the runs below a folder, newest first."""
    from luthier.training.run_index import list_runs

    summaries = list_runs(root)
    if as_json:
        typer.echo(json.dumps({"runs": summaries}))
        return
    from luthier.cli.tables import print_runs

    print_runs(summaries, root)


@app.command("show")
def show(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    as_json: flags.Json = False,
) -> None:
    """Show what a run was asked to do and how it ended."""
    from luthier.training.run_index import read_run

    summary = read_run(run_dir)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    from luthier.cli.tables import print_run

    print_run(summary)
