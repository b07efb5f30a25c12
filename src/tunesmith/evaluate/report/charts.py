"""Charts as drawings: paths, ticks and labels, which a page's template turns into SVG.

Paths live in a box of WIDTH x HEIGHT that the page stretches to any size; labels stand beside it as
text, by percent of the box, so that they stay readable on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

WIDTH, HEIGHT = 1000.0, 400.0
MOST_POINTS = 400
"""Of a line; more than that no screen shows apart."""

Point = tuple[float, float]
Look = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: in the legend; an empty one stands in no legend.
        points: (x, y), in order of x.
        color: number of the color, from 1.
        look: a line, a faint line behind others, or a line with a dot at every point.
    """

    name: str
    points: tuple[Point, ...]
    color: int = 1
    look: Look = "line"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: `resume`, `rollback`, `skip` or `checkpoint`."""

    x: float
    kind: str


@dataclass(frozen=True)
class Chart:
    """What is to be drawn.

    Args:
        title: above it.
        series: the lines, the ones behind first.
        marks: what happened.
        best: a point to name, and its name.
        about: a sentence for people who cannot see it.
    """

    title: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    best: tuple[Point, str] | None = None
    about: str = ""


@dataclass(frozen=True)
class Tick:
    """A place on an axis in percent of its length, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series as drawn: its path, and the path of its dots."""

    name: str
    color: int
    look: Look
    path: str
    dots: str


@dataclass(frozen=True)
class Drawing:
    """A chart ready for the page.

    Args:
        chart: what it is of.
        lines: paths in the box.
        x_ticks: from the left.
        y_ticks: from the bottom.
        marks: of each kind, a path of upright lines.
        best: of the named point, percent from the left and from the bottom, and its name.
        data: for the script that shows values under the pointer, as JSON.
    """

    chart: Chart
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[tuple[str, str], ...]
    best: tuple[float, float, str] | None
    data: str


@dataclass(frozen=True)
class Axis:
    """From the values `low` to `high`; logarithmic or not."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value

    def ticks(self, most: int) -> list[float]:
        """Round values between the ends."""
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            values = [factor * 10.0**power for power in powers for factor in (1, 3)]
            return _thinned([each for each in values if self.low <= each <= self.high], most)
        step = round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def _thinned(values: list[float], most: int) -> list[float]:
    every = math.ceil(len(values) / max(most, 1)) or 1
    return values[::every]


def round_step(value: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not smaller."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))


LOG_FROM = 30.0
"""A chart whose largest value is so many times its median is drawn on a logarithmic axis."""


def y_axis(values: Sequence[float]) -> Axis:
    """An axis that holds all values with some room; logarithmic if few are far above the rest."""
    low, high = min(values), max(values)
    if low > 0 and high > LOG_FROM * sorted(values)[len(values) // 2]:
        return Axis(low / 1.2, high * 1.2, is_log=True)
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))  # rounding is no curve
    room = (0.1 * abs(high) or 1.0) if is_flat else 0.06 * (high - low)
    lowest = 0.0 if 0 <= low <= room else low - room
    return Axis(lowest, high + 1.5 * room)


def draw(chart: Chart) -> Drawing | None:
    """Lays a chart out; None if no series has a point."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        return None
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    x_axis = Axis(first, last) if last > first else Axis(first - 1, last + 1)
    axis = y_axis([y for _, y in points])
    thin = [(series, thinned(series.points)) for series in chart.series]
    best = None
    if chart.best is not None:
        (x, y), name = chart.best
        best = (100 * x_axis.share(x), 100 * axis.share(y), name)
    return Drawing(
        chart=chart,
        lines=tuple(_line(series, shown, x_axis, axis) for series, shown in thin),
        x_ticks=tuple(
            Tick(100 * x_axis.share(each), f"{each:,.0f}")
            for each in x_axis.ticks(6)
            if each == int(each)
        ),
        y_ticks=y_ticks(axis),
        marks=tuple(_marks(chart.marks, x_axis)),
        best=best,
        data=_data(thin, x_axis, axis),
    )


def y_ticks(axis: Axis) -> tuple[Tick, ...]:
    """Ticks with as many decimals as tell them apart."""
    values = axis.ticks(4)
    if len(values) < 2:
        return tuple(Tick(100 * axis.share(each), f"{each:g}") for each in values)
    gap = min((after - before for before, after in pairwise(values)))
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    texts = [f"{each:,.{decimals}f}" for each in values]
    if decimals > 3:
        texts = [f"{each:.0e}".replace("e-0", "e-") if each else "0" for each in values]
    return tuple(Tick(100 * axis.share(at), text) for at, text in zip(values, texts, strict=True))


def _line(series: Series, points: Sequence[Point], x_axis: Axis, axis: Axis) -> Line:
    places = [(WIDTH * x_axis.share(x), HEIGHT * (1 - axis.share(y))) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
    has_dots = series.look == "dots" or len(places) == 1
    # A line of no length with round ends stays a circle, however the box is stretched.
    dots = "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in places) if has_dots else ""
    return Line(series.name, series.color, series.look, path, dots)


def _marks(marks: Iterable[Mark], x_axis: Axis) -> Iterable[tuple[str, str]]:
    kinds: dict[str, list[float]] = {}
    for mark in marks:
        kinds.setdefault(mark.kind, []).append(WIDTH * x_axis.share(mark.x))
    for kind, places in kinds.items():
        # Checkpoints and skipped steps are many: they stand at the bottom alone.
        top = 0.0 if kind in ("resume", "rollback") else 0.95 * HEIGHT
        yield kind, "".join(f"M{x:.1f} {HEIGHT:.0f}V{top:.0f}" for x in sorted(set(places)))


def _data(thin: Sequence[tuple[Series, Sequence[Point]]], x_axis: Axis, axis: Axis) -> str:
    """Values for the pointer: rounded to what people read."""
    series = [
        {
            "name": each.name or "training",
            "color": each.color,
            "points": [[x, float(f"{y:.4g}")] for x, y in points],
        }
        for each, points in thin
        if points
    ]
    ends = {"x": [x_axis.low, x_axis.high], "y": [axis.low, axis.high], "log": axis.is_log}
    return json.dumps({**ends, "series": series}, separators=(",", ":"))


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points, of each stretch the lowest and the highest: spikes stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / (MOST_POINTS - 2))
    kept: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return list(dict.fromkeys([*kept, points[-1]]))


def smoothed(points: Sequence[Point]) -> tuple[Point, ...]:
    """Exponential moving average, corrected for its start; its reach grows with the length."""
    weight = 1 - 1 / min(max(2.0, len(points) / 15), 30.0)
    found: list[Point] = []
    total, norm = 0.0, 0.0
    for x, y in points:
        total = weight * total + (1 - weight) * y
        norm = weight * norm + (1 - weight)
        found.append((x, total / norm))
    return tuple(found)
