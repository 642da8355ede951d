"""What an adapter is: its rank, scaling, variant and the layers it goes to."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

from luthier.errors import AdapterError, bulleted, nearest

ALL_LINEAR = "all-linear"
MATCH_SECONDS = 2.0


@dataclass(frozen=True)
class Variant:
    """`rank_stabilized`: s = alpha / sqrt(r), otherwise alpha / r. `magnitude`: the rows get lengths of their own (DoRA)."""

    rank_stabilized: bool
    magnitude: bool


VARIANTS = {
    "lora": Variant(rank_stabilized=False, magnitude=False),
    "rslora": Variant(rank_stabilized=True, magnitude=False),
    "dora": Variant(rank_stabilized=False, magnitude=True),
    "rsdora": Variant(rank_stabilized=True, magnitude=True),
}


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapter.

    rank, alpha: of every term; the scaling is alpha / rank, alpha / sqrt(rank) in the variants that begin with rs.
    dropout: on the input of the terms, while training.
    variant: lora (arXiv:2106.09685), rslora (arXiv:2312.03732), dora (arXiv:2402.09353), or rsdora, the last two together.
    targets: 'all-linear', every linear layer but the output head; a list of names, each a whole module name or the end
        of one after a dot; or one regular expression that fits the whole module name.
    rank_pattern, alpha_pattern: from a regular expression that fits the end of a module name, beginning at a dot, to the
        value that such modules get instead; the first that fits wins.
    modules_to_save: modules trained whole beside the terms, as a list like that of `targets`.
    ensure_weight_tying: head and embedding that share one matrix are trained whole as one, where either is named in
        modules_to_save.
    Raises AdapterError naming every setting that is out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    variant: str = "lora"
    targets: str | Sequence[str] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._name_problems(), *self._pattern_problems()]
        if len(problems) == 1:
            raise AdapterError(problems[0])
        if problems:
            raise AdapterError(f"the adapter's settings must be in range:\n{bulleted(problems)}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))

    @property
    def has_magnitude(self) -> bool:
        return VARIANTS[self.variant].magnitude

    @property
    def rank_stabilized(self) -> bool:
        return VARIANTS[self.variant].rank_stabilized

    def rank_of(self, module: str) -> int:
        """The rank of the term on the module of that name."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of the term on the module of that name."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """s of the term on the module of that name: alpha / r or alpha / sqrt(r)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _number_problems(self) -> list[str]:
        problems = []
        if not _is_rank(self.rank):
            problems.append(f"rank must be a whole number of at least 1; got {self.rank!r}. Try rank=16.")
        if not _is_positive(self.alpha):
            problems.append(f"alpha must be a finite number above 0; got {self.alpha!r}. Try alpha=32.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1; got {self.dropout!r}. Try dropout=0.05.")
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        if self.variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            problems.append(
                f"variant must be one of {known}; got {self.variant!r}.{nearest(str(self.variant), list(VARIANTS))}"
            )
        if isinstance(self.targets, str):
            if self.targets != ALL_LINEAR and (error := regex_error(self.targets)):
                problems.append(f"targets, given as one string, must be a regular expression; {self.targets!r}: {error}.")
        elif not _is_names(self.targets):
            problems.append(
                f"targets must be 'all-linear', a list of module names, or one regular expression; got {self.targets!r}."
            )
        if isinstance(self.modules_to_save, str) or not _is_names(self.modules_to_save):
            problems.append(f"modules_to_save must be a list of module names; got {self.modules_to_save!r}.")
        if not self.targets:
            problems.append("an adapter needs targets, in PEFT too; the list is empty. Try targets='all-linear'.")
        return problems

    def _pattern_problems(self) -> list[str]:
        problems = []
        rules = (("rank_pattern", self.rank_pattern, _is_rank), ("alpha_pattern", self.alpha_pattern, _is_positive))
        for label, patterns, accepts in rules:
            for pattern, value in patterns.items():
                if error := regex_error(pattern) or regex_error(_at_the_end(pattern)):
                    problems.append(f"{label}: {pattern!r} must be a regular expression; {error}.")
                if not accepts(value):
                    wanted = "a whole number of at least 1" if label == "rank_pattern" else "a finite number above 0"
                    problems.append(f"{label}: the value for {pattern!r} must be {wanted}; got {value!r}.")
        return problems


def pattern_fits(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module of that name, by PEFT's rule."""
    return matches(_at_the_end(pattern), module)


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Whether a regular expression matches at the start of a name, or the whole of it.

    An adapter's expressions come from strangers, and some take for ever. Raises AdapterError for one that is not done
    within MATCH_SECONDS.
    """
    match = regex.fullmatch if whole else regex.match
    try:
        return match(pattern, name, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise AdapterError(
            f"a pattern must match within {MATCH_SECONDS:g} s; {pattern[:80]!r} does not on {name}. Use a simpler one."
        ) from error


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_fits(pattern, module)), default)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(name, str) and name for name in value)


def regex_error(pattern: object) -> str | None:
    """What is wrong with a regular expression, or None."""
    if not isinstance(pattern, str):
        return f"it is a {type(pattern).__name__}"
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
