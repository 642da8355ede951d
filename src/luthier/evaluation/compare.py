"""Several sets, one model or two: every figure with its interval, differences paired row by row, and guards judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data import Example
from luthier.errors import ConfigError, DataError, GuardError
from luthier.evaluation.bootstrap import Interval, Resampled, resample
from luthier.evaluation.guard import Verdict, judge
from luthier.evaluation.labels import confusion
from luthier.evaluation.measures import LOWER_IS_BETTER, SHARES, WRITTEN, asked_by
from luthier.evaluation.result import EvalResult
from luthier.evaluation.sets import EvalSet
from luthier.units import percent_text

# With n rows that agree, the other outcome may still have a rate of 3 / n: with so few rows that is any rate.
LEAST_FOR_A_RATE = 3


@dataclass(frozen=True)
class Difference:
    """tuned - base of one figure, and its paired 95 % interval."""

    value: float
    interval: Interval


@dataclass
class SetReport:
    """What was found on one set. base: the model that `tuned` is compared with, None where it is alone.

    intervals, base_intervals, differences: by figure. verdict: where the set is a guard.
    """

    name: str
    tuned: EvalResult
    intervals: dict[str, Interval]
    base: EvalResult | None = None
    base_intervals: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)


def metrics_for(sets: Sequence[EvalSet], asked: Sequence[str] | None) -> list[tuple[str, ...]]:
    """The metrics to measure on each set: those asked for that its rows allow, and on a guard the one that it watches.

    asked None: loss and multiple choice on rows with choices, loss and exact match on all others.
    Raises ConfigError for a metric that no set allows, and for a set that allows none.
    """
    chosen: list[tuple[str, ...]] = []
    for one in sets:
        allowed = ("loss", "choice") if one.extras.choices is not None else ("loss", *WRITTEN, "label")
        if one.guard is not None:
            figure = one.guard.figure or ("choice_accuracy" if "choice" in allowed else "loss")
            wanted: Sequence[str] = (asked_by(figure),)
        else:
            wanted = asked if asked is not None else ("loss", "choice" if "choice" in allowed else "exact")
        chosen.append(tuple(name for name in wanted if name in allowed))
        if not chosen[-1]:
            kind = "has rows with choices" if "choice" in allowed else "has no rows with choices"
            raise ConfigError(
                f"every set needs a metric that its rows allow; {one.name} {kind}, for which there are {', '.join(allowed)}, "
                f"and {', '.join(wanted)} was asked for."
            )
    measured = {name for one, names in zip(sets, chosen, strict=True) if one.guard is None for name in names}
    unused = [name for name in asked or () if name not in measured]
    if unused and any(one.guard is None for one in sets):
        raise ConfigError(f"a metric must be of use on a set; {unused[0]} is of none: no --data file has rows that it needs.")
    return chosen


def check_same_rows(name: str, first: Sequence[Example], second: Sequence[Example]) -> None:
    """Raise DataError if two models, each with its own tokenizer, would be measured on different rows of a file."""
    if [example.where for example in first] != [example.where for example in second]:
        raise DataError(
            f"models are compared on the same rows; of {name}, {len(first)} fit the one and {len(second)} the other, whose "
            "tokens differ. Raise --max-length, or use --rows and --on-long error."
        )


def report_on(one: EvalSet, tuned: EvalResult, base: EvalResult | None, *, same_tokens: bool = True) -> SetReport:
    """Intervals of all figures, and where there are two models their paired differences and the guard's verdict.

    same_tokens: whether both models cut text into the same tokens; otherwise a loss a token is another quantity on each side
    and has no difference, which is noted.
    """
    after = resample(tuned.figures)
    report = SetReport(one.name, tuned, _intervals(after), notes=list(dict.fromkeys(tuned.notes)))
    report.notes += _all_alike(tuned)
    if base is None:
        return report
    before = resample(base.figures)
    report.base, report.base_intervals = base, _intervals(before)
    report.notes += [f"of the other model: {note}" for note in base.notes if note not in tuned.notes]
    shared = [name for name in after if name in before and (same_tokens or name not in LOWER_IS_BETTER)]
    if not same_tokens and LOWER_IS_BETTER & after.keys():
        report.notes.append("the two models cut text into different tokens, so that their losses a token are not compared")
    for name in shared:
        difference = after[name].minus(before[name])
        report.differences[name] = Difference(difference.value, difference.interval())
    if one.guard is not None:
        report.verdict = _judged(one, before, after, same_tokens)
    return report


def raise_broken(reports: Sequence[SetReport]) -> None:
    """Raise GuardError with a sentence for each guard that was broken, if any was."""
    broken = [report.verdict.sentence() for report in reports if report.verdict is not None and not report.verdict.kept]
    if broken:
        lines = "".join(f"\n  - {sentence}" for sentence in broken)
        guards = "a guard" if len(broken) == 1 else f"{len(broken)} guards"
        raise GuardError(
            f"tuning must not make a guarded set worse than its bound allows; {guards} did not hold:{lines}\n"
            "Train less (fewer steps, a lower --lr or --rank), mix in rows of that kind, or state a wider bound."
        )


def as_json(reports: Sequence[SetReport], *, base_key: str = "base", tuned_key: str = "tuned") -> dict[str, Any]:
    """What `eval --json` prints: the first set at the top, as if it were the only one, then every set by its name.

    One set gives metrics, rows and intervals; beside another model it gives the figures under base_key and tuned_key in
    place of metrics, intervals of both, and difference. Guards are listed with their verdicts.
    """
    found = {report.name: _set_json(report, base_key, tuned_key) for report in reports}
    content = {**found[reports[0].name], "sets": found}
    verdicts = {report.name: _verdict_json(report.verdict) for report in reports if report.verdict is not None}
    if verdicts:
        content |= {"guards": verdicts, "guards_kept": all(verdict["kept"] for verdict in verdicts.values())}
    return content


def _set_json(report: SetReport, base_key: str, tuned_key: str) -> dict[str, Any]:
    content: dict[str, Any]
    if report.base is None:
        content = {"metrics": report.tuned.metrics, "rows": report.tuned.rows, "intervals": report.intervals}
    else:
        content = {base_key: report.base.metrics, tuned_key: report.tuned.metrics, "rows": report.tuned.rows}
        content["intervals"] = {base_key: report.base_intervals, tuned_key: report.intervals}
        content["difference"] = {
            name: {"value": one.value, "interval": one.interval} for name, one in report.differences.items()
        }
    if report.tuned.fields:
        content["json_fields"] = {
            path: {"expected": one.expected, "given": one.given, "right": one.right, "f1": one.f1}
            for path, one in report.tuned.fields.items()
        }
    for judged in report.tuned.judged:
        if judged.metric == "label":
            pairs = confusion(judged.expected, judged.got)
            content["confusion"] = [[expected, got, rows] for (expected, got), rows in pairs.items() if expected != got]
    content["notes"] = report.notes
    return content


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    names = ("figure", "base", "tuned", "worse_by", "interval", "allowed", "kept", "certain")
    bound = {"bound": verdict.guard.bound, "relative": verdict.guard.relative}
    return {**{name: getattr(verdict, name) for name in names}, **bound, "sentence": verdict.sentence()}


def _judged(one: EvalSet, before: Mapping[str, Resampled], after: Mapping[str, Resampled], same_tokens: bool) -> Verdict:
    assert one.guard is not None
    figure = one.guard.figure or "loss"
    if not same_tokens and figure in LOWER_IS_BETTER and figure in after:
        raise ConfigError(
            f"a guard on {figure} needs two models with the same tokens; those of {one.name} differ. "
            "Watch another figure, such as FILE:exact_match=0.02."
        )
    return judge(one.name, one.guard, before, after)


def _intervals(figures: Mapping[str, Resampled]) -> dict[str, Interval]:
    return {name: figure.interval() for name, figure in figures.items()}


def _all_alike(result: EvalResult) -> list[str]:
    """A share of 0 or 1 has an interval of no width, since no choice of these rows gives another value."""
    ends = [figure for figure in result.figures if figure.name in SHARES and figure.value in (0.0, 1.0)]
    if not ends:
        return []
    rows = min(len(figure.terms) for figure in ends)
    if rows <= LEAST_FOR_A_RATE:
        return ["the rows are too few to say anything of a share on which all agree"]
    return [
        f"where all {rows} rows agree, resampling them shows no spread; the rate of the other outcome may still be up to "
        f"{percent_text(3 / rows)} (rule of three)"
    ]
