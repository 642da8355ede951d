"""A set that tuning must not spoil: another domain, or a general ability, with a bound on how much worse it may get."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.errors import ConfigError, nearest
from luthier.evaluation.bootstrap import Interval, Resampled
from luthier.evaluation.measures import COUNTS, GIVES, LOWER_IS_BETTER, TITLES, amount_text, amounts_text, figure_text
from luthier.units import percent_text

DEFAULT_BOUND = 0.02
GUARDABLE = tuple(name for figures in GIVES.values() for name in figures if name not in COUNTS)
_BOUND = re.compile(r"(?P<path>.+?):(?:(?P<figure>[A-Za-z_0-9]+)=)?(?P<number>[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)(?P<percent>%?)")
_LIKE_A_BOUND = re.compile(r".+:[^/\\:\[\]]*[%=][^/\\:\[\]]*")


@dataclass(frozen=True)
class Guard:
    """figure may get worse by at most `bound`, as a share of the base's value if relative, else in its own unit.

    figure None stands for choice_accuracy on rows with choices and loss on all others.
    """

    figure: str | None = None
    bound: float = DEFAULT_BOUND
    relative: bool = True


@dataclass(frozen=True)
class Verdict:
    """What became of a guard. worse_by: how much worse the tuned model is, below 0 where it is better; allowed: the bound
    in the unit of the figure; interval: 95 %, of worse_by, paired.

    kept: worse_by <= allowed. certain: the whole interval lies on the side of the bound on which worse_by does.
    """

    name: str
    figure: str
    base: float
    tuned: float
    worse_by: float
    interval: Interval
    allowed: float
    guard: Guard
    kept: bool
    certain: bool

    def sentence(self) -> str:
        """The verdict with its figures, for people to read."""
        change = f"{figure_text(self.figure, self.base)} -> {figure_text(self.figure, self.tuned)}"
        worse, allowed = amount_text(self.figure, self.worse_by), amount_text(self.figure, self.allowed)
        interval = amounts_text(self.figure, self.interval)
        share = f", {percent_text(self.guard.bound)} of the base's" if self.guard.relative else ""
        return (
            f"{self.name}: {TITLES[self.figure]} {change}, worse by {worse} (95 % interval {interval}); "
            f"at most {allowed} is allowed{share}: {self._outcome()}"
        )

    def _outcome(self) -> str:
        if self.kept and self.certain:
            return "kept"
        if self.kept:
            return "kept, but the interval reaches beyond the bound, so that more rows could show otherwise"
        if self.certain:
            return "broken, and the whole interval lies beyond the bound"
        return "broken, though the interval reaches below the bound, so that chance may have a part in it; more rows would tell"


def parse_bound(text: str) -> tuple[str, Guard]:
    """`FILE`, `FILE:BOUND` or `FILE:FIGURE=BOUND` as the file and its guard; BOUND is `0.05` or `2%`.

    Raises ConfigError for a figure that is not known and a bound below 0.
    """
    found = _BOUND.fullmatch(text)
    if found is None:
        if _LIKE_A_BOUND.fullmatch(text):
            raise ConfigError(
                f"a bound is a number or a percentage, such as 0.05 or 2%, or FIGURE=BOUND; got {text.rpartition(':')[2]!r}."
            )
        return text, Guard()
    figure, bound = found["figure"], float(found["number"])
    if figure is not None and figure not in GUARDABLE:
        raise ConfigError(f"a guard watches one of {', '.join(GUARDABLE)}; got {figure!r}.{nearest(figure, GUARDABLE)}")
    if not 0 <= bound < math.inf:
        raise ConfigError(f"a bound says how much worse a figure may get, 0 or more; got {found['number']}.")
    relative = bool(found["percent"])
    return found["path"], Guard(figure, bound / 100 if relative else bound, relative)


def judge(name: str, guard: Guard, base: Mapping[str, Resampled], tuned: Mapping[str, Resampled]) -> Verdict:
    """Compare a figure of the two models on the guard's rows.

    The guard is broken when the figure itself is worse by more than the bound; the interval says how sure that is.
    """
    figure = guard.figure or ("choice_accuracy" if "choice_accuracy" in tuned else "loss")
    before, after = base[figure], tuned[figure]
    worse = after.minus(before) if figure in LOWER_IS_BETTER else before.minus(after)
    allowed = guard.bound * abs(before.value) if guard.relative else guard.bound
    if guard.relative:
        # The bound moves with the base's own value from one choice of rows to the next.
        low, high = worse.minus(before, factor=guard.bound).interval()
    else:
        low, high = (end - guard.bound for end in worse.interval())
    kept = worse.value <= allowed
    return Verdict(
        name, figure, before.value, after.value, worse.value, worse.interval(), allowed, guard, kept,
        certain=high <= 0 if kept else low > 0,
    )  # fmt: skip
