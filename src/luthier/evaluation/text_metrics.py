"""BLEU, chrF and ROUGE of answers with one or several references, through the libraries that papers report them with."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from luthier.errors import ConfigError
from luthier.evaluation.bootstrap import Array, Figure, mean_of
from luthier.evaluation.measures import LIBRARIES

BLEU_ORDER = 4
CHRF_ORDER, CHRF_BETA = 6, 2.0
ROUGE = ("rouge1", "rouge2", "rougeL")


def require(metrics: Sequence[str]) -> None:
    """Raise ConfigError with the command that installs them if a library that one of `metrics` needs is missing."""
    missing = []
    for library in dict.fromkeys(LIBRARIES[name] for name in metrics if name in LIBRARIES):
        try:
            importlib.import_module(library.replace("-", "_"))
        except ModuleNotFoundError as error:
            missing.append(f"{library} ({error.name} is missing)")
    if missing:
        asked = ", ".join(name for name in metrics if name in LIBRARIES)
        raise ConfigError(
            f"{asked} need libraries that are not installed: {', '.join(missing)}. "
            "Install them with: pip install 'luthier[metrics]'"
        )


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Figure, Array]:
    """Corpus BLEU, 0 to 100, as sacrebleu computes it with its defaults (13a tokens, exponential smoothing), and of each row.

    references: one list a row, not all of the same length. Terms of a row, (10,): length of the answer, length of the
    closest reference, matching n-grams for n = 1 to 4, and n-grams in the answer. Source: Post 2018, arXiv:1804.08771.
    """
    from sacrebleu.metrics import BLEU

    # force: texts that are tokenized already, as in E2E, are what they are.
    terms = _statistics(BLEU(force=True), answers, references)
    return Figure("bleu", terms, _bleu_of_sums), _bleu_of_sums(terms)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Figure, Array]:
    """Corpus chrF, 0 to 100, as sacrebleu computes it with its defaults, and the chrF of each row, (N,).

    Terms of a row, (18,): for n = 1 to 6 the character n-grams of the answer, of the reference that fits it best, and of
    both. Source: Popovic 2015, W15-3049.
    """
    from sacrebleu.metrics import CHRF

    terms = _statistics(CHRF(char_order=CHRF_ORDER, beta=int(CHRF_BETA)), answers, references)
    return Figure("chrf", terms, _chrf_of_sums), _chrf_of_sums(terms)


def rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[Figure], Array]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1, each row's with its best reference; and each row's ROUGE-L, (N,).

    As the rouge-score package computes it without stemming; its tokens are runs of a-z and 0-9, so that it says little
    about other scripts. Source: Lin 2004, W04-1013.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    rows = [scorer.score_multi(list(own), answer) for answer, own in zip(answers, references, strict=True)]
    scores = {name: np.asarray([row[name].fmeasure for row in rows], dtype=np.float64) for name in ROUGE}
    return [mean_of(name, scores[name]) for name in ROUGE], scores["rougeL"]


def _statistics(metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """What each row adds to a corpus score, (N, k): the counts that sacrebleu's own significance tests resample.

    sacrebleu keeps the method for itself; the extra pins the versions that have it, and a test compares the outcome with
    its public corpus score.
    """
    columns = [list(column) for column in zip_longest(*references)]
    return np.asarray(metric._extract_corpus_statistics(list(answers), columns), dtype=np.float64)


def _bleu_of_sums(sums: Array) -> Array:
    """bp x the geometric mean of the precisions, x 100; a precision of 0 becomes 1 / (2^k total) for the k-th of them.

    Without any match, or without n-grams of an order, the score is 0.
    """
    length, reference = sums[:, 0], sums[:, 1]
    right, total = sums[:, 2 : 2 + BLEU_ORDER], sums[:, 2 + BLEU_ORDER :]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        missed = np.cumsum(right == 0, axis=1)
        precision = np.where(right > 0, right / total, 1 / (2.0**missed * total))
        scores = 100 * penalty * np.exp(np.log(precision).mean(1))
    return np.where((right.sum(1) > 0) & (total > 0).all(1), scores, 0.0)


def _chrf_of_sums(sums: Array) -> Array:
    """(1 + b^2) P R / (b^2 P + R) x 100, P and R the means of the precisions and recalls of the orders both sides have."""
    given, wanted, both = (sums[:, place::3] for place in range(3))
    counted = (given > 0) & (wanted > 0)
    orders = np.maximum(counted.sum(1), 1)
    precision = np.divide(both, given, out=np.zeros_like(both), where=counted).sum(1) / orders
    recall = np.divide(both, wanted, out=np.zeros_like(both), where=counted).sum(1) / orders
    weight = CHRF_BETA**2
    bottom = weight * precision + recall
    top = 100 * (1 + weight) * precision * recall
    return np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0)
