"""The page of an evaluation: figures with their intervals, guards, confused labels, worst cases and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.evaluation.bootstrap import Interval
from luthier.evaluation.compare import SetReport
from luthier.evaluation.labels import confusion
from luthier.evaluation.measures import TITLES, amount_text, amounts_text, figure_text, interval_text
from luthier.evaluation.result import Judged
from luthier.pages.page import Tile, render_page
from luthier.units import count_text, number_text, percent_text

TEMPLATE = Path(__file__).with_name("assets") / "evaluation.html"
WORST, LOST, EXAMPLES = 8, 5, 5
MATRIX_LABELS, CONFUSED_PAIRS = 30, 30
LONGEST_TEXT = 4_000
RANGES = "Ranges below a figure are 95 % intervals from 2,000 resamples of the rows, paired where models are compared."
HEADLINES = ("loss", "exact_match", "json_f1", "label_accuracy", "bleu", "rougeL", "choice_accuracy_per_token")
_KINDS = {
    "loss": "loss a token", "label": "label", "choice": "choice", "exact": "exact match", "json": "fields of JSON",
    "bleu": "BLEU", "chrf": "chrF", "rouge": "ROUGE-L",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A figure in a table, with its interval below it."""

    text: str
    range: str = ""


def render_evaluation(reports: Sequence[SetReport], *, name: str, base_name: str, paths: dict[str, str]) -> str:
    """The page as text. name, base_name: what the models are called; paths: each set's file, by the set's name."""
    compared = any(report.base is not None for report in reports)
    rows = sum(report.tuned.rows for report in reports)
    lead = f"{count_text(rows)} rows in {len(reports)} {'set' if len(reports) == 1 else 'sets'}"
    broken = [report.verdict.sentence() for report in reports if report.verdict and not report.verdict.kept]
    values = {
        "name": name,
        "eyebrow": "Luthier evaluation",
        "lead": f"{lead}, compared with {base_name}." if compared else f"{lead}.",
        "notices": [f"Guard {sentence}." for sentence in broken],
        "notes": [RANGES],
        "headline": _headline(reports[0]),
        "sets": [_set(report, paths.get(report.name, ""), base_name) for report in reports],
    }
    return render_page(TEMPLATE, values)


def _headline(report: SetReport) -> list[Tile]:
    tiles = []
    for figure in HEADLINES:
        value = report.tuned.metrics.get(figure)
        if value is None:
            continue
        before = figure_text(figure, report.base.metrics[figure]) if report.base and figure in report.base.metrics else ""
        note = interval_text(figure, report.intervals.get(figure))
        tiles.append(Tile(_capital(TITLES[figure]), figure_text(figure, value), before, note, big=True))
    return tiles


def _set(report: SetReport, path: str, base_name: str) -> dict[str, Any]:
    about = f"{count_text(report.tuned.rows)} rows" + (f" of {path}" if path else "")
    return {
        "name": report.name,
        "about": about,
        "verdict": report.verdict.sentence() if report.verdict else "",
        "kept": report.verdict is not None and report.verdict.kept,
        "header": ["figure", "tuned"] if report.base is None else ["figure", base_name, "tuned", "change"],
        "rows": [_row(report, figure) for figure in report.tuned.metrics],
        "notes": [f"{_capital(note).rstrip('.')}." for note in report.notes],
        "fields": [
            [path, count_text(one.expected), count_text(one.given), count_text(one.right), percent_text(one.f1)]
            for path, one in report.tuned.fields.items()
        ],
        "confusion": next((_confusion(judged) for judged in report.tuned.judged if judged.metric == "label"), None),
        "groups": [group for judged in report.tuned.judged for group in _groups(report, judged, base_name)],
    }


def _row(report: SetReport, figure: str) -> list[Cell]:
    def measured(metrics: dict[str, float], intervals: dict[str, Interval]) -> Cell:
        return Cell(figure_text(figure, metrics.get(figure)), interval_text(figure, intervals.get(figure)))

    tuned = measured(report.tuned.metrics, report.intervals)
    if report.base is None:
        return [Cell(TITLES[figure]), tuned]
    change = report.differences.get(figure)
    moved = Cell("")
    if change is not None:
        ends = amounts_text(figure, change.interval, signed=True)
        moved = Cell(amount_text(figure, change.value, signed=True), ends)
    return [Cell(TITLES[figure]), measured(report.base.metrics, report.base_intervals), tuned, moved]


def _confusion(judged: Judged) -> dict[str, Any]:
    """A matrix where there are few labels, and the pairs that were confused most often."""
    counts = confusion(judged.expected, judged.got)
    labels = sorted({label for pair in counts for label in pair})
    pairs = [[expected, got, count_text(rows)] for (expected, got), rows in counts.items() if expected != got]
    if len(labels) > MATRIX_LABELS:
        return {"labels": [], "rows": [], "pairs": pairs[:CONFUSED_PAIRS]}
    rows = []
    for expected in labels:
        row = [counts.get((expected, got), 0) for got in labels]
        cells = [
            {"text": count_text(n) if n else "", "share": f"{n / max(1, sum(row)):.3f}", "right": got == expected}
            for got, n in zip(labels, row, strict=True)
        ]
        rows.append({"label": expected, "cells": cells})
    return {"labels": labels, "rows": rows, "pairs": pairs[:CONFUSED_PAIRS]}


def _groups(report: SetReport, judged: Judged, base_name: str) -> list[dict[str, Any]]:
    """Worst cases, cases that the other model did better, and examples, each where there are any."""
    other = next((one for one in (report.base.judged if report.base else ()) if one.metric == judged.metric), None)
    scores, kind = judged.scores, _KINDS[judged.metric]
    wrong = _wrong(judged)
    worst = [int(row) for row in np.argsort(scores, kind="stable") if wrong(int(row))][:WORST]
    found = [(f"Worst cases by {kind}", worst, judged.metric != "loss")]
    if other is not None:
        drop = other.scores - scores
        fell = [int(row) for row in np.argsort(-drop, kind="stable") if drop[row] > 0 and wrong(int(row))]
        if judged.metric in ("label", "choice"):
            fell = [row for row in fell if other.scores[row] > 0]
        found.append((f"Cases that got worse by {kind}", fell[:LOST], False))
    if judged.metric != "loss":
        found.append((f"First rows, by {kind}", list(range(min(EXAMPLES, len(scores)))), False))
    return [
        {"title": title, "open": is_open, "samples": [_sample(judged, other, row, base_name) for row in rows]}
        for title, rows, is_open in found
        if rows
    ]


def _wrong(judged: Judged) -> Callable[[int], bool]:
    """Whether a row is one that the model got wrong; every row has a loss to look at."""
    if judged.metric == "loss":
        return lambda row: True
    if judged.perfect is None:
        return lambda row: bool(judged.scores[row] < 0)
    return lambda row: bool(judged.scores[row] < judged.perfect)


def _sample(judged: Judged, other: Judged | None, row: int, base_name: str) -> dict[str, Any]:
    answers = [_answer("expected", "Expected", judged.expected[row])]
    if judged.metric == "loss":
        losses = [("after", "Loss a token", judged)] + (
            [("before", f"{_capital(base_name)}: loss a token", other)] if other else []
        )
        answers += [_answer(kind, label, number_text(-float(one.scores[row]))) for kind, label, one in losses if one]
    else:
        sides = ([("before", _capital(base_name), other)] if other else []) + [("after", "Answer", judged)]
        answers += [_answer(kind, label, one.got[row], judged.expected[row]) for kind, label, one in sides if one]
    return {
        "title": f"{judged.where[row]}: {_score_text(judged, row)}",
        "prompt": _cut(judged.prompt[row]),
        "answers": [one for one in answers if one["text"]],
    }


def _score_text(judged: Judged, row: int) -> str:
    score = float(judged.scores[row])
    if judged.metric in ("label", "choice"):
        unit = "nats" if judged.metric == "label" else "nats a token"
        place = "behind the one chosen" if score < 0 else "ahead of the next"
        return f"the right {judged.metric} is {number_text(abs(score))} {unit} {place}"
    return f"{_KINDS[judged.metric]} {number_text(abs(score))}"


def _answer(kind: str, label: str, text: str, expected: str | None = None) -> dict[str, str]:
    mark = "" if expected is None else "exact" if text.strip() == expected.strip() else "differs"
    return {"kind": kind, "label": label, "text": _cut(text) or ("(nothing)" if expected is not None else ""), "mark": mark}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
