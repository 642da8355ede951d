"""`luthier data check`: what is wrong with the data, file:line, and what would carry loss."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from luthier.cli import flags
from luthier.errors import DataError

app = typer.Typer(help="Look at training data before training on it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at training data before training on it."""


@app.command("check")
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV or Parquet file.", show_default=False)],
    model: flags.Model = None,
    max_length: Annotated[int, typer.Option("--max-length", min=8, help="Longest row in tokens.")] = 1024,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Rows shown with their supervised tokens marked.")] = 2,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Report every problem with its line, and render samples with the supervised tokens marked."""
    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.config import DEFAULT_MODEL
        from luthier.data import check_data
        from luthier.models.load import load_tokenizer

        tokenizer = load_tokenizer(model or DEFAULT_MODEL, offline=offline, progress=progress)
        report = check_data(data, tokenizer, max_length=max_length, samples=samples, offline=offline)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        from luthier.cli.tables import print_data_check

        print_data_check(report)
    if report.problems:
        found = "1 problem" if report.problem_count == 1 else f"{report.problem_count} problems"
        raise DataError(f"{data} has {found}, listed above.")
