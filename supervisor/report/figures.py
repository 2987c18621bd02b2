"""The comparison of the policies that were measured: figures with their intervals, and what they say in words.

The journal has every episode's outcome, so all of it is computed here from them, for old journals as for new ones. The
statistics are `esper_simic.comparison`'s, under the chance that the evaluators use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from esper_simic import seeding
from esper_simic.comparison import (
    Estimate,
    Interval,
    Paired,
    bootstrap_interval,
    mean_interval,
    paired,
    pareto_front,
)
from supervisor.events import PolicyEvaluated
from supervisor.report.markup import fixed, signed
from supervisor.view import LEARNED


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the figures by which policies are compared."""

    key: str
    label: str
    digits: int
    unit: str = ""


FIGURES: Final = (
    Figure("return", "return", 2),
    Figure("accuracy", "host accuracy", 1, "\u202f%"),
    Figure("parameters", "parameters added", 0),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one policy; no intervals of fewer than two episodes."""

    values: tuple[float, ...]
    mean: Interval | None
    middle: Estimate | None

    @property
    def centre(self) -> float:
        """The interquartile mean; of fewer than two episodes what there is, NaN for none."""
        if self.middle is not None:
            return self.middle.value
        return self.values[0] if self.values else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One policy: its figures, and what the learned one has more than it, seed by seed."""

    name: str
    figures: dict[str, Measured]
    against: dict[str, Paired]
    is_on_front: bool

    @property
    def episodes(self) -> int:
        """How many were measured."""
        return len(self.figures["return"].values)


def compare(evaluations: Mapping[str, PolicyEvaluated], run_seed: int) -> list[Row]:
    """Rows of the comparison, the highest return first.

    Args:
        evaluations: What was measured, by policy.
        run_seed: Of the run; names the chance of the bootstrap.
    """
    measured = {
        name: {key: _measured(values, run_seed) for key, values in outcomes(evaluated).items()}
        for name, evaluated in evaluations.items()
    }
    front = dict(zip(measured, _front(list(measured.values())), strict=True))
    learned = measured.get(LEARNED)
    rows = [
        Row(
            name,
            figures,
            {} if learned is None or name == LEARNED else _against(learned, figures, run_seed),
            front[name],
        )
        for name, figures in measured.items()
    ]
    return sorted(rows, key=lambda row: -_or_least(row.figures["return"].centre))


def outcomes(evaluated: PolicyEvaluated) -> dict[str, tuple[float, ...]]:
    """One entry an episode, by the keys of `FIGURES`."""
    return {
        "return": evaluated.returns,
        "accuracy": evaluated.accuracies,
        "parameters": evaluated.parameters,
    }


def _measured(values: tuple[float, ...], run_seed: int) -> Measured:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Measured(values, None, None)
    return Measured(values, mean_interval(values), bootstrap_interval([values], rng=chance(run_seed)))


def chance(run_seed: int) -> np.random.Generator:
    """The stream under which `esper_simic.evaluation` makes its intervals of this run."""
    return seeding.generator(seeding.derive(run_seed, "evaluation", 0), "bootstrap")


def _against(
    learned: Mapping[str, Measured], other: Mapping[str, Measured], run_seed: int
) -> dict[str, Paired]:
    """Differences on the seeds that both have: more episodes keep the first ones, so the shorter list decides."""
    found = {}
    for key, ours in learned.items():
        pairs = [
            (one, two)
            for one, two in zip(ours.values, other[key].values, strict=False)
            if math.isfinite(one) and math.isfinite(two)
        ]
        if len(pairs) >= 2:
            first, second = zip(*pairs, strict=True)
            found[key] = paired(first, second, rng=chance(run_seed))
    return found


def _front(policies: Sequence[Mapping[str, Measured]]) -> list[bool]:
    """Who is on the front of accuracy against parameters, by interquartile means."""
    gains = [_or_least(figures["accuracy"].centre) for figures in policies]
    costs = [-_or_least(-figures["parameters"].centre) for figures in policies]
    return [bool(is_on) for is_on in pareto_front(gains, costs)]


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


# In words


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
    if len(rows) > 1:
        few = "is" if len(on_front) == 1 else "are"
        said.append(
            f"{_listed(on_front)} {few} on the front of accuracy against parameters: no other policy has at least "
            f"the accuracy with no more parameters."
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
