"""BLEU, chrF and ROUGE equal their libraries' public scores, on corpora and on every resample."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from luthier.errors import ConfigError
from luthier.evaluation import text_metrics
from luthier.evaluation.bootstrap import resample

ANSWERS = [
    "The Vaults pub near Café Adriatic has a 5 star rating .",
    "Near Burger King is a cheap place.",
    "",
    "It is not family - friendly , and it is near the river in the city centre .",
    "a b",
]
REFERENCES = [
    ["The Vaults is a pub near Café Adriatic . It has a 5 star rating .", "There is a pub The Vaults ."],
    ["Near Burger King there is a cheap place to eat."],
    ["Something was expected here.", "And here.", "Nothing fits."],
    ["It is near the river , in the city centre , and not family - friendly ."],
    ["a b", "a"],
]


def padded(references: list[list[str]]) -> list[list[str | None]]:
    return [[row[place] if place < len(row) else None for row in references] for place in range(max(map(len, references)))]


def test_bleu_is_sacrebleus_on_the_corpus_and_on_resamples() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    figure, rows = text_metrics.bleu(ANSWERS, REFERENCES)
    bleu = metrics.BLEU(force=True)
    assert figure.value == pytest.approx(bleu.corpus_score(ANSWERS, padded(REFERENCES)).score)
    assert figure.value > 1
    draws = resample([figure], resamples=40, seed=0)["bleu"].draws
    picks = np.random.default_rng(0).integers(0, len(ANSWERS), (40, len(ANSWERS)))
    for draw, pick in zip(draws, picks, strict=True):
        expected = bleu.corpus_score([ANSWERS[row] for row in pick], padded([REFERENCES[row] for row in pick]))
        assert draw == pytest.approx(expected.score, abs=1e-9)
    # "a b" has no three words in a row, and without n-grams of an order there is no BLEU.
    assert rows[0] > rows[2] == rows[4] == 0


def test_chrf_is_sacrebleus_on_the_corpus_on_resamples_and_on_rows() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    figure, rows = text_metrics.chrf(ANSWERS, REFERENCES)
    chrf = metrics.CHRF()
    assert figure.value == pytest.approx(chrf.corpus_score(ANSWERS, padded(REFERENCES)).score)
    assert rows == pytest.approx([chrf.sentence_score(*pair).score for pair in zip(ANSWERS, REFERENCES, strict=True)])
    draws = resample([figure], resamples=20, seed=0)["chrf"].draws
    picks = np.random.default_rng(0).integers(0, len(ANSWERS), (20, len(ANSWERS)))
    for draw, pick in zip(draws, picks, strict=True):
        expected = chrf.corpus_score([ANSWERS[row] for row in pick], padded([REFERENCES[row] for row in pick]))
        assert draw == pytest.approx(expected.score, abs=1e-9)


def test_rouge_takes_the_best_reference_of_each_row() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    figures, rows = text_metrics.rouge(ANSWERS, REFERENCES)
    assert [figure.name for figure in figures] == ["rouge1", "rouge2", "rougeL"]
    for figure in figures:
        best = [
            max(scorer.score(reference, answer)[figure.name].fmeasure for reference in own)
            for answer, own in zip(ANSWERS, REFERENCES, strict=True)
        ]
        assert figure.value == pytest.approx(np.mean(best))
    assert rows[4] == 1.0


def test_nothing_in_common_and_all_the_same() -> None:
    pytest.importorskip("sacrebleu")
    for metric in (text_metrics.bleu, text_metrics.chrf):
        assert metric(["123"], [["quite another text"]])[0].value == 0
        assert metric(["one two three four five"], [["one two three four five"]])[0].value == pytest.approx(100)


def test_a_missing_library_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError) as caught:
        text_metrics.require(("loss", "bleu", "rouge"))
    assert str(caught.value) == (
        "bleu, rouge need libraries that are not installed: sacrebleu (sacrebleu is missing), rouge-score (rouge_score is "
        "missing). Install them with: pip install 'luthier[metrics]'"
    )
    text_metrics.require(("loss", "exact", "label"))
