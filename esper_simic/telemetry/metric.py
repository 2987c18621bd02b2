"""One metric: its name, how it adds up, its unit, and the names that follow from these."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

MIB: Final = 2.0**20


class Kind(StrEnum):
    """How values of a metric add up: a gauge's newest counts, a counter only grows, a histogram counts by size."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


_BASE_UNITS: Final = {
    "ms": ("_time_ms", "_duration_seconds"),
    "s": ("", "_seconds"),
    "MiB": ("_mb", "_bytes"),
}
"""Unit -> end of the name, end of the Prometheus name in place of it."""


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One row.

    Attributes:
        name: Dotted, stable.
        kind: How it adds up.
        unit: Of a value under `name`: `ms`, `MiB`, `bytes`, `steps`, …; `1` for a pure number.
        description: One sentence.
        source: Key in a learner's progress report; a family's ends in a dot.
        label: Of a family, the name of what follows the dot.
        tag: TensorBoard's; a family's has `{}` for its label. Empty: not drawn there.
        per_source: What a value of the source is multiplied by to be in `unit`.
        bounds: Of a histogram, the buckets' upper bounds in `unit`.
        is_of_run: Of a counter: the learner's state holds it, so it goes on after a restart by itself. Other counters
            begin at 0 with each life of the learner and are added up (`Totals`).
    """

    name: str
    kind: Kind
    unit: str
    description: str
    source: str
    label: str = ""
    tag: str = ""
    per_source: float = 1.0
    bounds: tuple[float, ...] = ()
    is_of_run: bool = False

    @property
    def is_family(self) -> bool:
        """Whether there is one value for each of several labels."""
        return self.source.endswith(".")

    @property
    def prometheus_name(self) -> str:
        """In base units; a counter's ends in `_total`."""
        end, base = _BASE_UNITS.get(self.unit, ("", ""))
        name = self.name.removesuffix(end) + base
        total = "_total" if self.kind is Kind.COUNTER else ""
        return name.replace(".", "_") + total

    def in_base_unit(self, value: float) -> float:
        """A value in `unit` as Prometheus gets it."""
        match self.unit:
            case "ms":
                return value / 1000  # divided, for the nearest float: 350 ms are 0.35 s
            case "MiB":
                return value * MIB
            case _:
                return value


def gauge(name: str, source: str, description: str, *, unit: str = "1", tag: str = "") -> Metric:
    """A row whose newest value counts."""
    return Metric(name=name, kind=Kind.GAUGE, unit=unit, description=description, source=source, tag=tag)


def counter(
    name: str, source: str, description: str, *, unit: str, label: str = "", is_of_run: bool = False
) -> Metric:
    """A row that only grows."""
    return Metric(
        name=name,
        kind=Kind.COUNTER,
        unit=unit,
        description=description,
        source=source,
        label=label,
        is_of_run=is_of_run,
    )


def histogram(
    name: str, source: str, description: str, *, bounds: tuple[float, ...], unit: str = "1", tag: str = ""
) -> Metric:
    """A row that counts values by size."""
    return Metric(
        name=name,
        kind=Kind.HISTOGRAM,
        unit=unit,
        description=description,
        source=source,
        tag=tag,
        bounds=bounds,
    )
