"""What a compression found, as a page: the models beside each other, bits and spectra layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.compression.report import PLAIN, Candidate, Report, spectrum, task_figure
from luthier.compression.specs import Spec
from luthier.compression.tasks import task_differences, task_intervals
from luthier.evaluation.bootstrap import Interval
from luthier.evaluation.measures import TITLES, amount_text, amounts_text, figure_text, interval_text
from luthier.pages.page import Tile, render_page
from luthier.units import count_text, duration_text, number_text, percent_text, size_text

TEMPLATE = Path(__file__).with_name("assets") / "compression.html"
PAGE, FIGURES = "report.html", "report.json"
DECADES = 8


def write_report(folder: Path, report: Report) -> None:
    """report.json and report.html into the folder of the model."""
    content = report.to_json() | {"spectra": {one.name: spectrum(one) for one in report.facts}}
    (folder / FIGURES).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_report(report), encoding="utf-8")


def render_report(report: Report) -> str:
    """The page as text."""
    result = report.result
    assert result.quality is not None
    values = {
        "name": report.model,
        "eyebrow": "Luthier compression",
        "lead": f"{size_text(report.original.size_bytes)} in 16 bits, {size_text(result.size_bytes)} now, "
        f"of {size_text(report.budget_bytes)} allowed, in {duration_text(report.seconds)}.",
        "notices": [report.sentence()],
        "notes": report.notes,
        "headline": _tiles(report),
        "header": ["model", "size", "perplexity", "loss above the original's", "loss beside plain NF4's", "next token right",
                   "same next token as the original"],
        "rows": [_quality_row(report, one) for one in report.candidates],
        "costs": ["model", "tokens/s, prompt", "tokens/s, decoding", "peak memory of a process that uses it", "energy a token"],
        "cost_rows": [_cost_row(report, one) for one in report.candidates],
        "tasks": _task_rows(report),
        "layers": _layers(report),
        "spectra": _spectra(report),
        "text": f"Calibrated on {count_text(report.calibration_tokens)} tokens of {report.origin}; measured on "
        f"{count_text(result.quality.tokens)} tokens in {result.quality.windows} windows of {report.measured_on}.",
    }  # fmt: skip
    return render_page(TEMPLATE, values)


def _tiles(report: Report) -> list[Tile]:
    before, after = report.original, report.result
    assert before.quality is not None
    assert after.quality is not None
    tiles = [
        Tile("Size", size_text(after.size_bytes), size_text(before.size_bytes), big=True),
        Tile("Perplexity", number_text(after.quality.perplexity), number_text(before.quality.perplexity), big=True),
    ]
    if before.task and after.task:
        name = task_figure(after.task)
        was, now = figure_text(name, before.task.metrics[name]), figure_text(name, after.task.metrics[name])
        tiles.append(Tile(TITLES[name].capitalize(), now, was, big=True))
    else:
        right = percent_text(after.quality.accuracy), percent_text(before.quality.accuracy)
        tiles.append(Tile("Next token right", *right, big=True))
    if before.cost and after.cost:
        speed = f"{after.cost.decode_tokens_per_second:.0f}"
        tiles.append(Tile("Tokens a second, decoding", speed, f"{before.cost.decode_tokens_per_second:.0f}", big=True))
    return tiles


def _title(report: Report, one: Candidate) -> str:
    return ("the result: " if one is report.result else "") + one.name


def _quality_row(report: Report, one: Candidate) -> dict[str, Any]:
    quality = one.quality
    assert quality is not None
    beside = report.beside_plain(one)
    is_original = one is report.original
    cells = [
        _title(report, one),
        size_text(one.size_bytes),
        _between(number_text(quality.perplexity), quality.perplexity_interval, number_text),
        "" if is_original else _between(_signed(quality.rise), quality.rise_interval, _signed),
        "" if beside is None else _between(_signed(beside[0]), beside[1], _signed),
        _between(percent_text(quality.accuracy), quality.accuracy_interval, percent_text),
        "" if is_original else _between(percent_text(quality.agreement), quality.agreement_interval, percent_text),
    ]
    return {"cells": cells, "chosen": one is report.result}


def _cost_row(report: Report, one: Candidate) -> dict[str, Any]:
    cost, memory = one.cost, one.footprint
    assert cost is not None
    cells = [
        _title(report, one),
        f"{cost.prompt_tokens_per_second:,.0f}",
        f"{cost.decode_tokens_per_second:,.0f}",
        "not measured"
        if memory is None
        else f"{size_text(memory.peak_bytes)}, {size_text(memory.before_bytes)} before loading",
        f"{1000 * cost.joules_per_token:.1f} mJ",
    ]
    return {"cells": cells, "chosen": one is report.result}


def _task_rows(report: Report) -> dict[str, Any] | None:
    """The table of a task's figures; None where there is no task."""
    if report.original.task is None:
        return None
    names = [figure.name for figure in report.original.task.figures]
    rows = []
    for one in report.candidates:
        assert one.task is not None
        intervals = task_intervals(one.task)
        cells = [_title(report, one)]
        for name in names:
            cells.append(f"{figure_text(name, one.task.metrics[name])} ({interval_text(name, intervals[name])})")
        cells += [_beside(report, one, other) for other in (report.original, report.named(PLAIN))]
        rows.append({"cells": cells, "chosen": one is report.result})
    right = TITLES[task_figure(report.original.task)]
    header = ["model", *(TITLES[name] for name in names), f"{right} beside the original", f"{right} beside plain NF4"]
    return {"header": header, "rows": rows, "count": report.original.task.rows}


def _beside(report: Report, one: Candidate, other: Candidate | None) -> str:
    if other is None or other is one or other.task is None or one.task is None:
        return ""
    name = task_figure(one.task)
    value, interval = task_differences(one.task, other.task)[name]
    return f"{amount_text(name, value, signed=True)} ({amounts_text(name, interval, signed=True)})"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _between(text: str, interval: Interval, show: Callable[[float], str]) -> str:
    return f"{text} ({show(interval[0])} to {show(interval[1])})"


def _layers(report: Report) -> list[dict[str, Any]]:
    """A bar for each layer: as long as its bits for each of its weights, with its storage in words."""
    shapes = {one.name: one.shape for one in report.facts}
    bars = []
    for name, spec in report.layers.items():
        rows, columns = shapes[name]
        saved = spec.rank**2 if spec.form == "low-rank" else 0
        share = (spec.rank * (rows + columns) - saved) / (rows * columns)
        own = spec.bits if spec.form != "low-rank" else spec.bits * share
        bits = own + (Spec("low-rank", "", spec.rank, spec.factors).bits * share if spec.form == "repair" else 0.0)
        bars.append({"name": name, "label": spec.label, "bits": f"{bits:.2f}", "width": f"{min(100.0, 100 * bits / 16):.1f}"})
    return bars


def _spectra(report: Report) -> list[dict[str, Any]]:
    """For each layer the path of log10 sigma^2 over rank, in a box of 100 by 40."""
    drawn = []
    for one in report.facts:
        values = spectrum(one)
        top = max(values[0], 1e-30)
        points = [
            f"{100 * number / len(values):.1f} {min(40.0, -40 * _log(value / top) / DECADES):.1f}"
            for number, value in enumerate(values)
        ]
        spec = report.layers.get(one.name, Spec("whole"))
        rank = spec.rank if spec.form == "low-rank" else 0
        at = f"{100 * rank / len(one.energies):.1f}" if rank else ""
        drawn.append({"name": one.name, "path": "M" + "L".join(points), "rank": rank, "at": at})
    return drawn


def _log(value: float) -> float:
    return math.log10(max(value, 1e-30))
