"""`luthier quantize`: a model's linear layers in 4 bits, written as a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import flags
from luthier.cli.evaluate import show_notes
from luthier.errors import ConfigError, nearest
from luthier.units import size_text

FORMATS = ("nf4",)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or alias.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="nf4: as bitsandbytes stores it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the result.", show_default=False)],
    skip_modules: flags.SkipModules = None,
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="Keep the scales in 32 bits instead of 8.", show_default=False)
    ] = False,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Write MODEL with its linear layers in 4 bits; opens here and in Transformers with bitsandbytes."""
    if to not in FORMATS:
        raise ConfigError(f"--to is one of {', '.join(FORMATS)}; got {to!r}.{nearest(to, FORMATS)}")
    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.config import NF4Options
        from luthier.models.quantize import quantize as quantize_model

        options = NF4Options(double_quant=not no_double_quant, skip_modules=tuple(flags.split_names(skip_modules)))
        report = quantize_model(model, out, nf4=options, offline=offline, progress=progress)
    show_notes(report.notes)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    typer.echo(f"{report.quantized} matrices in {to}, as they were: {', '.join(report.kept) or 'none'}")
    typer.echo(f"{size_text(report.size_bytes)}, {size_text(report.size_bytes_in_16_bits)} in 16 bits: {report.folder}")
