"""The two pictures of training.py as SVG: bars of the table, and the cost of a token against the length of its row."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race_data import WORKS
from race_figures import CONTENDERS, LUTHIER, NAMES, Figures, State, figures_of, length_points, without_attention

BARS, LENGTHS = "training-speed.svg", "training-lengths.svg"
PALE_LINE, DARK_LINE = "#8db3cf", "#1d5c8f"
PEER_COLORS = ("#c98a55", "#e0bd9d", "#a08f80", "#cfc4b8")
COLORS = dict(zip(CONTENDERS, (DARK_LINE, PALE_LINE, *PEER_COLORS), strict=True))


def write_pictures(state: State, folder: Path) -> list[tuple[str, Path]]:
    """Write the pictures for which there are figures; the same figures give the same bytes. (text for readers, file) each."""
    figures, points = figures_of(state), length_points(state)
    written = []
    if any(found["contenders"] for found in figures.values()):
        write(folder / BARS, lambda figure: draw_bars(figure, figures), (9.6, 3.6))
        written.append(("Dataset tokens a second of every contender on each work", folder / BARS))
    if points:
        write(folder / LENGTHS, lambda figure: draw_lengths(figure, points), (7.2, 4.0))
        written.append(("Seconds a token against the length of the rows", folder / LENGTHS))
    return written


def draw_bars(figure: Any, figures: Figures) -> None:
    """One panel a work, one bar a contender, its tokens a second written at its end."""
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, (name, found) in zip(panels, figures.items(), strict=True):
        drawn = [one for one in reversed(CONTENDERS) if one in found["contenders"]]
        speeds = [found["contenders"][one]["tokens_per_second"] for one in drawn]
        bars = axes.barh(range(len(drawn)), speeds, color=[COLORS[one] for one in drawn])
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=2, fontsize=8)
        axes.set_yticks(range(len(drawn)), [short_name(one) for one in drawn] if axes is panels[0] else [""] * len(drawn))
        axes.set_xlim(right=1.25 * max(speeds, default=1.0))
        axes.set_title(WORKS[name].title.replace(", ", ",\n", 1), fontsize=8)
        axes.locator_params(axis="x", nbins=3)
        axes.set_xlabel("tokens a second")
        axes.grid(axis="y", visible=False)


def short_name(contender: str) -> str:
    return NAMES[contender].replace("bitsandbytes QLoRA", "QLoRA")


def draw_lengths(figure: Any, points: dict[str, list[dict[str, float]]]) -> None:
    """Milliseconds a token over row length: measured, ours without attention's own, and what attention has to cost."""
    axes = figure.subplots()
    for contender, each in points.items():
        lengths = [point["length"] for point in each]
        axes.plot(lengths, [1e3 * p["seconds"] for p in each], color=COLORS[contender], marker="o", label=NAMES[contender])
        if contender not in LUTHIER or any("attention" not in point for point in each):
            continue
        rest = [1e3 * seconds for seconds in without_attention(each)]
        label = f"{NAMES[contender]}, attention taken off"
        axes.plot(lengths, rest, color=COLORS[contender], marker="o", linestyle="--", label=label)
        top = [1e3 * point["seconds"] for point in each]
        axes.fill_between(lengths, rest, top, color=COLORS[contender], alpha=0.15, label="attention's own")
        if all("attention_limit" in point for point in each):
            limit = [1e3 * point["attention_limit"] for point in each]
            axes.plot(lengths, limit, color="#b3470f", linestyle=":", label="attention's flops at the multiply-add peak")
    ticks = sorted({point["length"] for each in points.values() for point in each})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in a row, the same number of tokens in every step")
    axes.set_ylabel("milliseconds a token")
    axes.legend(frameon=False, fontsize=8)


def write(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from luthier.training.plots import STYLE

    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    with rc_context({**STYLE, "svg.hashsalt": "luthier"}), staged.open("wb") as stream:
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure)
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    os.replace(staged, path)
