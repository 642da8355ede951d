"""What can be said of all sets before any of them is measured: hours of one are not lost to a row of another."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from luthier.evaluation.evaluate import check_fit
from luthier.evaluation.json_match import check_expected
from luthier.evaluation.judging import check_rows
from luthier.evaluation.labels import check_labels, labels_of_rows
from luthier.evaluation.sets import EvalSet


def check_set(model: PreTrainedModel, one: EvalSet, metrics: Sequence[str], rows: int | None = None) -> None:
    """Raise DataError naming what among the first `rows` rows, or all, the model or one of `metrics` cannot judge.

    Rows beyond the model's positions or vocabulary; with "json", expected answers that are not JSON; with "label", answers
    that are none of the labels; and what `check_rows` says.
    """
    examples = one.dataset.examples[:rows]
    check_rows(examples, metrics)
    check_fit(model, examples)
    answering = [example for example in examples if example.completion is not None]
    if "json" in metrics:
        check_expected([example.completion or "" for example in answering], [example.where for example in answering])
    if "label" in metrics:
        check_labels(answering, one.extras.labels or labels_of_rows(answering))
