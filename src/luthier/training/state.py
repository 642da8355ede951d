"""What a run must know to go on: how far it is, and what it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.config import RunConfig
from luthier.errors import CheckpointError, bulleted

SMOOTHING = 0.9
# What a key was in runs that began before there was such a key.
DEFAULTS = {
    key: own.get_default(call_default_factory=True) for key, own in RunConfig.model_fields.items() if not own.is_required()
}

# Keys that may change between a run and its resumption: places, and how often something is written or looked at.
# Data and model may have moved; what they hold is compared by sha256 and fingerprint.
FREE_KEYS = frozenset(
    {"data", "eval_data", "model", "out", "offline", "memory", "recompute_layers", "data_cache"}
    | {"eval_every", "save_every", "keep_checkpoints"}
)


@dataclass
class TrainState:
    """How far the run is. All randomness is a function of (seed, step) and the order one of (seed, examples), so that
    `step` and `examples` are at once the position in the schedule, in the data and in the random numbers."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_average: float = 0.0
    loss_weight: float = 0.0
    peak_rss_bytes: int = 0

    def add_loss(self, loss: float) -> float:
        """Take in one step's loss and return the smoothed one: an exponential average (0.9) without the bias of its start."""
        self.loss_first = loss if self.loss_first is None else self.loss_first
        self.loss_last = loss
        self.loss_average = SMOOTHING * self.loss_average + (1 - SMOOTHING) * loss
        self.loss_weight = SMOOTHING * self.loss_weight + (1 - SMOOTHING)
        return self.loss_average / self.loss_weight

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainState:
        """Raises TypeError if keys are missing or unknown. Checkpoints of before they were counted computed all tokens."""
        return cls(**{"computed_tokens": content.get("tokens", 0), **content})


@dataclass(frozen=True)
class Identity:
    """What decides the numbers of a run: its configuration, its data, its base model, and what its terms started from.

    initial_sha256: of the `Start`, empty where A was drawn and B = 0.
    """

    config: dict[str, Any] = field(default_factory=dict)
    data_sha256: str = ""
    eval_data_sha256: str | None = None
    base_fingerprint: str = ""
    initial_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def refuse_other_config(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError naming every key that differs from the one the run was started with.

        A key that there was not yet had its default.
        """
        then = {**{key: DEFAULTS[key] for key in config if key in DEFAULTS}, **self.config}
        problems = [
            f"{key} was {then.get(key)!r} and is now {config.get(key)!r}"
            for key in sorted(then.keys() | config.keys())
            if key not in FREE_KEYS and then.get(key) != config.get(key)
        ]
        if problems:
            raise CheckpointError(
                "a run goes on with the configuration it was started with; config.resolved.yaml has changed:\n"
                f"{bulleted(problems)}\nPut that back, or start a new run with `luthier train`."
            )

    def refuse_other_data(self, data_sha256: str, eval_data_sha256: str | None) -> None:
        """Raise CheckpointError if the training or evaluation data is not what the run was started with."""
        pairs = [("data", self.data_sha256, data_sha256), ("eval_data", self.eval_data_sha256, eval_data_sha256)]
        problems = [f"{name}: sha256 was {_short(then)} and is now {_short(now)}" for name, then, now in pairs if then != now]
        if problems:
            raise CheckpointError(
                f"a run goes on with the data it was started with; it has changed:\n{bulleted(problems)}\n"
                "Put the files back, or start a new run with `luthier train`."
            )

    def refuse_other_base(self, base_fingerprint: str) -> None:
        """Raise CheckpointError if the base model is another one."""
        if self.base_fingerprint != base_fingerprint:
            raise CheckpointError(
                "a run goes on with the base model it was started with; its weights have changed: fingerprint was "
                f"{_short(self.base_fingerprint)} and is now {_short(base_fingerprint)}. Put it back, or start a new run."
            )


def _short(sha256: str | None) -> str:
    return f"{sha256[:12]}..." if sha256 else "none"
