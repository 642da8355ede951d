"""`luthier compress`: a model within a budget of bytes, written as a folder with a report of what that cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import flags
from luthier.cli.evaluate import show_notes

if TYPE_CHECKING:
    from luthier.compression.report import Report


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or alias.", show_default=False)],
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Bytes of all weights, head and embedding included: a share of the model in 16 bits (60%) or a size (80MB).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the result.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Calibration text: plain text, or rows as for training. Without it, text that the model writes itself.",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="FILE",
            help="Text or rows to measure on; what is measured is never calibrated on. Without it, a part kept out of --data.",
            show_default=False,
        ),
    ] = None,
    heal: Annotated[int, typer.Option("--heal", metavar="STEPS", help="Steps of training on the original's logits.")] = 0,
    bits: Annotated[
        str,
        typer.Option(
            "--bits",
            metavar="BITS",
            help="16: low rank alone; 4: 4-bit storages alone, embedding and head in as many bits as fit; auto: all of them.",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of generated text and of healing.")] = 0,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Write MODEL within a budget of bytes: what matters least goes to few bits and low rank. Measures what that costs."""
    from luthier.compression.settings import Budget, CompressSettings

    settings = CompressSettings(
        model, Budget.parse(budget), out, data, eval_data, heal, bits, seed, offline=offline,  # type: ignore[arg-type]
    )  # fmt: skip
    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.compression.runner import compress as compress_model

        report = compress_model(settings, progress=progress)
    _show(report, as_json)


def _show(report: Report, as_json: bool) -> None:
    show_notes(report.notes)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
        return
    from luthier.cli.compress_tables import print_candidates

    print_candidates(report)
    typer.echo(report.sentence())
    typer.echo(f"{report.out}: the model, report.html and report.json")
