"""`luthier eval`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from luthier.cli import flags
from luthier.errors import ConfigError, PreflightError, nearest
from luthier.evaluation.measures import METRICS, check_metrics
from luthier.units import visible

if TYPE_CHECKING:
    from luthier.cli.compare import Comparison
    from luthier.config import Storage

MAX_LENGTH = 1024
ON_LONG = ("error", "drop", "truncate")
OnLong = Literal["error", "drop", "truncate"]

Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or any model.", show_default=False)]
Adapter = Annotated[str | None, typer.Option("--adapter", metavar="DIR", help="Adapter in PEFT layout.", show_default=False)]


def parse_metrics(text: str | None) -> tuple[str, ...] | None:
    """`loss,exact` as a tuple, None as None. Raises ConfigError for a metric that is not known, and for none at all."""
    if text is None:
        return None
    return check_metrics([name.strip() for name in text.split(",") if name.strip()], "--metrics takes")


def parse_storage(text: str | None) -> Storage | None:
    """The value of --base. Raises ConfigError for a storage that is not known."""
    from luthier.config import Storage

    known = get_args(Storage)
    if text is not None and text not in known:
        raise ConfigError(f"--base takes {', '.join(known)}; got {text!r}.{nearest(text, known)}")
    return cast("Storage | None", text)


def parse_on_long(text: str) -> OnLong:
    """The value of --on-long. Raises ConfigError for anything else than its three words."""
    if text not in ON_LONG:
        raise ConfigError(f"--on-long takes {', '.join(ON_LONG)}; got {text!r}.{nearest(text, ON_LONG)}")
    return cast("OnLong", text)


Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[NAME=]FILE", help="Rows to evaluate on; may be repeated.", show_default=False),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="NAMES",
        help=f"Any of {', '.join(METRICS)}, with commas between. [default: loss,exact; loss,choice for rows with choices]",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels", metavar="FILE", help="Labels to choose from, one a line. [default: the rows' own]", show_default=False
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(
        "--json-schema", metavar="FILE", help="Written answers are JSON of this schema (extra constrain).", show_default=False
    ),
]
VersusBase = Annotated[bool, typer.Option("--vs-base", help="Evaluate the model before tuning too.")]
Versus = Annotated[
    str | None, typer.Option("--vs", metavar="RUN|MODEL", help="Compare with another run or model.", show_default=False)
]
Guard = Annotated[
    list[str] | None,
    typer.Option(
        "--guard",
        metavar="[NAME=]FILE[:BOUND]",
        help="Rows on which tuning may make the model worse by no more than BOUND, else exit code 6: 0.05, 2% of the "
        "base's value, or FIGURE=BOUND. May be repeated. [default: 2% of the loss]",
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=8, help="Longest row in tokens.", show_default=f"the run's, else {MAX_LENGTH}"),
]
LongRows = Annotated[str, typer.Option("--on-long", metavar="error|drop|truncate", help="What happens to longer rows.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest generated answer.")]
FirstRows = Annotated[
    int | None, typer.Option("--rows", min=1, help="Use only the first N rows of each file.", show_default=False)
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page with worst cases and examples.", show_default=False),
]


def evaluate(
    target: Target,
    data: Data = None,
    adapter: Adapter = None,
    metrics: Metrics = None,
    labels: Labels = None,
    json_schema: Schema = None,
    vs_base: VersusBase = False,
    vs: Versus = None,
    guard: Guard = None,
    base: flags.Base = None,
    max_length: MaxLength = None,
    on_long: LongRows = "error",
    max_new_tokens: MaxNewTokens = 128,
    rows: FirstRows = None,
    html: Html = None,
    no_data_cache: flags.NoDataCache = False,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Measure a model on held-out rows, alone or beside its base, every figure with its 95 % interval."""
    wanted = parse_metrics(metrics)
    storage, for_long = parse_storage(base), parse_on_long(on_long)
    _check_flags(data, guard, vs_base, vs, html)

    from luthier.cli.compare import Request, compare
    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    from luthier.evaluation.compare import as_json as as_content
    from luthier.evaluation.compare import raise_broken

    request = Request(
        target, adapter, vs, vs_base=vs_base or (bool(guard) and vs is None), storage=storage, data=data or [],
        guards=guard or [], metrics=wanted, labels=labels, json_schema=json_schema, max_length=max_length, on_long=for_long,
        max_new_tokens=max_new_tokens, rows=rows, data_cache=not no_data_cache, offline=offline,
    )  # fmt: skip
    with progress_display() as progress:
        found = compare(request, progress)
    show_notes([*found.notes, *(note for report in found.reports if as_json for note in report.notes)])
    if as_json:
        keys = {"base_key": "vs", "tuned_key": "metrics"} if vs is not None else {}
        typer.echo(json.dumps(as_content(found.reports, **keys)))
    else:
        from luthier.cli.eval_tables import print_reports

        print_reports(found.reports, base_name="base" if vs is None else vs)
    if html is not None:
        _write_page(html, found, name=target, base_name=vs or "base")
        if not as_json:
            typer.echo(f"page: {visible(str(html))}")
    raise_broken(found.reports)


def _write_page(html: Path, found: Comparison, *, name: str, base_name: str) -> None:
    """After the figures were printed, so that a disk that refuses the page does not take them along."""
    from luthier.disk import write_atomically
    from luthier.evaluation.page import render_evaluation

    page = render_evaluation(found.reports, name=name, base_name=base_name, paths=found.paths)
    try:
        write_atomically(html, page)
    except OSError as error:
        raise PreflightError(
            f"the page must be written to --html; {html}: {error.strerror or error}. The figures above are whole; choose "
            "another file."
        ) from error


def _check_flags(data: list[str] | None, guard: list[str] | None, vs_base: bool, vs: str | None, html: Path | None) -> None:
    """What can be said before anything is loaded."""
    if not data and not guard:
        raise ConfigError("an evaluation needs rows; give --data FILE, or --guard FILE.")
    if vs_base and vs is not None:
        raise ConfigError("one comparison at a time; got --vs-base and --vs. Leave one out.")
    if html is not None:
        _check_page(html)


def _check_page(html: Path) -> None:
    """Raise ConfigError where a page cannot be written, or would take the place of something that is no file."""
    try:
        exists, is_file, in_folder = html.exists(), html.is_file(), html.parent.is_dir()
    except OSError as error:  # a name that is too long for the file system
        raise ConfigError(f"--html needs a file that can be written; {html}: {error.strerror}.") from error
    if not in_folder or (exists and not is_file):
        raise ConfigError(f"--html needs a file in a folder that exists; got {html}. Make its folder first.")
    if not os.access(html.parent, os.W_OK):
        raise ConfigError(f"--html needs a folder that can be written to; {html.parent} is not. Choose another.")


def show_notes(notes: list[str]) -> None:
    """Notes on stderr, a line each."""
    for note in dict.fromkeys(notes):
        typer.echo(f"note: {visible(note).rstrip('.')}.", err=True)
