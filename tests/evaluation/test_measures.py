"""Names, directions and texts of the figures."""

from __future__ import annotations

import pytest

from luthier.errors import ConfigError
from luthier.evaluation.guard import GUARDABLE
from luthier.evaluation.measures import (
    COUNTS,
    GIVES,
    LIBRARIES,
    LOWER_IS_BETTER,
    METRICS,
    OF_A_HUNDRED,
    SHARES,
    TITLES,
    WRITTEN,
    amount_text,
    amounts_text,
    asked_by,
    check_metrics,
    figure_text,
    interval_text,
)


def test_every_figure_has_a_title_a_metric_and_one_kind() -> None:
    figures = [name for names in GIVES.values() for name in names]
    assert sorted(figures) == sorted(TITLES)
    kinds = [COUNTS, LOWER_IS_BETTER, OF_A_HUNDRED, SHARES]
    assert all(sum(name in kind for kind in kinds) == 1 for name in figures)
    assert [asked_by(name) for name in ("perplexity", "json_f1", "rougeL")] == ["loss", "json", "rouge"]
    assert set(WRITTEN) | set(LIBRARIES) <= set(METRICS)
    assert set(GUARDABLE) == set(figures) - COUNTS


def test_metrics_are_checked_and_taken_once() -> None:
    assert check_metrics(["loss", "bleu", "loss"]) == ("loss", "bleu")
    with pytest.raises(ConfigError, match=r"metrics are loss, .*; got 'rouge1'\. Did you mean 'rouge'\?"):
        check_metrics(["loss", "rouge1"])
    with pytest.raises(ConfigError, match=r"metrics are .*; got none\."):
        check_metrics([])


@pytest.mark.parametrize(
    ("name", "value", "text", "change"),
    [
        ("loss", 0.19444, "0.1944", "+0.1944"),
        ("exact_match", 0.855, "85.5 %", "+85.5 points"),
        ("rougeL", 0.5, "50 %", "+50.0 points"),
        ("bleu", 27.314, "27.31", "+27.31"),
        ("tokens", 4400, "4,400", "+4,400.00"),
    ],
)
def test_figures_as_people_read_them(name: str, value: float, text: str, change: str) -> None:
    assert figure_text(name, value) == text
    assert amount_text(name, value, signed=True) == change
    assert amount_text(name, value) == change[1:]
    assert figure_text(name, None) == "-"


def test_intervals_name_their_unit_once_where_it_is_a_word() -> None:
    assert interval_text("exact_match", (0.625, 1.0)) == "62.5 % to 100 %"
    assert amounts_text("exact_match", (-0.015, 0.02), signed=True) == "-1.5 to +2.0 points"
    assert amounts_text("loss", (0.1, 0.2)) == "0.1000 to 0.2000"
    assert interval_text("loss", None) == amounts_text("loss", None) == ""
