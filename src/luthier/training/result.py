"""What a finished run gives back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from luthier.errors import CheckpointError


@dataclass(frozen=True)
class RunResult:
    """The figures of a finished run. Paths are text, as they were given.

    seconds: time inside training steps, so that tokens / seconds = tokens_per_second; total_seconds: everything since
    the start of this process's run, loading, evaluation and saving included. peak_rss_bytes: the most memory the
    process has held. loss_first, loss_last: mean loss of the first and the last step. eval: the metrics on eval_data
    {"before": {...}, "after": {...}}, or None. computed_tokens: `tokens` with beginnings that rows of a step share counted
    once, 0 where it was not counted. samples: [{"prompt", "expected", "before", "after"}].
    adapter_dir is None for `method: full`, whose weights are in model_dir. nothing_to_do: the run was finished before.
    """

    run_dir: str
    adapter_dir: str | None
    model_dir: str | None
    report: str
    steps: int
    skipped_steps: int
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    seconds: float
    total_seconds: float
    loss_first: float | None
    loss_last: float | None
    peak_rss_bytes: int
    trainable_parameters: int
    total_parameters: int
    eval: dict[str, dict[str, float]] | None
    samples: list[dict[str, Any]]
    computed_tokens: int = 0
    nothing_to_do: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-able, without `eval` where there was no evaluation data."""
        content = asdict(self)
        if self.eval is None:
            del content["eval"]
        return content

    @classmethod
    def from_file(cls, path: Path) -> RunResult:
        """Read result.json, as `nothing_to_do`. Raises CheckpointError if it is not what `to_json` gives."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {one.name for one in fields(cls)}
            content = {"eval": None, **{key: value for key, value in content.items() if key in known}, "nothing_to_do": True}
            return cls(**content)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} must be the result of a run; it cannot be read ({error}).") from error
