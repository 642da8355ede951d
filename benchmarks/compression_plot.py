"""The picture of compression.py as SVG: perplexity over the share of numbers that was removed, one line a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from race_plots import write

PALE, DARK = "#c9b8a6", "#1d5c8f"
COLORS = {
    "svd": PALE, "asvd": "#c98a55", "whitened": "#a08f80", "sequential": "#8db3cf", "weighted": "#4f88b5", "allocated": DARK,
}  # fmt: skip


def write_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """rows: as compression.py keeps them; lines of methods without rows are left out."""
    write(path, lambda figure: draw(figure, rows), (7.2, 4.0))


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Logarithmic: a plain SVD leaves no model at all. The original and NF4 stand as levels beside the lines."""
    axes = figure.subplots()
    for method, color in COLORS.items():
        own = sorted((100 * row["removed"], row["perplexity"]) for row in rows if row["line"] == method)
        if own:
            axes.plot(*zip(*own, strict=True), color=color, marker="o", label=method)
    for line, style in (("original", "-"), ("nf4, nearest", "--"), ("nf4, in metric", ":")):
        for row in rows:
            if row["line"] == line:
                axes.axhline(row["perplexity"], color="#555555", linewidth=1, linestyle=style, label=line)
    axes.set_yscale("log")
    axes.set_xlabel("% of the linear layers' numbers removed")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8)
