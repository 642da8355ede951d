"""What is made of a model's written answers: exact match, JSON match, BLEU, chrF and ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from luthier.evaluation import text_metrics
from luthier.evaluation.bootstrap import Array, Figure, mean_of
from luthier.evaluation.json_match import FieldCount, match_json


@dataclass(frozen=True)
class Answer:
    """What a row asks, what it expects and what the model gave; exact: equal once white space around both is left out."""

    prompt: str
    expected: str
    got: str
    exact: bool


@dataclass
class Marks:
    """figures over the answers, counts beside them, and the score of each answer, (N,), by what the finest metric says.

    scored_by: which metric that is. fields: of JSON, by their path.
    """

    figures: list[Figure] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    scores: Array = field(default_factory=lambda: np.zeros(0))
    scored_by: str = "exact"
    fields: dict[str, FieldCount] = field(default_factory=dict)


def mark_answers(
    answers: Sequence[Answer], metrics: Sequence[str], references: Sequence[Sequence[str]] | None, where: Sequence[str]
) -> Marks:
    """Every metric of `metrics` that compares written answers.

    references: for each answer those that count as right, for BLEU, chrF and ROUGE; None for the expected answer alone.
    where: the rows' places, for errors. Raises what the metrics raise.
    """
    exact = [float(answer.exact) for answer in answers]
    marks = Marks(scores=np.asarray(exact))
    expected, got = [answer.expected for answer in answers], [answer.got for answer in answers]
    targets = references if references is not None else [[text] for text in expected]
    if "exact" in metrics:
        marks.figures.append(mean_of("exact_match", exact))
    if "json" in metrics:
        matched = match_json(expected, got, where)
        marks.figures += matched.figures
        marks.counts["json_invalid"] = matched.invalid
        marks.scores, marks.scored_by, marks.fields = matched.row_f1, "json", matched.fields
    if "bleu" in metrics:
        figure, scores = text_metrics.bleu(got, targets)
        marks.figures.append(figure)
        marks.scores, marks.scored_by = scores / 100, "bleu"
    if "chrf" in metrics:
        figure, scores = text_metrics.chrf(got, targets)
        marks.figures.append(figure)
        marks.scores, marks.scored_by = scores / 100, "chrf"
    if "rouge" in metrics:
        figures, scores = text_metrics.rouge(got, targets)
        marks.figures += figures
        marks.scores, marks.scored_by = scores, "rouge"
    return marks
