"""The metrics of an evaluation by name: what can be asked for, what comes out, which way is better, how it is written.

Imports nothing heavy, so that a command line can check names before a model's libraries are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import ConfigError, nearest
from luthier.units import count_text, number_text, percent_text

# What can be asked for, and the figures that each gives.
GIVES: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "perplexity", "tokens"),
    "exact": ("exact_match",),
    "json": ("json_match", "json_f1", "json_precision", "json_recall", "json_valid", "json_invalid"),
    "label": ("label_accuracy",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "choice": ("choice_accuracy", "choice_accuracy_per_token"),
}
METRICS = tuple(GIVES)
# Those that compare an answer that the model writes.
WRITTEN = ("exact", "json", "bleu", "chrf", "rouge")
# Those that need a library of the extra `metrics`: its name on PyPI by the metric.
LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge-score"}
# How many of something: they have no interval and no direction.
COUNTS = frozenset({"tokens", "json_invalid"})
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
# BLEU and chrF go from 0 to 100; the others that are not a loss are shares of one.
OF_A_HUNDRED = frozenset({"bleu", "chrf"})
SHARES = frozenset(name for figures in GIVES.values() for name in figures) - COUNTS - LOWER_IS_BETTER - OF_A_HUNDRED

TITLES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "tokens": "supervised tokens",
    "exact_match": "exact match",
    "json_match": "JSON match",
    "json_f1": "JSON fields F1",
    "json_precision": "JSON fields precision",
    "json_recall": "JSON fields recall",
    "json_valid": "JSON valid",
    "json_invalid": "JSON invalid answers",
    "label_accuracy": "label accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "choice_accuracy": "choice accuracy",
    "choice_accuracy_per_token": "choice accuracy, per token",
}


def check_metrics(names: Sequence[str], what: str = "metrics are") -> tuple[str, ...]:
    """`names` without repeats. Raises ConfigError for one that is not known, and for none at all."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        hint = nearest(unknown[0], METRICS) if unknown else ""
        raise ConfigError(f"{what} {', '.join(METRICS)}; got {', '.join(map(repr, unknown)) or 'none'}.{hint}")
    return tuple(dict.fromkeys(names))


def asked_by(figure: str) -> str:
    """The metric that gives `figure`."""
    return next(name for name, figures in GIVES.items() if figure in figures)


def figure_text(name: str, value: float | None) -> str:
    """A figure as people read it: `93.5 %`, `27.31` BLEU, `0.1944`, `4,400` tokens; `-` for none."""
    if value is None:
        return "-"
    if name in COUNTS:
        return count_text(value)
    if name in SHARES:
        return percent_text(value)
    return f"{value:.2f}" if name in OF_A_HUNDRED else number_text(value)


def interval_text(name: str, interval: tuple[float, float] | None) -> str:
    """An interval of a figure: `62.5 % to 100 %`; nothing where there is none."""
    return "" if interval is None else " to ".join(figure_text(name, end) for end in interval)


def amount_text(name: str, difference: float, *, signed: bool = False) -> str:
    """How far apart two values of a figure are: `1.5 points`, `0.0213`; with its sign always, if signed."""
    return f"{_amount(name, difference, signed)}{' points' if name in SHARES else ''}"


def amounts_text(name: str, interval: tuple[float, float] | None, *, signed: bool = False) -> str:
    """An interval of a difference: `+1.5 to +2.0 points`; nothing where there is none."""
    if interval is None:
        return ""
    return f"{_amount(name, interval[0], signed)} to {amount_text(name, interval[1], signed=signed)}"


def _amount(name: str, difference: float, signed: bool) -> str:
    sign = "+" if signed else ""
    if name in SHARES:
        return f"{100 * difference:{sign}.1f}"
    digits = 2 if name in OF_A_HUNDRED or abs(difference) >= 10 else 4
    return f"{difference:{sign},.{digits}f}"
