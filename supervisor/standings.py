"""The policies that were measured, beside each other: their figures with intervals, and who is ahead of whom.

The journal has every episode's outcome, so all of it is computed here from them, for old journals as for new ones. The
statistics are `esper_simic.comparison`'s, under the chance that the evaluators use. Whoever imports this brings numpy
and scipy.
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
from supervisor.events import FIXED, LEARNED, PolicyEvaluated, RunConfigured


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
    """One policy: its figures, and what the learned one has more than it, seed by seed.

    `is_on_front`: no other growing policy has at least its accuracy with no more parameters; fixed networks are shown
    beside that front and are never on it.
    """

    name: str
    figures: dict[str, Measured]
    against: dict[str, Paired]
    is_on_front: bool

    @property
    def episodes(self) -> int:
        """How many were measured."""
        return max(len(measured.values) for measured in self.figures.values())


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
    grown = {name: figures for name, figures in measured.items() if name != FIXED}
    front = _front({name: figures for name, figures in grown.items() if figures["accuracy"].values})
    learned = measured.get(LEARNED)
    rows = [
        Row(
            name,
            figures,
            {} if learned is None or name == LEARNED else _against(learned, figures, run_seed),
            name in front,
        )
        for name, figures in measured.items()
    ]
    return sorted(rows, key=lambda row: -_or_least(row.figures["return"].centre))


def known_figures(rows: Sequence[Row]) -> tuple[Figure, ...]:
    """The figures that any of these policies has: where nothing grows there is no accuracy and no parameter.

    The return is always one of them, and without any policy all are.
    """
    if not rows:
        return FIGURES
    return tuple(
        figure
        for figure in FIGURES
        if figure.key == "return" or any(row.figures[figure.key].values for row in rows)
    )


def run_seed_of(configured: RunConfigured | None) -> int:
    """The seed from which all chance of a run is derived; 0 where it is not known."""
    section = configured.config.get("simic_trainer") if configured else None
    seed = section.get("seed") if isinstance(section, dict) else None
    return seed if isinstance(seed, int) else 0


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


def _front(policies: Mapping[str, Mapping[str, Measured]]) -> set[str]:
    """Who is on the front of accuracy against parameters, by interquartile means."""
    gains = [_or_least(figures["accuracy"].centre) for figures in policies.values()]
    costs = [-_or_least(-figures["parameters"].centre) for figures in policies.values()]
    return {name for name, is_on in zip(policies, pareto_front(gains, costs), strict=True) if is_on}


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
