"""What a person asks of a compression, checked before a model is looked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from luthier.errors import ConfigError, nearest
from luthier.units import parse_size

Bits = Literal["auto", "16", "4"]
MAX_HEAL_STEPS = 100_000


@dataclass(frozen=True)
class Budget:
    """Bytes of all weights that are written, head and embedding included: a share of the model in 16 bits, or a number."""

    text: str
    share: float | None = None
    size_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`60%` or `80MB`. Raises ConfigError for anything else."""
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text)
        if match is not None:
            share = float(match.group(1)) / 100
            if not 0 < share <= 1:
                raise ConfigError(f"--budget in per cent lies above 0 and at most at 100; got {text!r}. Try --budget 40%.")
            return cls(text.strip(), share=share)
        try:
            size_bytes = parse_size(text if text.strip()[-1:].isalpha() else "")  # a bare number may have been meant as a share
        except ValueError as error:
            raise ConfigError(
                f"--budget is a share of the model in 16 bits, such as 40%, or a size, such as 80MB; got {text!r}."
            ) from error
        return cls(text.strip(), size_bytes=size_bytes)

    def bytes_of(self, numbers: int) -> int:
        """The budget for a model of so many numbers."""
        return self.size_bytes if self.size_bytes is not None else int((self.share or 0.0) * 2 * numbers)


@dataclass(frozen=True)
class CompressSettings:
    """One compression. Raises ConfigError for what cannot be.

    data: a file of calibration text, or None for text that the model writes itself; eval_data: what the result is measured
    on, or None for a part of the calibration text that is kept out of it. heal: training steps after the compression.
    bits: which storages are tried. windows, window: how much is calibrated on. seed: of generated text, and of healing.
    footprints: whether the memory of the models is measured, each in a process of its own.
    """

    model: str
    budget: Budget
    out: Path
    data: str | None = None
    eval_data: str | None = None
    heal: int = 0
    bits: Bits = "auto"
    seed: int = 0
    windows: int = 48
    window: int = 512
    eval_windows: int = 24
    offline: bool = False
    footprints: bool = True

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ConfigError(
                f"--bits is one of {', '.join(get_args(Bits))}; got {self.bits!r}.{nearest(self.bits, get_args(Bits))}"
            )
        if not 0 <= self.heal <= MAX_HEAL_STEPS:
            raise ConfigError(f"--heal is a number of steps, 0 to {MAX_HEAL_STEPS}; got {self.heal}.")
        if self.windows < 2 or self.window < 16 or self.eval_windows < 1:
            raise ConfigError(
                "calibration takes at least 2 windows of 16 tokens, evaluation 1; "
                f"got {self.windows} of {self.window} and {self.eval_windows}."
            )
        if _is_there(self.out):
            raise ConfigError(
                f"a compressed model goes to a new folder; {self.out} exists. Choose another --out, or remove it."
            )


def _is_there(path: Path) -> bool:
    """Whether something of that name is there, be it a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--out must be a name that a folder can have; {str(path)[:200]!r}: {reason}.") from error
    return True
