"""Recorded outcomes as a table to choose from: described hosts, what they may be given, and what each choice earned.

A *case* is one trial of a place (`blueprint_outcomes`): a host as it was when a blueprint was chosen for it. Every
blueprint that fits it was grown from there, so what each choice earns is known:

    reward = accuracy_weight · (points of accuracy more than the twin's)
             − rent_weight · ln(1 + parameters added / max(host's parameters, 200))

`noop` grows nothing and earns 0. Cases are divided into parts that share none: training, trials that were not trained
on of the same hosts, and hosts that were not trained on.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import (
    FEATURES,
    OutcomesHead,
    PlaceOutcomes,
    decode,
    describe,
    relative_parameters,
)
from esper_simic.errors import ConfigError

Array = npt.NDArray[Any]

Part = Literal["training", "unseen-trials", "unseen-hosts"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)

SHIPPED: Final = "blueprint_outcomes.jsonl"
"""The table of this package, beside this module."""

HELD_OUT_HOSTS: Final = (
    "synthetic:1x8x8:4:1024/rescue",
    "digits/highres",
    "synthetic:2x1x32:6:1024/series",
    "synthetic:20x1x1:5:1024/mlp",
)
"""Hosts of the shipped table that are not trained on: one too small, one able, one of series, one of vectors."""

NOOP: Final = BLUEPRINTS.index("noop")


@dataclass(frozen=True, slots=True)
class Table:
    """A file of outcomes, read.

    Attributes:
        head: How it was made.
        outcomes: Place by place.
        digest: SHA-256 of the file.
    """

    head: OutcomesHead
    outcomes: tuple[PlaceOutcomes, ...]
    digest: str


@dataclass(frozen=True)
class Cases:
    """N described hosts of H different ones, with what may be chosen for them and what it earned.

    | field | shape | meaning |
    |---|---|---|
    | `features` | `[N, features]` float32 | the host in numbers |
    | `mask` | `[N, 13]` int8 | 1 for each blueprint that it may be given, noop always among them |
    | `reward` | `[N, 13]` float64 | of each choice; 0 where it may not be made |
    | `place` | `[N]` int64 | number of the place |
    | `host` | `[N]` int64 | number of the host, in [0, H) |
    | `names` | H names | `task/host` |
    """

    features: Array
    mask: Array
    reward: Array
    place: Array
    host: Array
    names: tuple[str, ...]

    @functools.cached_property
    def weights(self) -> Array:
        """`[N]` chance of each case: hosts alike, and the cases of one host alike."""
        counts = np.bincount(self.host, minlength=len(self.names))
        chances: Array = 1 / (len(self.names) * counts[self.host])
        return chances

    def mean_by_place(self) -> Array:
        """`[N, 13]` what each choice earned in the mean over the cases of the same place; -inf where it is illegal."""
        _, number = np.unique(self.place, return_inverse=True)
        counts = np.bincount(number)
        sums = np.zeros((len(counts), self.reward.shape[1]))
        np.add.at(sums, number, self.reward)
        return np.where(self.mask > 0, (sums / counts[:, None])[number], -np.inf)

    def ranking(self) -> Array:
        """`[13]` mean reward of each choice over all hosts that may be given it, hosts alike; -inf where none may."""
        sums = np.zeros((len(self.names), self.reward.shape[1]))
        counts = np.zeros_like(sums)
        np.add.at(sums, self.host, self.reward)
        np.add.at(counts, self.host, self.mask)
        offered = counts > 0
        means = np.where(offered, sums / np.maximum(counts, 1), 0.0)
        hosts = offered.sum(axis=0)
        return np.where(hosts > 0, means.sum(axis=0) / np.maximum(hosts, 1), -np.inf)


@functools.cache
def read_table(path: str) -> Table:
    """A file of outcomes, read once a process.

    Args:
        path: Of the file; empty for the one that this package brings.

    Raises:
        ConfigError: It is not there, or no such file.
    """
    source = Path(path) if path else resources.files("esper_simic.worlds") / SHIPPED
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the table of outcomes {path or SHIPPED} cannot be read: {error.strerror}; make one with "
            f"simic-supervisor try-blueprints --out FILE",
            "environment.kwargs",
        ) from error
    head, outcomes = decode(data, path or SHIPPED)
    return Table(head, tuple(outcomes), hashlib.sha256(data).hexdigest())


def cases_of(
    table: Table,
    part: Part,
    *,
    held_out_hosts: Collection[str],
    held_out_trials: int,
    accuracy_weight: float,
    rent_weight: float,
) -> Cases:
    """The cases of one part of a table.

    Args:
        table: Where they stand.
        part: Which.
        held_out_hosts: `task/host` of those that are not trained on.
        held_out_trials: So many, the last ones, of every other place are not trained on.
        accuracy_weight: Reward of a point of accuracy.
        rent_weight: Cost of parameters.

    Raises:
        ConfigError: A host that the table does not know, or a part without cases.
    """
    known = {_name(one) for one in table.outcomes}
    unknown = sorted(set(held_out_hosts) - known)
    if unknown:
        raise ConfigError(
            f"held_out_hosts: no outcome of {unknown[0]!r} is recorded; there are {', '.join(sorted(known))}",
            "environment.kwargs",
        )
    chosen = [
        (place, one, trials)
        for place, one in enumerate(table.outcomes)
        if (trials := _trials(one, part, _name(one) in held_out_hosts, held_out_trials))
    ]
    if not chosen:
        raise ConfigError(
            f"no case is left for {part} by held_out_hosts and held_out_trials", "environment.kwargs"
        )
    names = tuple(dict.fromkeys(_name(one) for _, one, _ in chosen))
    rows = [(place, one, trial) for place, one, trials in chosen for trial in trials]
    reward, mask = (
        np.zeros((len(rows), len(BLUEPRINTS))),
        np.zeros((len(rows), len(BLUEPRINTS)), dtype=np.int8),
    )
    mask[:, NOOP] = 1
    for row, (_, one, trial) in enumerate(rows):
        for grown in one.grown:
            choice = BLUEPRINTS.index(grown.blueprint)
            rent = relative_parameters(grown.parameters, one.place.host_parameters)
            reward[row, choice] = accuracy_weight * grown.accuracy_change[trial] - rent_weight * rent
            mask[row, choice] = 1
    return Cases(
        features=np.stack([describe(one, trial) for _, one, trial in rows]).reshape(-1, len(FEATURES)),
        mask=mask,
        reward=reward,
        place=np.array([place for place, _, _ in rows]),
        host=np.array([names.index(_name(one)) for _, one, _ in rows]),
        names=names,
    )


def _name(outcomes: PlaceOutcomes) -> str:
    return f"{outcomes.place.task}/{outcomes.place.host}"


def _trials(outcomes: PlaceOutcomes, part: Part, is_held_out: bool, held_out_trials: int) -> Sequence[int]:
    count = len(outcomes.seeds)
    if is_held_out:
        return range(count) if part == "unseen-hosts" else ()
    first = max(0, count - held_out_trials)
    if part == "training":
        return range(first)
    return range(first, count) if part == "unseen-trials" else ()
