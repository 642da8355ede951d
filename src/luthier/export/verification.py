"""What a check of an export found, and when it passed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from luthier.export.compare import Difference

LARGEST_ERROR = 1e-4  # of logits: both sides compute in float32 with the same weights


@dataclass(frozen=True)
class Verification:
    """by: the program that opened the export; against: what it was compared with; bound: what was asked of it, in words;
    equal_answers, equal_tokens: shares of rows whose greedy text, and whose tokens, are the same, None if not looked at."""

    by: str
    against: str
    passed: bool
    bound: str
    difference: Difference
    equal_answers: float | None = None
    equal_tokens: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged_by_logits(by: str, difference: Difference, against: str) -> Verification:
    """Passed where no logit differs by more than LARGEST_ERROR of the largest."""
    bound = f"logits within {LARGEST_ERROR:g} of the largest"
    return Verification(by, against, difference.largest_logits_error <= LARGEST_ERROR, bound, difference)
