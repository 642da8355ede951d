"""What a compression found, as figures to keep: sizes, quality with intervals, speeds, memory, and what to ship."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.compression.candidates import LayerFacts
from luthier.compression.footprint import Footprint
from luthier.compression.measure import Cost, Quality, Windows, loss_difference
from luthier.compression.planning import Plan
from luthier.compression.specs import Spec
from luthier.compression.tasks import task_differences, task_intervals
from luthier.evaluation.bootstrap import Interval
from luthier.evaluation.measures import LOWER_IS_BETTER, TITLES, amount_text, amounts_text, figure_text
from luthier.evaluation.result import EvalResult
from luthier.units import number_text, percent_text, size_text

ORIGINAL, PLAIN = "original", "plain nf4"
SPECTRUM_POINTS = 48


@dataclass
class Candidate:
    """One model that was measured. loss: on the evaluation text; validation_loss: on the text that decided; expected_rise: of
    the loss, before it was built. healed: another one, trained. windows, task, footprint: what it did where it was measured."""

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
    windows: Windows | None = None
    task: EvalResult | None = None
    footprint: Footprint | None = None


@dataclass
class Report:
    """One run. form: "bitsandbytes" where others open the folder, else "luthier"; layers, tables: how each is stored;
    heal_steps: as many as were asked for, whether or not what they made is the result."""

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
    heal_steps: int
    notes: list[str] = field(default_factory=list)
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    out: str = ""
    measured_on: str = ""

    def named(self, name: str) -> Candidate | None:
        return next((one for one in self.candidates if one.name == name), None)

    @property
    def original(self) -> Candidate:
        return self.candidates[0]

    @property
    def result(self) -> Candidate:
        found = self.named(self.chosen)
        assert found is not None
        return found

    def beside_plain(self, one: Candidate) -> tuple[float, Interval] | None:
        """The loss of a candidate less that of plain NF4, paired window by window; None for either of the two ends."""
        plain = self.named(PLAIN)
        if plain is None or plain is one or one.windows is None or plain.windows is None:
            return None
        return loss_difference(one.windows, plain.windows)

    def sentence(self) -> str:
        """What to ship, in one plain sentence, and where there is a task a second one on it."""
        result, plain = self.result, self.named(PLAIN)
        size = f"{size_text(result.size_bytes)} ({percent_text(result.size_bytes / self.original.size_bytes)} of the original)"
        rise = f"perplexity {_perplexity(result)} against {_perplexity(self.original)} of the original"
        if result.name == PLAIN or plain is None or plain.quality is None:
            found = f"Ship plain 4-bit (NF4): at {size} nothing that was tried is better; {rise}."
        elif plain.size_bytes > self.budget_bytes:
            found = f"Ship this result: {size}, {rise}; plain 4-bit (NF4) does not fit the budget."
        else:
            found = self._beside_plain_sentence(plain, size, rise)
        return found + self._task_sentence()

    def _beside_plain_sentence(self, plain: Candidate, size: str, rise: str) -> str:
        """Which of the result and plain NF4 to ship, where both fit."""
        result, apart = self.result, self.beside_plain(self.result)
        assert apart is not None
        assert result.quality is not None
        low, high = apart[1]
        beside = f"plain 4-bit (NF4) takes {size_text(plain.size_bytes)} and has {_perplexity(plain)}"
        if low > 0:
            return f"Ship plain 4-bit (NF4) instead: {beside}; this result has {rise} at {size_text(result.size_bytes)}."
        if high < 0:
            return f"Ship this result: {size}, {rise}; {beside}."
        smaller = "plain 4-bit (NF4)" if plain.size_bytes <= result.size_bytes else "this result"
        return (
            f"Ship {smaller}, the smaller of two between which {result.quality.windows} windows show no difference: "
            f"this result takes {size} with {rise}; {beside}."
        )

    def _task_sentence(self) -> str:
        result, plain, original = self.result, self.named(PLAIN), self.original
        if result.task is None or original.task is None:
            return ""
        name = task_figure(result.task)
        own, before = result.task.metrics[name], original.task.metrics[name]
        found = (
            f" On {result.task.rows} rows of the task this result's {TITLES[name]} is {figure_text(name, own)}, the original's "
            f"{figure_text(name, before)} ({_apart(name, result.task, original.task)})"
        )
        if plain is not None and plain is not result and plain.task is not None:
            found += f", plain 4-bit's {figure_text(name, plain.task.metrics[name])} ({_apart(name, result.task, plain.task)})"
        return found + "."

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
            "candidates": [self._candidate_json(one) for one in self.candidates],
            "layers": {name: asdict(spec) for name, spec in self.layers.items()},
            "tables": self.tables,
            "kinds": kinds,
            "calibration": {"origin": self.origin, "tokens": self.calibration_tokens},
            "measured_on": self.measured_on,
            "heal_steps": self.heal_steps,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
            "notes": self.notes,
        }

    def _candidate_json(self, one: Candidate) -> dict[str, Any]:
        beside = self.beside_plain(one)
        return {
            "name": one.name,
            "size_bytes": one.size_bytes,
            "validation_loss": one.validation_loss,
            "expected_rise": one.expected_rise,
            "healed": one.healed,
            "quality": None if one.quality is None else asdict(one.quality),
            "loss_beside_plain_nf4": None if beside is None else _difference_json(beside),
            "task": None if one.task is None else self._task_json(one, one.task),
            "cost": None if one.cost is None else asdict(one.cost),
            "memory": None if one.footprint is None else asdict(one.footprint),
        }

    def _task_json(self, one: Candidate, task: EvalResult) -> dict[str, Any]:
        plain = self.named(PLAIN)
        others = {"original": self.original, "plain_nf4": plain}
        beside = {
            key: task_differences(task, other.task)
            for key, other in others.items()
            if other is not None and other is not one and other.task is not None
        }
        intervals = task_intervals(task)
        figures = {
            name: {"value": task.metrics[name], "interval": interval}
            | {f"beside_{key}": _difference_json(found[name]) for key, found in beside.items()}
            for name, interval in intervals.items()
        }
        return {"rows": task.rows, "figures": figures}


def task_figure(task: EvalResult) -> str:
    """The share of right answers, by its name."""
    return next(figure.name for figure in task.figures if figure.name not in LOWER_IS_BETTER)


def _apart(name: str, own: EvalResult, other: EvalResult) -> str:
    """`-1.5 points, -6.2 to +3.1 points`"""
    value, interval = task_differences(own, other)[name]
    if interval[0] == interval[1] == value == 0:
        return "no row apart"
    return f"{amount_text(name, value, signed=True)}, {amounts_text(name, interval, signed=True)}"


def _difference_json(found: tuple[float, Interval]) -> dict[str, Any]:
    return {"difference": found[0], "interval": found[1]}


def _perplexity(one: Candidate) -> str:
    assert one.quality is not None
    return number_text(one.quality.perplexity)


def spectrum(facts: LayerFacts) -> list[float]:
    """sigma^2 of the layer in the metric of its inputs, in nats, at evenly spread ranks."""
    energies = facts.energies
    step = max(1, len(energies) // SPECTRUM_POINTS)
    return [float(value) for value in energies[::step]]
