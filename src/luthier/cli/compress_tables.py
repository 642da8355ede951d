"""The table of what was tried within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from luthier.cli.tables import stdout_console
from luthier.units import number_text, percent_text, size_text

if TYPE_CHECKING:
    from luthier.compression.report import Report

HEADS = ("", "size", "perplexity", "same next token", "tokens/s, prompt", "tokens/s, decoding")


def print_candidates(report: Report) -> None:
    """One line a model, the original first; the result is marked."""
    table = Table(box=None, pad_edge=False)
    for head in HEADS:
        table.add_column(head, justify="right" if head else "left")
    for one in report.candidates:
        assert one.quality is not None
        assert one.cost is not None
        table.add_row(
            f"{one.name}{'  <- the result' if one.name == report.chosen else ''}",
            size_text(one.size_bytes),
            number_text(one.quality.perplexity),
            percent_text(one.quality.agreement),
            f"{one.cost.prompt_tokens_per_second:,.0f}",
            f"{one.cost.decode_tokens_per_second:,.0f}",
        )
    stdout_console().print(table)
