"""Where the marks of a chart lie, in percent of its width and height, so that a template draws it at any size.

A plot is SVG whose texts keep their size when it is scaled: its places are percentages, and no text is inside a
viewBox. No library is needed, and a page of a run without one is the same page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TICKS = 5
CROWD = 6  # of lines
_STEPS = (1, 2, 2.5, 5, 10)
# From this ratio of the largest to the smallest on, numbers above zero are easier to compare by their ratios.
_LOGARITHMIC = 20
# Beyond this nothing is drawn; below this share of them numbers are alike.
_LARGEST, _ALIKE = 1e30, 1e-9


@dataclass(frozen=True)
class Point:
    """A number measured at another. text: what a reader is told of it; label: what stands beside it."""

    x: float
    y: float
    text: str
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind, in the order in which a line joins them, if one does."""

    name: str
    points: tuple[Point, ...]
    joined: bool = True


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent of its length, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """What an axis measures, and between which numbers; texts: how numbers are written."""

    title: str
    low: float
    high: float
    logarithmic: bool
    texts: Callable[[float], str]

    @classmethod
    def over(
        cls, title: str, values: Iterable[float], texts: Callable[[float], str], *, from_zero: bool = False
    ) -> "Axis":
        """An axis with room for these numbers. from_zero: it begins there, and is never logarithmic."""
        known = sorted(values)
        low, high = known[0], known[-1]
        if not from_zero and low > 1 / _LARGEST and high / low >= _LOGARITHMIC:
            return cls(title, low / 1.1, high * 1.1, True, texts)
        low = min(0.0, low) if from_zero else low
        spread = high - low if high - low > _ALIKE * abs(high) else 0.0
        margin = 0.06 * spread or 0.1 * abs(high) or 1.0
        return cls(title, low if from_zero else low - margin, high + margin, False, texts)

    def place(self, value: float) -> float:
        """Percent of the axis's length."""
        if self.logarithmic:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[Tick]:
        """Round numbers along the axis."""
        numbers = _powers(self.low, self.high) if self.logarithmic else _round_numbers(self.low, self.high)
        return [Tick(self.place(value), self.texts(value)) for value in numbers]


@dataclass(frozen=True)
class Chart:
    """A plot. level: a line across, with what it says; description: the same in words, for who does not see it."""

    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: Tick | None = None

    @property
    def crowded(self) -> bool:
        """Whether there are so many lines that thin ones without marks tell more."""
        return len(self.series) > CROWD and self.series[0].joined

    def line(self, series: Series) -> str:
        """The points of an SVG polyline in a square of 100 by 100."""
        return " ".join(f"{self.x.place(point.x):.2f},{100 - self.y.place(point.y):.2f}" for point in series.points)


def chart(
    title: str,
    series: Sequence[Series],
    x: tuple[str, Callable[[float], str]],
    y: tuple[str, Callable[[float], str]],
    *,
    level: tuple[float, str] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """A plot of all finite points; None where there are none.

    x, y: title of the axis and how its numbers are written. level: height of a line across, and what it says.
    from_zero: the vertical axis begins there.
    """
    kept = tuple(kept for one in series if (kept := _finite(one)).points)
    points = [point for one in kept for point in one.points]
    if not points:
        return None
    known = level if level is not None and abs(level[0]) < _LARGEST else None
    heights = [point.y for point in points] + ([known[0]] if known else [])
    across = Axis.over(x[0], [point.x for point in points], x[1])
    up = Axis.over(y[0], heights, y[1], from_zero=from_zero)
    told = f"{y[0]} against {x[0]}: " + "; ".join(point.text for point in points[:40])
    return Chart(title, told, across, up, kept, Tick(up.place(known[0]), known[1]) if known else None)


def _finite(series: Series) -> Series:
    points = tuple(point for point in series.points if abs(point.x) < _LARGEST and abs(point.y) < _LARGEST)
    return Series(series.name, points, series.joined)


def _round_numbers(low: float, high: float) -> list[float]:
    rough = (high - low) / TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in _STEPS if factor * unit >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        numbers = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [value for value in numbers if low <= value <= high]
        if len(found) <= TICKS + 1:
            return found
    return found[:: math.ceil(len(found) / TICKS)]
