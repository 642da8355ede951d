"""What an export says of itself: the files, how they were made, what that costs, and what opened them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.export.choices import Measured
from luthier.export.verification import Verification


@dataclass
class ExportReport:
    """What was written. files: names in `out`; dtype, base: how and into what it was merged, None for adapters; tied: whether
    head and embedding are one matrix; kinds: tensors of a GGUF file by type; measured: each way of merging on the run's rows,
    empty without rows; recommended: which of them to take, recommendation: that in words; verification: what opened it, and
    how it compared; notes: what a person should be told."""

    to: str
    out: str
    files: list[str] = field(default_factory=list)
    size_bytes: int = 0
    dtype: str | None = None
    base: str | None = None
    tied: bool | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    recommended: Measured | None = None
    recommendation: str | None = None
    verification: list[Verification] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: report is a list of choices, recommended one of them or null, verification a list."""
        plain = ("to", "out", "files", "size_bytes", "dtype", "base", "tied", "kinds", "recommendation", "notes")
        return {
            **{key: getattr(self, key) for key in plain},
            "report": [one.to_json() for one in self.measured],
            "recommended": None if self.recommended is None else self.recommended.to_json(),
            "verification": [one.to_json() for one in self.verification],
        }
