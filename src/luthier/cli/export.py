"""`luthier export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import flags
from luthier.cli.evaluate import show_notes
from luthier.units import visible

if TYPE_CHECKING:
    from luthier.export.report import ExportReport

DEFAULT_ROWS = 32


Exported = Annotated[
    str,
    typer.Argument(
        metavar="RUN|ADAPTER|MODEL", help="A run, an adapter folder of PEFT or mlx-lm, or a model.", show_default=False
    ),
]
Form = Annotated[
    str, typer.Option("--to", metavar="merged|gguf|gguf-adapter|peft|mlx", help="What to write.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the result.", show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="merged: f32, bf16, f16, nf4. gguf: f32, bf16, f16, q8_0, q6_k, q4_k, q4_1, q4_0, or asis, which keeps a GGUF "
        "base's blocks. [default: merged, the base's own; gguf, f16]",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="original|dequantized",
        help="Weights to merge into: the published ones, or those trained on. [default: dequantized]",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None, typer.Option("--model", metavar="M", help="The base of an adapter folder.", show_default=False)
]
Rows = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="Rows to compare on. [default: the run's]", show_default=False)
]
RowCount = Annotated[int, typer.Option("--rows", min=0, help="How many rows to compare on; 0 for none.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Open the result with the program it is for and compare.", show_default=False)
]


def export(
    target: Exported,
    to: Form,
    out: Out,
    dtype: Dtype = None,
    base: Base = None,
    model: BaseModel = None,
    data: Rows = None,
    rows: RowCount = DEFAULT_ROWS,
    verify: Verify = False,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Write what was trained for Transformers, llama.cpp, Ollama, PEFT or mlx-lm, and say what merging costs."""
    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.export.export import export as export_model

        report = export_model(
            target, to=to, out=out, dtype=dtype, base=base, base_model=model, data=data, rows=rows, verify=verify,
            offline=offline, progress=progress,
        )  # fmt: skip
    show_notes(report.notes)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
        return
    _print(report)


def _print(report: ExportReport) -> None:
    from luthier.cli.export_tables import print_choices
    from luthier.units import number_text, percent_text, size_text

    print_choices(report.measured)
    if report.recommendation:
        typer.echo(report.recommendation)
    for one in report.verification:
        line = f"verified by {one.by} against {one.against}: {one.bound}; logits differ by at most "
        line += f"{number_text(one.difference.largest_logits_error)} of the largest"
        if one.equal_answers is not None:
            line += f", equal answers {percent_text(one.equal_answers)}"
        if one.equal_tokens is not None:
            line += f", equal tokens {percent_text(one.equal_tokens)}"
        typer.echo(line)
    typer.echo(f"{report.to}, {size_text(report.size_bytes)}: {visible(report.out)}")
