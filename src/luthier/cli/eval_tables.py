"""What `luthier eval` prints on stdout when --json is not given: a table a set, plain where stdout is not a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from luthier.cli.tables import stdout_console
from luthier.evaluation.measures import TITLES, amount_text, amounts_text, figure_text, interval_text
from luthier.units import count_text, visible

if TYPE_CHECKING:
    from luthier.evaluation.compare import SetReport


def print_reports(reports: Sequence[SetReport], *, base_name: str = "base") -> None:
    """For each set its figures with 95 % intervals, beside the other model's and the paired difference, and its notes."""
    console = stdout_console()
    for number, report in enumerate(reports):
        if number:
            console.print()
        console.print(_alone(report) if report.base is None else _beside(report, base_name))
        for note in report.notes:
            console.print(Text(f"note: {visible(note)}"))
        if report.verdict is not None:
            console.print(Text(f"guard {visible(report.verdict.sentence())}", style="" if report.verdict.kept else "bold red"))


def _alone(report: SetReport) -> Table:
    table = _table(f"{visible(report.name)}, {count_text(report.tuned.rows)} rows", "", "95 % interval")
    for name, value in report.tuned.metrics.items():
        table.add_row(TITLES[name], figure_text(name, value), interval_text(name, report.intervals.get(name)))
    return table


def _beside(report: SetReport, base_name: str) -> Table:
    assert report.base is not None
    name = f"{visible(report.name)}, {count_text(report.tuned.rows)} rows"
    table = _table(name, visible(base_name), "tuned", "change", "95 % interval of the change")
    for figure in dict.fromkeys((*report.base.metrics, *report.tuned.metrics)):
        change = report.differences.get(figure)
        table.add_row(
            TITLES[figure],
            figure_text(figure, report.base.metrics.get(figure)),
            figure_text(figure, report.tuned.metrics.get(figure)),
            "" if change is None else amount_text(figure, change.value, signed=True),
            "" if change is None else amounts_text(figure, change.interval, signed=True),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(first))
    for title in others:
        table.add_column(Text(title), justify="right")
    return table
