"""Line charts for the report: an SVG that stretches with the page, its labels in HTML so that they never stretch.

The numbers behind the lines go along as data for the pointer: without scripts a chart is complete, only not explorable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]

MOST_POINTS = 800


@dataclass(frozen=True)
class Series:
    """One line. kind names its look in the style sheet: `raw`, `main`, `held-out` (with dots)."""

    label: str
    points: Sequence[Point]
    kind: str = "main"

    @property
    def has_dots(self) -> bool:
        """So has a single point, which no line goes through."""
        return self.kind == "held-out" or len(self.points) == 1


@dataclass(frozen=True)
class Chart:
    """What the template needs of a chart; positions are percentages of the plot area."""

    title: str
    summary: str
    legend: list[tuple[str, str]]
    paths: list[tuple[str, str]]
    dots: list[tuple[str, float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    data: dict[str, Any]


@dataclass(frozen=True)
class _Plane:
    """What the plot area shows: x from left to right, y from low to high, and where y has its ticks."""

    left: float
    right: float
    low: float
    high: float
    y_ticks: list[float]

    @classmethod
    def around(cls, points: Sequence[Point], *, from_zero: bool) -> _Plane:
        low, high = min(y for _, y in points), max(y for _, y in points)
        if low > 0 and (from_zero or low < 0.6 * high):
            low = 0.0
        ticks = nice_ticks(low, high)
        left, right = min(x for x, _ in points), max(x for x, _ in points)
        return cls(left, right, min(low, ticks[0]), max(high, ticks[-1]), ticks)

    def place(self, x: float, y: float) -> Point:
        """In percentages of the area."""
        across = 100 * (x - self.left) / (self.right - self.left) if self.right > self.left else 50.0
        return round(across, 2), round(100 * (y - self.low) / (self.high - self.low), 2)

    @property
    def x_ticks(self) -> list[float]:
        return [x for x in nice_ticks(self.left, self.right, whole=True) if self.left <= x <= self.right]


def line_chart(
    title: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    *,
    tick: Callable[[float], str] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """A chart of `series` over steps, or None when there is no point to draw. show, tick: a value, a round value as text.

    from_zero: the axis starts at 0; otherwise only if the values come near it.
    """
    drawn = [Series(one.label, thinned(one.points, MOST_POINTS), one.kind) for one in series if one.points]
    if not drawn:
        return None
    plane = _Plane.around([point for one in drawn for point in one.points], from_zero=from_zero)
    place = plane.place
    return Chart(
        title=title,
        summary="; ".join(_summary(one, show) for one in drawn),
        legend=[(one.kind, one.label) for one in drawn] if len(drawn) > 1 else [],
        paths=[(one.kind, _path([place(*point) for point in one.points])) for one in drawn if len(one.points) > 1],
        dots=[(one.kind, *place(*point)) for one in drawn if one.has_dots for point in one.points],
        x_ticks=[(place(x, plane.low)[0], f"{x:,.0f}") for x in plane.x_ticks],
        y_ticks=[(place(plane.left, y)[1], (tick or show)(y)) for y in plane.y_ticks],
        data={"left": plane.left, "right": plane.right, "series": [_readings(one, show, place) for one in drawn]},
    )


def _summary(one: Series, show: Callable[[float], str]) -> str:
    (first, start), (last, end) = one.points[0], one.points[-1]
    if first == last:
        return f"{one.label}: {show(start)} at step {first:,.0f}"
    return f"{one.label}: {show(start)} at step {first:,.0f}, {show(end)} at step {last:,.0f}"


def _readings(one: Series, show: Callable[[float], str], place: Callable[[float, float], Point]) -> dict[str, Any]:
    rows = [[x, *place(x, y), show(y)] for x, y in one.points]
    return {"kind": one.kind, "label": one.label, "rows": rows}


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:g} {100 - y:g}" for x, y in points)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points with the lowest and the highest of every stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, most // 2 - 1)
    kept = [points[0]]
    for index in range(stretches):
        a, b = index * len(points) // stretches, (index + 1) * len(points) // stretches
        extremes = {min(range(a, b), key=lambda i: points[i][1]), max(range(a, b), key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(extremes) if 0 < i < len(points) - 1]
    return [*kept, points[-1]]


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers whose first is at or below `low` and last at or above `high`; whole: no fractions."""
    if not high > low:
        pad = abs(low) / 10 or 1.0
        low, high = (low - pad if low - pad < 0 or low > 0 else 0.0), high + pad
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
