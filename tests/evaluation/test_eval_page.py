"""The page of an evaluation: every figure on it, worst cases first, and harmless whatever a model writes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from luthier.data import Dataset
from luthier.evaluation.answers import Answer, mark_answers
from luthier.evaluation.bootstrap import mean_of
from luthier.evaluation.compare import SetReport, report_on
from luthier.evaluation.guard import Guard
from luthier.evaluation.page import render_evaluation
from luthier.evaluation.result import EvalResult, Judged
from luthier.evaluation.sets import EvalSet

HOSTILE = "</script><script>alert(1)</script>'\"><img src=x onerror=alert(1)> {{ 7*7 }} \x1b[2J\u202e"
VOID = {"meta", "br", "img", "input", "link", "hr"}
EXPECTED = ['{"a": 1, "b": 2}', '{"a": 2}', '{"a": 3}']


class Page(HTMLParser):
    """Notices a tag that is not closed; keeps tags and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def json_result(got: list[str], losses: list[float]) -> EvalResult:
    where = [f"rows.jsonl:{row + 1}" for row in range(3)]
    answers = [
        Answer(f"ask {row}", wanted, given, wanted == given)
        for row, (wanted, given) in enumerate(zip(EXPECTED, got, strict=True))
    ]
    result = EvalResult({}, 3, answers)
    asked = [answer.prompt for answer in answers]
    result.add(
        [mean_of("loss", losses)], Judged("loss", [0, 1, 2], -np.asarray(losses), None, asked, EXPECTED, [""] * 3, where)
    )
    marks = mark_answers(answers, ("exact", "json"), None, where)
    result.add(marks.figures, Judged(marks.scored_by, [0, 1, 2], marks.scores, 1.0, asked, EXPECTED, got, where))
    result.metrics |= marks.counts
    result.fields = marks.fields
    return result


def label_result(chosen: list[str], expected: list[str]) -> EvalResult:
    margins = [0.5 if one == other else -1.5 - row for row, (one, other) in enumerate(zip(chosen, expected, strict=True))]
    rows, texts = list(range(len(chosen))), [f"words {row}" for row in range(len(chosen))]
    result = EvalResult({}, len(chosen))
    right = [float(one == other) for one, other in zip(chosen, expected, strict=True)]
    result.add(
        [mean_of("label_accuracy", right)], Judged("label", rows, np.asarray(margins), None, texts, expected, chosen, texts)
    )
    return result


def reported(name: str, tuned: EvalResult, base: EvalResult | None = None, guard: Guard | None = None) -> SetReport:
    return report_on(EvalSet(name, Dataset([], {}), guard=guard), tuned, base)


def page_of(*reports: SetReport) -> Page:
    return Page(render_evaluation(reports, name="runs/one", base_name="base", paths={"dev": "some/dev.jsonl"}))


def test_figures_intervals_worst_cases_and_examples() -> None:
    tuned = json_result(['{"a": 1, "b": 3}', '{"a": 2}', "oops"], [0.5, 0.1, 2.0])
    base = json_result(['{"a": 1, "b": 2}', "no", "no"], [1.5, 1.1, 1.0])
    page = page_of(reported("dev", tuned, base))
    for wanted in (
        "Luthier evaluation runs/one 3 rows in 1 set, compared with base.",
        "3 rows of some/dev.jsonl",
        "figure base tuned change",
        "JSON invalid answers 2 1",
        "Worst cases by fields of JSON",
        "Cases that got worse by fields of JSON",
        "Base differs",
        "Base: loss a token 1.0000",
        "First rows, by fields of JSON",
        "Worst cases by loss a token",
        "JSON fields, key by key field expected given right F1 a 3 2 2 80 %",
    ):
        assert wanted in page.text, wanted
    worst = page.text.partition("Worst cases by fields of JSON")[2]
    assert worst.index("rows.jsonl:3") < worst.index("rows.jsonl:1")
    assert "rows.jsonl:2" not in worst.partition("Cases that got worse")[0]
    assert "rows.jsonl:3: loss a token 2.0000" in page.text
    assert re.search(r"loss 1\.2000 1\.\d+ to 1\.\d+ 0\.8667 .* -0\.3333", page.text)
    marks = {str(attributes["class"]) for tag, attributes in page.tags if "mark " in str(attributes.get("class"))}
    assert marks == {"mark exact", "mark differs"}


def test_a_single_model_has_no_other_column() -> None:
    page = page_of(reported("dev", json_result(EXPECTED, [0.1, 0.2, 0.3])))
    assert "figure tuned" in page.text
    assert "Base" not in page.text
    assert "Worst cases by fields of JSON" not in page.text
    assert "change" not in page.text


def test_labels_have_their_confusion() -> None:
    expected = ["pay", "pay", "card", "card", "card"]
    page = page_of(reported("dev", label_result(["pay", "card", "card", "pay", "pay"], expected)))
    assert "expected, chosen card pay card 1 2 pay 1 1" in page.text
    assert "expected chosen rows card pay 2 pay card 1" in page.text
    shares = [attributes["style"] for tag, attributes in page.tags if tag == "td" and "style" in attributes]
    assert shares == ["--share:0.333", "--share:0.667", "--share:0.500", "--share:0.500"]
    worst = page.text.partition("Worst cases by label")[2].partition("First rows")[0]
    assert worst.index("words 4: the right label is 5.5000 nats behind the one chosen") < worst.index("words 1: ")
    many = [f"label {row}" for row in range(40)]
    page = page_of(reported("dev", label_result(many[1:] + many[:1], many)))
    assert not any(attributes.get("class") == "confusion" for _, attributes in page.tags)
    assert "label 0 label 1 1" in page.text
    assert "No label was taken for another." in page_of(reported("dev", label_result(["a", "b"], ["a", "b"]))).text


@pytest.mark.parametrize(("loss", "kind"), [(1.0, "kept"), (3.0, "broken")])
def test_guards_are_said(loss: float, kind: str) -> None:
    base, tuned = json_result(EXPECTED, [1.0] * 3), json_result(EXPECTED, [loss] * 3)
    page = page_of(reported("dev", tuned, base), reported("wiki", tuned, base, Guard()))
    verdicts = [attributes["class"] for tag, attributes in page.tags if "verdict" in str(attributes.get("class"))]
    assert verdicts == [f"verdict {kind}"]
    assert ("notice" in [attributes.get("class") for _, attributes in page.tags]) == (kind == "broken")
    assert f"Guard wiki: loss 1.0000 -> {loss:.4f}" in page.text


def test_nothing_is_loaded_and_hostile_text_stays_text() -> None:
    tuned = json_result([HOSTILE, HOSTILE, "x" * 10_000], [1.0, 2.0, 3.0])
    report = reported("dev", tuned)
    report.notes.append(HOSTILE)
    text = render_evaluation([report], name=HOSTILE, base_name=HOSTILE, paths={"dev": HOSTILE})
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "link", "iframe", "form")
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    policy = next(str(attributes["content"]) for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "x" * 4_001 not in text


def test_the_same_page_twice() -> None:
    report = reported("dev", json_result(EXPECTED, [0.1, 0.2, 0.3]))
    pages = {render_evaluation([report], name="a", base_name="base", paths={}) for _ in range(2)}
    assert len(pages) == 1
