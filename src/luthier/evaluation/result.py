"""What an evaluation found: figures of all rows, and what each metric says of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from luthier.evaluation.answers import Answer
from luthier.evaluation.bootstrap import Array, Figure
from luthier.evaluation.json_match import FieldCount


@dataclass(frozen=True, eq=False)
class Judged:
    """What a metric says of each row it could judge. rows: their places among the rows evaluated.

    scores: (N,), higher is better; perfect: the best score there is, None where there is none. got: "" where nothing is given.
    """

    metric: str
    rows: list[int]
    scores: Array
    perfect: float | None
    prompt: list[str]
    expected: list[str]
    got: list[str]
    where: list[str]


@dataclass
class EvalResult:
    """metrics: the figures and counts asked for, by the names in `measures.GIVES`; shares are 0 to 1.

    rows: how many rows were evaluated. answers: of the rows that expect one, in their order. notes: what was left out.
    figures: what intervals are made from. judged: what each metric says of each row. fields: of JSON answers, by their path.
    """

    metrics: dict[str, float]
    rows: int
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list, compare=False, repr=False)
    judged: list[Judged] = field(default_factory=list, compare=False, repr=False)
    fields: dict[str, FieldCount] = field(default_factory=dict)

    def add(self, figures: Sequence[Figure], judged: Judged) -> None:
        self.metrics |= {figure.name: figure.value for figure in figures}
        self.figures += figures
        self.judged.append(judged)
