"""The table of what each way of merging costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from luthier.cli.tables import stdout_console
from luthier.units import number_text, percent_text, size_text

if TYPE_CHECKING:
    from luthier.export.choices import Measured


def print_choices(measured: Sequence[Measured]) -> None:
    """One line a choice; nothing where none was measured."""
    if not measured:
        return
    table = Table(box=None, pad_edge=False)
    for head in ("merged into, stored in", "size", "logits error", "loss", "same next token", "same on whole rows"):
        table.add_column(head, justify="left" if head.startswith("merged") else "right")
    for one in measured:
        difference = one.difference
        table.add_row(
            one.choice.label, size_text(one.size_bytes), number_text(difference.logits_error), number_text(difference.loss),
            percent_text(difference.token_agreement), percent_text(difference.row_agreement),
        )  # fmt: skip
    console = stdout_console()
    console.print(table)
    first = measured[0].difference
    console.print(f"as trained: loss {number_text(first.loss_reference)} on {first.tokens} tokens of {first.rows} rows")
