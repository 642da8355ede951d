"""What a compression found, as JSON and as a page: sizes, figures with intervals, speeds, ranks, bits, and what to ship."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.compression.candidates import LayerFacts
from luthier.compression.measure import Cost, Quality
from luthier.compression.planning import Plan
from luthier.compression.specs import Spec
from luthier.pages.page import Tile, render_page
from luthier.units import count_text, duration_text, number_text, percent_text, size_text

TEMPLATE = Path(__file__).with_name("assets") / "compression.html"
PAGE, FIGURES = "report.html", "report.json"
SPECTRUM_POINTS = 48


@dataclass
class Candidate:
    """One model that was measured. loss: on the evaluation text; validation_loss: on the text that decided; expected_rise: of
    the loss, before it was built."""

    name: str
    loss: float
    validation_loss: float
    expected_rise: float
    size_bytes: int
    plan: Plan | None = None
    folder: Path | None = None
    quality: Quality | None = None
    cost: Cost | None = None
    healed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "validation_loss": self.validation_loss,
            "expected_rise": self.expected_rise,
            "healed": self.healed,
            "quality": None if self.quality is None else asdict(self.quality),
            "cost": None if self.cost is None else asdict(self.cost),
        }


@dataclass
class Report:
    """One run. form: "bitsandbytes" where others open the folder, else "luthier"; layers, tables: how each is stored."""

    model: str
    budget_text: str
    budget_bytes: int
    bits: str
    form: str
    candidates: list[Candidate]
    chosen: str
    facts: list[LayerFacts]
    layers: dict[str, Spec]
    tables: dict[str, str]
    origin: str
    calibration_tokens: int
    healed: int
    notes: list[str] = field(default_factory=list)
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    out: str = ""

    def named(self, name: str) -> Candidate | None:
        return next((one for one in self.candidates if one.name == name), None)

    @property
    def result(self) -> Candidate:
        found = self.named(self.chosen)
        assert found is not None
        return found

    def sentence(self) -> str:
        """What to ship, in one plain sentence."""
        result, plain = self.result, self.named("plain nf4")
        assert result.quality is not None
        size, share = size_text(result.size_bytes), percent_text(result.size_bytes / self.candidates[0].size_bytes)
        rise = (
            f"perplexity {number_text(result.quality.perplexity)} against {number_text(_perplexity(self.candidates[0]))} "
            "of the original"
        )
        if result.name == "plain nf4":
            return f"Ship plain 4-bit (NF4): at {size} ({share} of the original) nothing that was tried is better; {rise}."
        if plain is not None and plain.quality is not None and plain.size_bytes <= self.budget_bytes:
            beside = f"plain 4-bit (NF4) takes {size_text(plain.size_bytes)} and has {number_text(_perplexity(plain))}"
            if plain.quality.loss <= result.quality.loss:
                return f"Ship plain 4-bit (NF4) instead: {beside}; this result has {rise} at {size}."
            return f"Ship this result: {size} ({share} of the original), {rise}; {beside}."
        return f"Ship this result: {size} ({share} of the original), {rise}; plain 4-bit (NF4) does not fit the budget."

    def to_json(self) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        for spec in self.layers.values():
            kinds[spec.label] = kinds.get(spec.label, 0) + 1
        return {
            "model": self.model,
            "out": self.out,
            "form": self.form,
            "budget": self.budget_text,
            "budget_bytes": self.budget_bytes,
            "size_bytes": self.result.size_bytes,
            "chosen": self.chosen,
            "sentence": self.sentence(),
            "candidates": [one.to_json() for one in self.candidates],
            "layers": {name: asdict(spec) for name, spec in self.layers.items()},
            "tables": self.tables,
            "kinds": kinds,
            "calibration": {"origin": self.origin, "tokens": self.calibration_tokens},
            "heal_steps": self.healed,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
            "notes": self.notes,
        }


def _perplexity(one: Candidate) -> float:
    assert one.quality is not None
    return one.quality.perplexity


def write_report(folder: Path, report: Report) -> None:
    """report.json and report.html into the folder of the model."""
    content = report.to_json() | {"spectra": {one.name: _spectrum(one) for one in report.facts}}
    (folder / FIGURES).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_report(report), encoding="utf-8")


def render_report(report: Report) -> str:
    """The page as text."""
    result = report.result
    assert result.quality is not None
    values = {
        "name": report.model,
        "eyebrow": "Luthier compression",
        "lead": f"{size_text(report.candidates[0].size_bytes)} in 16 bits, {size_text(result.size_bytes)} now, "
        f"of {size_text(report.budget_bytes)} allowed, in {duration_text(report.seconds)}.",
        "notices": [report.sentence()],
        "notes": report.notes,
        "headline": _tiles(report),
        "header": ["model", "size", "perplexity", "loss above the original's", "same next token", "tokens/s, prompt",
                   "tokens/s, decoding", "energy a token"],
        "rows": [_row(one, one.name == report.chosen) for one in report.candidates],
        "layers": _layers(report),
        "spectra": _spectra(report),
        "text": f"Calibrated on {count_text(report.calibration_tokens)} tokens: {report.origin}.",
    }  # fmt: skip
    return render_page(TEMPLATE, values)


def _tiles(report: Report) -> list[Tile]:
    before, after = report.candidates[0], report.result
    assert before.quality is not None
    assert after.quality is not None
    tiles = [
        Tile("Size", size_text(after.size_bytes), size_text(before.size_bytes), big=True),
        Tile("Perplexity", number_text(after.quality.perplexity), number_text(before.quality.perplexity), big=True),
        Tile("Same next token", percent_text(after.quality.agreement), big=True),
    ]
    if before.cost and after.cost:
        speed = f"{after.cost.decode_tokens_per_second:.0f}"
        tiles.append(Tile("Tokens a second, decoding", speed, f"{before.cost.decode_tokens_per_second:.0f}", big=True))
    return tiles


def _row(one: Candidate, is_chosen: bool) -> dict[str, Any]:
    quality, cost = one.quality, one.cost
    assert quality is not None
    assert cost is not None
    cells = [
        ("the result: " if is_chosen else "") + one.name + (", healed" if one.healed else ""),
        size_text(one.size_bytes),
        _between(number_text(quality.perplexity), quality.perplexity_interval, number_text),
        _between(f"{quality.rise:+.4f}", quality.rise_interval, lambda value: f"{value:+.4f}"),
        _between(percent_text(quality.agreement), quality.agreement_interval, percent_text),
        f"{cost.prompt_tokens_per_second:,.0f}",
        f"{cost.decode_tokens_per_second:,.0f}",
        f"{1000 * cost.joules_per_token:.1f} mJ",
    ]
    return {"cells": cells, "chosen": is_chosen}


def _between(text: str, interval: tuple[float, float], show: Any) -> str:
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


def _spectrum(facts: LayerFacts) -> list[float]:
    """sigma^2 of the layer in the metric of its inputs, in nats, at evenly spread ranks."""
    energies = facts.energies
    step = max(1, len(energies) // SPECTRUM_POINTS)
    return [float(value) for value in energies[::step]]


def _spectra(report: Report) -> list[dict[str, Any]]:
    """For each layer the path of log10 sigma^2 over rank, in a box of 100 by 40."""
    drawn = []
    for one in report.facts:
        values = _spectrum(one)
        top = max(values[0], 1e-30)
        points = [
            f"{100 * number / max(1, len(values) - 1):.1f} {min(40.0, -40 * _log(value / top) / 8):.1f}"
            for number, value in enumerate(values)
        ]
        spec = report.layers.get(one.name, Spec("whole"))
        rank = spec.rank if spec.form == "low-rank" else 0
        at = f"{100 * rank / len(one.energies):.1f}" if rank else ""
        drawn.append({"name": one.name, "path": "M" + "L".join(points), "rank": rank, "at": at})
    return drawn


def _log(value: float) -> float:
    return math.log10(max(value, 1e-30))
