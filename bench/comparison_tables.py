"""Tables in Markdown of what policies came to on the same seeds: of one run, and of several runs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from esper_simic import seeding
from esper_simic.comparison import (
    Estimate,
    Interval,
    bootstrap_interval,
    interquartile_mean_of,
    mean_of,
    pareto_front,
)
from esper_simic.evaluation import FIXED, LEARNED, EpisodeOutcome, PolicyOutcome, compare
from supervisor.report.figures import difference_words, interval_words

Outcomes = Mapping[str, PolicyOutcome]
Values = list[float]

NOTHING: Final = "–"

HIGHER: Final = "higher by IQM, and in which its interval lies wholly above the other's"

FIGURES: Final[tuple[tuple[str, int, Callable[[EpisodeOutcome], float | None]], ...]] = (
    ("return", 2, lambda episode: episode.episode_return),
    ("accuracy %", 1, lambda episode: episode.accuracy),
    ("parameters added", 0, lambda episode: float(episode.parameters_added)),
)


def run_tables(title: str, outcomes: Outcomes) -> str:
    """The policies of one run beside each other, and the learned one against each of them."""
    front = on_front(
        {
            name: (outcome.accuracy_middle.value, outcome.parameters_added_middle.value)
            for name, outcome in outcomes.items()
        }
    )
    rows = [
        [
            name,
            _middle(outcome.episode_return_middle, 2),
            _mean(outcome.episode_return, 2),
            _middle(outcome.accuracy_middle, 1),
            _mean(outcome.accuracy, 1),
            _middle(outcome.parameters_added_middle, 0),
            front[name],
        ]
        for name, outcome in outcomes.items()
    ]
    heads = ["policy", "return, IQM", "return, mean", "accuracy %, IQM", "accuracy %, mean"]
    parts = [
        f"### {title}",
        f"{len(outcomes[LEARNED].episodes)} held-out episodes each, same seeds; [95 % interval].",
        _table([*heads, "parameters added, IQM", "on the front"], rows),
    ]
    if len(outcomes) > 1:
        parts += [f"`{LEARNED}` minus each, seed by seed:", _differences(outcomes)]
    return "\n\n".join(parts) + "\n"


def on_front(points: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """Whether each policy lies on the front of accuracy against parameters; fixed networks are shown beside it.

    Args:
        points: Accuracy and parameters of each policy.
    """
    growing = {name: point for name, point in points.items() if name != FIXED}
    accuracies, parameters = zip(*growing.values(), strict=True)
    found = dict(zip(growing, pareto_front(accuracies, parameters).tolist(), strict=True))
    return {name: ("yes" if found[name] else "no") if name in found else NOTHING for name in points}


def _differences(outcomes: Outcomes) -> str:
    rows = []
    for name, outcome in outcomes.items():
        if name == LEARNED:
            continue
        found = compare(outcomes[LEARNED], outcome)
        gained, chance = found.episode_return, None
        if gained is not None:
            chance = gained.probability
        rows.append(
            [
                name,
                NOTHING if gained is None else difference_words(gained.interquartile_mean, 2),
                NOTHING if gained is None else difference_words(gained.mean, 2),
                _middle(chance, 2),
                difference_words(found.accuracy.interquartile_mean, 1),
                difference_words(found.parameters_added.interquartile_mean, 0),
            ]
        )
    heads = [
        "against",
        "return, IQM",
        "return, mean",
        "P(more return)",
        "accuracy, IQM",
        "parameters added, IQM",
    ]
    return _table(heads, rows)


def pooled_tables(runs: Sequence[Outcomes]) -> str:
    """All runs together: episodes are drawn anew within their run, so that how runs differ is no chance here."""
    names = list(runs[0])
    estimates = {
        name: [_pooled([_values(run[name], figure) for run in runs]) for figure in range(len(FIGURES))]
        for name in names
    }
    front = on_front(
        {
            name: (accuracy.value, cost.value)
            for name, (_, accuracy, cost) in estimates.items()
            if accuracy and cost
        }
    )
    rows = [
        [
            name,
            *(_middle(one, digits) for one, (_, digits, _) in zip(found, FIGURES, strict=True)),
            front[name],
        ]
        for name, found in estimates.items()
    ]
    heads = ["policy", *(f"{label}, IQM" for label, _, _ in FIGURES), "on the front"]
    return "\n\n".join(
        [
            f"### All {len(runs)} runs together",
            "IQM of all episodes [95 % interval, bootstrap stratified by run].",
            _table(heads, rows),
            f"`{LEARNED}` minus each, seed by seed; runs in which its return is {HIGHER}:",
            _table(
                [
                    "against",
                    *(f"{label}, IQM" for label, _, _ in FIGURES),
                    "return, mean",
                    "higher",
                    "wholly above",
                ],
                [_pooled_row(runs, name) for name in names if name != LEARNED],
            ),
        ]
    )


def _pooled_row(runs: Sequence[Outcomes], name: str) -> list[str]:
    cells = [name]
    for figure, (_, digits, _) in enumerate(FIGURES):
        found = _pooled([_minus(run, name, figure) for run in runs])
        cells.append(NOTHING if found is None else difference_words(found, digits))
    gained = [_minus(run, name, 0) for run in runs]
    mean = _pooled(gained, mean_of)
    cells.append(NOTHING if mean is None else difference_words(mean, 2))
    return [*cells, *_wins(runs, name)]


def _wins(runs: Sequence[Outcomes], name: str) -> list[str]:
    """In how many runs the learned policy's return is higher than that of another, and wholly above it."""
    pairs = [(run[LEARNED].episode_return_middle, run[name].episode_return_middle) for run in runs]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not known:
        return [NOTHING, NOTHING]
    higher = sum(one.value > other.value for one, other in known)
    above = sum(one.low > other.high for one, other in known)
    return [f"{higher} of {len(known)}", f"{above} of {len(known)}"]


def _values(outcome: PolicyOutcome, figure: int) -> Values | None:
    """One entry an episode; None where an episode has none."""
    of = FIGURES[figure][2]
    found = [value for value in map(of, outcome.episodes) if value is not None]
    return found if len(found) == len(outcome.episodes) else None


def _minus(run: Outcomes, name: str, figure: int) -> Values | None:
    ours, theirs = _values(run[LEARNED], figure), _values(run[name], figure)
    if ours is None or theirs is None:
        return None
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _pooled(
    strata: Sequence[Values | None],
    statistic: Callable[..., np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = interquartile_mean_of,
) -> Estimate | None:
    known = [values for values in strata if values is not None]
    if len(known) < len(strata):
        return None
    return bootstrap_interval(known, rng=seeding.generator(0, "bootstrap", "pooled"), statistic=statistic)


def _middle(found: Estimate | None, digits: int) -> str:
    return NOTHING if found is None else interval_words(found.value, found.low, found.high, digits)


def _mean(found: Interval | None, digits: int) -> str:
    return NOTHING if found is None else interval_words(found.mean, found.low, found.high, digits)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
