"""Charts with two axes, drawn as SVG: curves, points, intervals. Every one says in words what it shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from esper_simic.curves import Points, smoothed, ticks
from supervisor.report.markup import Content, Markup, element, fixed, short

BANDWIDTH: Final = 0.02
"""Of the smoothing, as a share of the width of a chart."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The field of a chart in its own coordinates, and the values at its edges."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Where a value lies from left to right."""
        share = (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Where a value lies from top to bottom."""
        share = (value - self.y_low) / (self.y_high - self.y_low) if self.y_high > self.y_low else 0.5
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def frame(self, x_label: str = "", y_label: str = "") -> list[Markup]:
        """Lines of the grid with their numbers."""
        floor, right = self.height - self.bottom, self.width - self.right
        parts = []
        for value in ticks(self.y_low, self.y_high, 4):
            y = self.y(value)
            parts.append(element("line", x1=self.left, y1=y, x2=right, y2=y, class_="gridline"))
            parts.append(element("text", short(value), x=self.left - 5, y=y + 4, class_="soft end"))
        for value in ticks(self.x_low, self.x_high, 4):
            text = element("text", short(value), x=self.x(value), y=floor + 14, class_="soft middle")
            parts.append(text)
        parts.append(element("line", x1=self.left, y1=floor, x2=right, y2=floor, class_="axis"))
        if x_label:
            parts.append(element("text", x_label, x=right, y=self.height - 3, class_="soft end"))
        if y_label:
            parts.append(element("text", y_label, x=2, y=10, class_="soft"))
        return parts


def drawing(width: float, height: float, label: str, *content: Content) -> Markup:
    """A whole picture; `label` says what a person who cannot see it should know."""
    return element(
        "svg",
        content,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


def path(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    """A line through points; it is broken where one is no number."""
    parts, is_drawing = [], False
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            parts.append(f"{'L' if is_drawing else 'M'}{x:.1f} {y:.1f}")
            is_drawing = True
        else:
            is_drawing = False
    return element("path", d="".join(parts), class_=class_)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with some room around it, also where it is a point."""
    largest = max(abs(low), abs(high))
    is_range = high - low > max(1e-9 * largest, 1e-300)
    room = 0.06 * (high - low) if is_range else 0.05 * largest or 1.0
    return low - room, high + room


def curve_chart(points: Points, label: str, breaks: Sequence[float] = ()) -> Markup:
    """A learning curve: what was measured, thin, and its smoothed course before it.

    Where buckets hold several points their span is shaded. `breaks` are places at which a learner came back.
    """
    width, height = 380.0, 200.0
    x_low, x_high = float(points.x.min()), float(points.x.max())
    y_low, y_high = padded(float(points.y.min()), float(points.y.max()))
    axes = Axes(width, height, 46, 16, 10, 32, x_low, x_high, y_low, y_high)
    course = smoothed(points, BANDWIDTH * (x_high - x_low))
    xs = [axes.x(float(x)) for x in points.x]
    parts: list[Content] = [axes.frame("environment steps")]
    if bool((points.count > 1).any()):
        highs = [axes.y(min(float(y), y_high)) for y in points.high]
        lows = [axes.y(max(float(y), y_low)) for y in points.low]
        outline = [*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]
        parts.append(path(outline, "band"))
    floor = axes.y(y_low)
    for place in breaks:
        if x_low <= place <= x_high:
            x = axes.x(place)
            parts.append(element("line", x1=x, y1=axes.top, x2=x, y2=floor, class_="cut"))
    parts.append(path(zip(xs, (axes.y(float(y)) for y in points.y), strict=True), "raw"))
    parts.append(path(zip(xs, (axes.y(float(y)) for y in course), strict=True), "smooth"))
    if len(points) == 1:
        parts.append(element("circle", cx=xs[0], cy=axes.y(float(points.y[0])), r=3, class_="dot own"))
    return drawing(width, height, label, parts)


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of an interval chart: a dot with its interval, and a ring where the mean is."""

    name: str
    centre: float
    low: float
    high: float
    ring: float | None
    is_own: bool
    words: str


def interval_chart(bars: Sequence[Bar], label: str, digits: int) -> Markup:
    """Rows of intervals on one scale."""
    row, top, left = 24.0, 8.0, 112.0
    width, height = 380.0, top + row * len(bars) + 26
    ends = [value for bar in bars for value in (bar.low, bar.high, bar.centre, bar.ring) if value is not None]
    x_low, x_high = padded(min(ends), max(ends))
    axes = Axes(width, height, left, 12, top, 26, x_low, x_high, 0, 1)
    floor = height - 26
    parts: list[Content] = []
    for value in ticks(x_low, x_high, 4):
        x = axes.x(value)
        parts.append(element("line", x1=x, y1=top, x2=x, y2=floor, class_="gridline"))
        parts.append(element("text", short(value), x=x, y=floor + 14, class_="soft middle"))
    for index, bar in enumerate(bars):
        y = top + row * (index + 0.5)
        own = " own" if bar.is_own else ""
        strong = " strong" if bar.is_own else ""
        whisker = element("line", x1=axes.x(bar.low), y1=y, x2=axes.x(bar.high), y2=y, class_=f"whisker{own}")
        ring = None if bar.ring is None else element("circle", cx=axes.x(bar.ring), cy=y, r=4, class_="ring")
        dot = element("circle", cx=axes.x(bar.centre), cy=y, r=4, class_=f"dot{own}")
        name = element("text", shortened(bar.name, 17), x=left - 8, y=y + 4, class_=f"end{strong}")
        parts.append(element("g", element("title", f"{bar.name}: {bar.words}"), name, whisker, ring, dot))
    said = "; ".join(f"{bar.name} {fixed(bar.centre, digits)}" for bar in bars)
    return drawing(width, height, f"{label}: {said}", parts)


@dataclass(frozen=True, slots=True)
class Spot:
    """A policy among the episodes, with its intervals in both directions where there are any.

    `is_beside`: it is shown beside the others and does not compete with them; its dot is hollow.
    """

    name: str
    x: float
    y: float
    x_span: tuple[float, float] | None
    y_span: tuple[float, float] | None
    is_own: bool
    is_beside: bool = False


def scatter_chart(
    episodes: Sequence[tuple[float, float, int]],
    spots: Sequence[Spot],
    front: Sequence[tuple[float, float]],
    label: str,
) -> Markup:
    """Episodes as faint points `(parameters, accuracy, age class 0 to 4)`, policies on top, and the front as steps."""
    width, height = 760.0, 420.0
    xs = [x for x, _, _ in episodes] + [spot.x for spot in spots]
    ys = [y for _, y, _ in episodes] + [spot.y for spot in spots]
    for spot in spots:
        xs += spot.x_span or ()
        ys += spot.y_span or ()
    x_low, x_high = padded(min(xs), max(xs))
    y_low, y_high = padded(min(ys), max(ys))
    axes = Axes(width, height, 46, 14, 18, 36, x_low, x_high, y_low, y_high)
    parts: list[Content] = [axes.frame("parameters added", "accuracy %")]
    # The oldest first: what was learned last lies on top.
    parts += [
        element("circle", cx=axes.x(x), cy=axes.y(y), r=3, class_=f"episode t{age}")
        for x, y, age in sorted(episodes, key=lambda episode: episode[2])
    ]
    if len(front) > 1:
        parts.append(path(_steps(front, axes), "front"))
    parts += [_spot(spot, axes) for spot in spots]
    parts += _spot_names(spots, axes)
    return drawing(width, height, label, parts)


def _steps(front: Sequence[tuple[float, float]], axes: Axes) -> list[tuple[float, float]]:
    """Up and to the right: until a dearer policy is reached, the cheaper one's accuracy is what can be had."""
    ordered = sorted(front)
    corners = [(axes.x(ordered[0][0]), axes.y(ordered[0][1]))]
    for (_, before), (x, y) in itertools.pairwise(ordered):
        corners += [(axes.x(x), axes.y(before)), (axes.x(x), axes.y(y))]
    return corners


def _spot(spot: Spot, axes: Axes) -> Markup:
    x, y, own = axes.x(spot.x), axes.y(spot.y), " own" if spot.is_own else ""
    lines = []
    if spot.x_span is not None:
        low, high = (axes.x(value) for value in spot.x_span)
        lines.append(element("line", x1=low, y1=y, x2=high, y2=y, class_=f"whisker{own}"))
    if spot.y_span is not None:
        low, high = (axes.y(value) for value in spot.y_span)
        lines.append(element("line", x1=x, y1=low, x2=x, y2=high, class_=f"whisker{own}"))
    title = element("title", f"{spot.name}: {fixed(spot.y, 1)} % with {fixed(spot.x, 0)} parameters added")
    beside = " beside" if spot.is_beside else ""
    return element("g", title, lines, element("circle", cx=x, cy=y, r=5, class_=f"dot{own}{beside}"))


NAME_HEIGHT: Final = 13.0


def _spot_names(spots: Sequence[Spot], axes: Axes) -> list[Markup]:
    """Names beside their spots, moved apart where they would lie on each other."""
    ordered = sorted(spots, key=lambda spot: spot.y)
    heights, below = [], math.inf
    for spot in ordered:
        below = min(axes.y(spot.y) - 6, below - NAME_HEIGHT)
        heights.append(below)
    # Moved up they may have left the picture: then down again, from the top.
    above = 12.0 - NAME_HEIGHT
    names = []
    for spot, wanted in zip(reversed(ordered), reversed(heights), strict=True):
        above = max(wanted, above + NAME_HEIGHT)
        x = axes.x(spot.x)
        is_left = x > axes.width * 0.75
        class_ = " ".join(["halo", *["strong"] * spot.is_own, *["end"] * is_left])
        place = x - 9 if is_left else x + 9
        names.append(element("text", shortened(spot.name, 24), x=place, y=above, class_=class_))
    return names


def shortened(text: str, characters: int) -> str:
    """At most so many characters; what is missing is marked."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
