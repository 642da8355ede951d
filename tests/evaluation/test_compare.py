"""Several sets and two models: which metric goes where, paired differences, guards, and what --json says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from luthier.data import Dataset, Example
from luthier.errors import ConfigError, DataError, GuardError
from luthier.evaluation.bootstrap import mean_of
from luthier.evaluation.choice import Choice
from luthier.evaluation.compare import as_json, check_same_rows, metrics_for, raise_broken, report_on
from luthier.evaluation.guard import Guard
from luthier.evaluation.result import EvalResult, Judged
from luthier.evaluation.sets import EvalSet, Extras

EXAMPLE = Example([1, 2], [False, True], [1], "ask", "yes", "f.jsonl:1")
CHOICES = Extras(choices=[Choice(["a", "b"], [[1], [2]], 0)])


def eval_set(name: str = "dev", guard: Guard | None = None, extras: Extras | None = None) -> EvalSet:
    return EvalSet(name, Dataset([EXAMPLE], {"notes": []}), extras or Extras(), guard)


def result_of(right: list[float], losses: list[float] | None = None) -> EvalResult:
    rows = list(range(len(right)))
    texts = [f"text {row}" for row in rows]
    got = ["yes" if one else "no" for one in right]
    result = EvalResult({}, len(right))
    result.add(
        [mean_of("label_accuracy", right), mean_of("loss", losses if losses is not None else [1.0] * len(right))],
        Judged("label", rows, np.asarray(right) - 0.5, None, texts, ["yes"] * len(right), got, texts),
    )
    return result


def test_metrics_go_where_rows_allow_them() -> None:
    text, quiz = eval_set(), eval_set("quiz", extras=CHOICES)
    assert metrics_for([text, quiz], None) == [("loss", "exact"), ("loss", "choice")]
    assert metrics_for([text, quiz], ("loss", "json", "choice")) == [("loss", "json"), ("loss", "choice")]
    guards = [eval_set("a", Guard()), eval_set("b", Guard(), CHOICES), eval_set("c", Guard("json_f1", 0.1, False))]
    assert metrics_for([text, *guards], ("bleu",)) == [("bleu",), ("loss",), ("choice",), ("json",)]
    assert metrics_for(guards[:1], ("bleu",)) == [("loss",)]


@pytest.mark.parametrize(
    ("sets", "asked", "message"),
    [
        ([eval_set()], ("loss", "choice"), "a metric must be of use on a set; choice is of none"),
        (
            [eval_set()],
            ("choice",),
            "dev has no rows with choices, for which there are loss, exact, json, bleu",
        ),
        (
            [eval_set("quiz", extras=CHOICES)],
            ("exact",),
            "quiz has rows with choices, for which there are loss, choice",
        ),
        ([eval_set("w", Guard("choice_accuracy"))], None, "w has no rows with choices"),
    ],
)
def test_metrics_that_no_row_allows(sets: list[EvalSet], asked: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        metrics_for(sets, asked)
    assert message in str(caught.value)


def test_a_difference_is_paired_and_smaller_than_its_sides() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(2, 1, 80)
    tuned = base - 0.1 + 0.02 * generator.normal(0, 1, 80)
    report = report_on(eval_set(), result_of([1.0, 0.0] * 40, list(tuned)), result_of([1.0, 0.0] * 40, list(base)))
    low, high = report.differences["loss"].interval
    assert report.differences["loss"].value == pytest.approx(tuned.mean() - base.mean())
    assert low < -0.09
    assert high < -0.09
    assert report.intervals["loss"][1] - report.intervals["loss"][0] > 20 * (high - low)
    assert report.differences["label_accuracy"].interval == (0.0, 0.0)


def test_losses_in_different_tokens_are_not_compared() -> None:
    report = report_on(eval_set(), result_of([1.0, 0.0]), result_of([1.0, 1.0]), same_tokens=False)
    assert list(report.differences) == ["label_accuracy"]
    assert "the two models cut text into different tokens, so that their losses a token are not compared" in report.notes
    with pytest.raises(ConfigError, match="a guard on loss needs two models with the same tokens"):
        report_on(eval_set(guard=Guard()), result_of([1.0, 0.0]), result_of([1.0, 1.0]), same_tokens=False)


def test_rows_that_all_agree_are_said_to_show_no_spread() -> None:
    report = report_on(eval_set(), result_of([1.0] * 60), None)
    assert report.intervals["label_accuracy"] == (1.0, 1.0)
    assert report.notes == [
        "where all 60 rows agree, resampling them shows no spread; the rate of the other outcome may still be up to 5 % "
        "(rule of three)"
    ]
    few = report_on(eval_set(), result_of([0.0] * 3), None)
    assert few.notes == ["the rows are too few to say anything of a share on which all agree"]


def test_json_of_one_model_alone() -> None:
    content = json.loads(json.dumps(as_json([report_on(eval_set(), result_of([1.0, 0.0]), None)])))
    assert content.keys() == {"metrics", "rows", "intervals", "confusion", "notes", "sets"}
    assert content["metrics"] == {"label_accuracy": 0.5, "loss": 1.0}
    assert content["intervals"]["label_accuracy"] == [0.0, 1.0]
    assert content["confusion"] == [["yes", "no", 1]]
    assert content["sets"] == {"dev": {key: content[key] for key in content if key != "sets"}}


def test_json_of_two_models_and_a_guard() -> None:
    reports = [
        report_on(eval_set(), result_of([1.0, 1.0]), result_of([1.0, 0.0])),
        report_on(eval_set("wiki", Guard()), result_of([1.0] * 9, [1.5] * 9), result_of([1.0] * 9)),
    ]
    content = json.loads(json.dumps(as_json(reports)))
    assert (content["base"]["label_accuracy"], content["tuned"]["label_accuracy"], content["rows"]) == (0.5, 1.0, 2)
    assert content["difference"]["label_accuracy"]["value"] == 0.5
    assert content["intervals"].keys() == {"base", "tuned"}
    assert list(content["sets"]) == ["dev", "wiki"]
    guard = content["guards"]["wiki"]
    assert not content["guards_kept"]
    assert (guard["figure"], guard["bound"], guard["relative"], guard["kept"], guard["certain"]) == (
        "loss",
        0.02,
        True,
        False,
        True,
    )
    assert (guard["base"], guard["tuned"], guard["worse_by"], guard["allowed"]) == (1.0, 1.5, 0.5, pytest.approx(0.02))
    assert as_json(reports, base_key="vs", tuned_key="metrics")["metrics"] == reports[0].tuned.metrics
    with pytest.raises(GuardError) as caught:
        raise_broken(reports)
    assert caught.value.exit_code == 6
    assert "a guard did not hold:\n  - wiki: loss 1.0000 -> 1.5000, worse by 0.5000" in str(caught.value)
    raise_broken(reports[:1])


def test_models_are_compared_on_the_same_rows() -> None:
    check_same_rows("dev", [EXAMPLE], [EXAMPLE])
    with pytest.raises(DataError, match="models are compared on the same rows; of dev, 1 fit the one and 0 the other"):
        check_same_rows("dev", [EXAMPLE], [])
