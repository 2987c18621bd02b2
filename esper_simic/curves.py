"""Long series made short enough to be drawn: downsampled while they stream by, smoothed, turned into rates and ticks.

A series may have millions of points and is read once, so what is kept of it is bounded: `Curve` keeps buckets of
consecutive points and doubles their size whenever they become too many; `Thinned` keeps every k-th item and doubles k.
Neither needs chance or a second reading, and the same series always gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Item = TypeVar("Item")

BUCKETS_MAX: Final = 256
"""Nearly as many as a chart has columns of its own."""


@dataclass(frozen=True, slots=True)
class Points:
    """A downsampled series: one entry a bucket, in order.

    Attributes:
        x: `[n]` mean place of the bucket's points.
        y: `[n]` mean value.
        low: `[n]` least value.
        high: `[n]` greatest value.
        count: `[n]` points in the bucket.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats
    count: Floats

    def __len__(self) -> int:
        return len(self.x)


class Curve:
    """A series in bounded memory: buckets of `stride` consecutive points each.

    Args:
        buckets_max: Even; when there are so many, neighbours are joined and `stride` doubles.
    """

    def __init__(self, buckets_max: int = BUCKETS_MAX) -> None:
        self._max = buckets_max
        self.stride = 1
        """Points in a full bucket."""
        self.skipped = 0
        """Points that were no numbers; they are in no bucket."""
        self._buckets: list[tuple[float, float, float, float, int]] = []

    def add(self, x: float, y: float) -> None:
        """Take the next point; one that is not finite is counted and left out."""
        if not (math.isfinite(x) and math.isfinite(y)):
            self.skipped += 1
            return
        if self._buckets and self._buckets[-1][-1] < self.stride:
            sum_x, sum_y, low, high, count = self._buckets[-1]
            self._buckets[-1] = (sum_x + x, sum_y + y, min(low, y), max(high, y), count + 1)
            return
        if len(self._buckets) == self._max:
            self._join()
        self._buckets.append((x, y, y, y, 1))

    def _join(self) -> None:
        self._buckets = [
            (a[0] + b[0], a[1] + b[1], min(a[2], b[2]), max(a[3], b[3]), a[4] + b[4])
            for a, b in zip(self._buckets[::2], self._buckets[1::2], strict=True)
        ]
        self.stride *= 2

    def points(self) -> Points:
        """What there is so far; the last bucket may not be full."""
        sums = np.array(self._buckets, dtype=np.float64).reshape(-1, 5)
        count = sums[:, 4]
        return Points(sums[:, 0] / count, sums[:, 1] / count, sums[:, 2], sums[:, 3], count)


class Thinned(Generic[Item]):
    """Every k-th item of a series, from the first on, at most `items_max` of them.

    Args:
        items_max: When one more would be kept, every other one is let go and `stride` doubles.
    """

    def __init__(self, items_max: int) -> None:
        self._max = items_max
        self.stride = 1
        """k."""
        self.count = 0
        """Items seen."""
        self._items: list[Item] = []

    def add(self, item: Item) -> None:
        """See the next item."""
        if self.count % self.stride == 0:
            if len(self._items) == self._max:
                self._items = self._items[::2]
                self.stride *= 2
            if self.count % self.stride == 0:
                self._items.append(item)
        self.count += 1

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def smoothed(points: Points, bandwidth: float) -> Floats:
    """Values averaged with their neighbours on both sides, so that nothing lags.

    `ŷ(x) = Σ nᵢ K((x - xᵢ) / h) yᵢ / Σ nᵢ K((x - xᵢ) / h)`, K(u) = exp(-u²/2), nᵢ the points of bucket i.

    Args:
        points: The series.
        bandwidth: h, in the unit of x; 0 or less leaves the values as they are.

    Returns:
        `[n]` at the places of the points.

    Source: Nadaraya, On Estimating Regression, Theory of Probability and its Applications 9 (1964).
    """
    if bandwidth <= 0:
        return points.y.copy()
    apart = (points.x[:, None] - points.x[None, :]) / bandwidth
    weights = points.count * np.exp(-(apart**2) / 2)
    return np.asarray(weights @ points.y / weights.sum(axis=1))


def rates(time_s: Floats, done: Floats, bins: int) -> tuple[Floats, Floats]:
    """How fast a count grew in equal stretches of time.

    Args:
        time_s: `[n]` seconds, not falling.
        done: `[n]` the count at those times, not falling; straight between them.
        bins: Stretches.

    Returns:
        The count in the middle of each stretch, and the growth in it per second; empty where no time passed.
    """
    if len(time_s) < 2 or time_s[-1] <= time_s[0]:
        return np.zeros(0), np.zeros(0)
    edges = np.linspace(time_s[0], time_s[-1], bins + 1)
    at_edges = np.interp(edges, time_s, done)
    return (at_edges[:-1] + at_edges[1:]) / 2, np.diff(at_edges) / np.diff(edges)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within a range, about as many as wanted: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Lower end.
        high: Upper end, not below.
        wanted: At least 1.
    """
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return _multiples(low, high, step)


TIME_STEPS_S: Final = (
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0),
    *(60.0 * minutes for minutes in (1, 2, 5, 10, 20, 30)),
    *(3600.0 * hours for hours in (1, 2, 3, 6, 12)),
    *(86_400.0 * days for days in (1, 2, 7, 14, 28, 91, 182, 364)),
)
"""Steps of a scale of time that a person reads at a glance."""


def time_ticks(seconds: float, wanted: int = 6) -> list[float]:
    """Round durations from 0 up to a number of seconds, about as many as wanted."""
    step = min(TIME_STEPS_S, key=lambda step: abs(math.log(step * wanted / max(seconds, 1e-9))))
    return _multiples(0.0, seconds, step)


def _multiples(low: float, high: float, step: float) -> list[float]:
    # Half a millionth of a step: rounding must not lose an end that is a multiple.
    first, last = math.ceil(low / step - 5e-7), math.floor(high / step + 5e-7)
    return [number * step for number in range(first, last + 1)]
