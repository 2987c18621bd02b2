"""What the comparison of the measured policies says in words, and its figures as text."""

from __future__ import annotations

from collections.abc import Sequence

from esper_simic.comparison import Estimate
from supervisor.events import LEARNED
from supervisor.report.markup import fixed, signed
from supervisor.standings import FIGURES, Row


def interval_words(centre: float, low: float, high: float, digits: int) -> str:
    """`12.3 [11.0, 13.4]`."""
    return f"{fixed(centre, digits)} [{fixed(low, digits)}, {fixed(high, digits)}]"


def difference_words(estimate: Estimate, digits: int) -> str:
    """`+1.2 [+0.3, +2.0]`."""
    return (
        f"{signed(estimate.value, digits)} [{signed(estimate.low, digits)}, {signed(estimate.high, digits)}]"
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the comparison says."""
    if not rows:
        return []
    said = []
    best = rows[0]
    middle = best.figures["return"].middle
    if middle is not None and len(rows) > 1:
        words = interval_words(middle.value, middle.low, middle.high, 2)
        said.append(f"The highest interquartile mean return is that of {best.name}: {words}.")
    said += [against_words(row) for row in rows if row.against]
    on_front = [row.name for row in rows if row.is_on_front]
    if len(rows) > 1 and on_front:
        few = "is" if len(on_front) == 1 else "are"
        said.append(
            f"{_listed(on_front)} {few} on the front of accuracy against parameters: no other "
            f"growing policy has at least the accuracy with no more parameters."
        )
    return said


def against_words(row: Row) -> str:
    """The learned policy against one rival: an interval of the difference that holds zero says nothing clear."""
    parts = []
    for figure in FIGURES:
        found = row.against.get(figure.key)
        if found is None:
            continue
        sign = found.interquartile_mean.sign()
        relation = {1: "higher", -1: "lower", 0: "not clearly different"}[sign]
        parts.append(
            f"{figure.label} {relation} ({difference_words(found.interquartile_mean, figure.digits)}{figure.unit})"
        )
    seeds = max((found.seeds for found in row.against.values()), default=0)
    return f"{LEARNED} against {row.name}, on the same {seeds} seeds: {', '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
