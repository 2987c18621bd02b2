"""Counts that add up: histograms of single steps, and totals over the lives of a learner.

A learner makes hundreds of steps between two of its reports, so single values cannot travel. It counts them instead:
`StepHistograms` is added to at each step and goes out whole with each report. It counts from the beginning of the
learner's life, not from the last report: a report that is lost loses nothing, a repeated one adds nothing.

A learner that starts anew begins at 0. `Totals` keeps what its earlier lives had reached, so that what is exported
only grows, as counters must. It lives in the supervisor and is lost with it; that is a reset such as every reader of
counters knows.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from esper_simic.errors import ContractError
from esper_simic.telemetry.catalogue import CATALOGUE, find
from esper_simic.telemetry.metric import Kind


class HistogramCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many values fell into each bucket.

    `counts[i]` is of values in (bounds[i-1], bounds[i]], the last one of those above all bounds; `total` is the sum of
    all of them. A value that is not finite has no place on the axis and would spoil the sum for ever: it is counted in
    `not_finite` alone.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0
    not_finite: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no histogram, by the kind of error that a decoder takes for its own."""
        if not self.bounds or any(not a < b for a, b in itertools.pairwise(self.bounds)):
            raise ValueError(f"a histogram's bounds must rise, these are {self.bounds}")
        if len(self.counts) != len(self.bounds) + 1 or min(*self.counts, self.not_finite) < 0:
            raise ValueError(
                f"a histogram of {len(self.bounds)} bounds has {len(self.bounds) + 1} counts, none below 0; "
                f"these are {self.counts} and {self.not_finite}"
            )

    @staticmethod
    def empty(bounds: tuple[float, ...]) -> HistogramCounts:
        """Nothing counted yet.

        Raises:
            ValueError: There are no bounds, or they do not rise.
        """
        return HistogramCounts(bounds=bounds, counts=(0,) * (len(bounds) + 1))

    @property
    def count(self) -> int:
        """Finite values counted."""
        return sum(self.counts)

    def add(self, value: float) -> HistogramCounts:
        """With one more value."""
        if not math.isfinite(value):
            return msgspec.structs.replace(self, not_finite=self.not_finite + 1)
        index = bisect.bisect_left(self.bounds, value)
        counts = (*self.counts[:index], self.counts[index] + 1, *self.counts[index + 1 :])
        return msgspec.structs.replace(self, counts=counts, total=self.total + value)

    def merge(self, other: HistogramCounts) -> HistogramCounts:
        """Both together.

        Raises:
            ContractError: They have other bounds.
        """
        if self.bounds != other.bounds:
            raise ContractError(f"histograms of bounds {self.bounds} and {other.bounds} do not add up")
        return HistogramCounts(
            bounds=self.bounds,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            total=self.total + other.total,
            not_finite=self.not_finite + other.not_finite,
        )

    def to_builtins(self) -> dict[str, Any]:
        """As plain values."""
        builtins: dict[str, Any] = msgspec.to_builtins(self)
        return builtins

    @staticmethod
    def from_builtins(values: Mapping[str, Any]) -> HistogramCounts:
        """The inverse of `to_builtins`.

        Raises:
            ContractError: They are not those of a histogram.
        """
        try:
            return msgspec.convert(values, HistogramCounts)
        except msgspec.ValidationError as error:
            raise ContractError(f"this is no histogram: {error}") from error


_HISTOGRAMS: Final = {metric.source: metric for metric in CATALOGUE if metric.kind is Kind.HISTOGRAM}


class StepHistograms(msgspec.Struct, frozen=True, kw_only=True):
    """Every histogram of the catalogue, by its source, over the steps of one life of a learner."""

    by_source: dict[str, HistogramCounts] = msgspec.field(
        default_factory=lambda: {s: HistogramCounts.empty(metric.bounds) for s, metric in _HISTOGRAMS.items()}
    )

    def followed(self, metrics: Mapping[str, float]) -> StepHistograms:
        """With the metrics of one more step; those that are no histogram's are left alone."""
        added = {
            source: counts.add(metrics[source] * _HISTOGRAMS[source].per_source)
            for source, counts in self.by_source.items()
            if source in metrics
        }
        return StepHistograms(by_source=self.by_source | added)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and histograms of a learner over its lives, by report key; `life` is the newest heard of."""

    life: int = 0
    past_counters: dict[str, float] = {}
    past_histograms: dict[str, HistogramCounts] = {}
    life_counters: dict[str, float] = {}
    life_histograms: dict[str, HistogramCounts] = {}

    def followed(
        self, life: int, metrics: Mapping[str, float], histograms: Mapping[str, HistogramCounts]
    ) -> Totals:
        """With one more report. What an earlier life says after a later one has spoken counts no more.

        Args:
            life: The reporting life's number (its incarnation); it grows.
            metrics: As reported; only counters that begin anew with each life are taken.
            histograms: As reported, by source.

        Raises:
            ContractError: A histogram has other bounds than one under the same source had in an earlier life.
        """
        if life < self.life:
            return self
        ground = self if life == self.life else Totals(life=life, **self._closed())
        counted = {key: value for key, value in metrics.items() if _is_counted_by_life(key)}
        return msgspec.structs.replace(
            ground,
            life_counters=ground.life_counters | counted,
            life_histograms=ground.life_histograms | dict(histograms),
        )

    def counters(self) -> dict[str, float]:
        """Sums over all lives, by report key."""
        keys = [*self.past_counters, *(key for key in self.life_counters if key not in self.past_counters)]
        return {key: self.past_counters.get(key, 0.0) + self.life_counters.get(key, 0.0) for key in keys}

    def histograms(self) -> dict[str, HistogramCounts]:
        """Sums over all lives, by source."""
        both = dict(self.past_histograms)
        for source, counts in self.life_histograms.items():
            both[source] = both[source].merge(counts) if source in both else counts
        return both

    def _closed(self) -> dict[str, Any]:
        return {"past_counters": self.counters(), "past_histograms": self.histograms()}


def _is_counted_by_life(key: str) -> bool:
    found = find(key)
    return found is not None and found[0].kind is Kind.COUNTER and not found[0].is_of_run
