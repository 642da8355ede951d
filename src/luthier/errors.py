"""The errors a person can meet. Each carries the exit code that the command line ends with.

A message has three parts: the rule that was broken, what came instead, and what to try:
`rank must be between 1 and min(in, out) = 576; got 4096. Try --rank 16.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_LISTED_PROBLEMS = 20


class LuthierError(Exception):
    """Base of every error that is raised on purpose; `exit_code` is the command line's."""

    exit_code = 2


class ConfigError(LuthierError):
    """A flag, a key of a config file, or a name that leads nowhere."""


class ShapeError(LuthierError):
    """A tensor whose shape, dtype or layout does not fit."""


class AdapterError(LuthierError):
    """An adapter that cannot be attached, read or written."""


class ModelError(LuthierError):
    """A model whose files are missing, damaged or of a kind that is not supported."""

    exit_code = 3


class PreflightError(LuthierError):
    """Something that would make the run fail later: memory, disk, permissions, weights that are not finite."""

    exit_code = 3


class CheckpointError(LuthierError):
    """A run directory or checkpoint that is damaged, locked, or of another run."""

    exit_code = 3


class DataError(LuthierError):
    """Training or evaluation data that cannot be used as it is."""

    exit_code = 4


class NumericError(LuthierError):
    """NaN or Inf where a finite number is needed."""

    exit_code = 5


class GuardError(LuthierError):
    """A tuned model that is worse on a guarded set than its bound allows."""

    exit_code = 6


class Interrupted(LuthierError):
    """The person stopped the run; what was done is saved."""

    exit_code = 130


def bulleted(problems: Iterable[str]) -> str:
    """One line a problem, the first MAX_LISTED_PROBLEMS of them, then a count of the rest."""
    listed = list(problems)
    lines = [f"  - {problem}" for problem in listed[:MAX_LISTED_PROBLEMS]]
    if len(listed) > MAX_LISTED_PROBLEMS:
        lines.append(f"  ... and {len(listed) - MAX_LISTED_PROBLEMS} more")
    return "\n".join(lines)


def one_line(error: object, limit: int = 300) -> str:
    """What an error says as one line of at most `limit` characters, without a full stop at its end."""
    return " ".join(str(error).split())[:limit].rstrip(".")


def nearest(word: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
