"""The curves of a run as PNG files for slides and papers. The only place that imports matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.disk import staged_file
from luthier.training.run_files import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, PALE, LINE, HELD_OUT = "#2b2420", "#b9aea3", "#1d5c8f", "#b3470f"
STYLE: Any = {
    "font.size": 9, "axes.edgecolor": "#8a7f75", "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6dfd6",
    "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip

# file, axis label, key of a step record, factor
SINGLE = (
    ("learning_rate.png", "learning rate", "learning_rate", 1.0),
    ("grad_norm.png", "gradient norm before clipping", "grad_norm", 1.0),
    ("speed.png", "tokens a second", "tokens_per_second", 1.0),
    ("memory.png", "resident memory, GB", "rss_bytes", 1e-9),
)


def write_plots(files: RunFiles, folder: Path) -> list[Path]:
    """Write one PNG a curve the run has; the same metrics give the same bytes. Returns the files, none for an empty run."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context

    written = []
    with rc_context(STYLE):
        if files.curve("loss") or files.curve("loss", files.evaluations):
            written.append(_write(folder / "loss.png", "loss a supervised token", lambda axes: _draw_loss(axes, files)))
        for name, label, key, factor in SINGLE:
            curve = [(step, value * factor) for step, value in files.curve(key)]
            if curve:
                written.append(_write(folder / name, label, lambda axes, curve=curve: _draw(axes, curve, LINE)))
    return written


def _draw_loss(axes: Axes, files: RunFiles) -> None:
    curves = (
        (files.curve("loss"), PALE, "training", ""),
        (files.curve("loss_smooth"), LINE, "training, smoothed", ""),
        (files.curve("loss", files.evaluations), HELD_OUT, "held out", "o"),
    )
    for curve, color, label, marker in curves:
        if curve:
            _draw(axes, curve, color, label=label, marker=marker)
    axes.legend(frameon=False)


def _draw(axes: Axes, curve: Sequence[tuple[float, float]], color: str, label: str = "", marker: str = "") -> None:
    marker = marker or ("o" if len(curve) == 1 else "")
    axes.plot(
        [x for x, _ in curve], [y for _, y in curve], color=color, label=label, marker=marker, markersize=4, linewidth=1.4
    )
    axes.set_ylim(bottom=0 if min(y for _, y in curve) >= 0 else None)


def _write(path: Path, label: str, draw: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged, staged.open("wb") as stream:
        # No software name and no date in the file: the same figures give the same bytes.
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return path
