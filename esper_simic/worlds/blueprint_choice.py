"""Karn's world: choose the blueprint that is to be grown into a described host; `esper_simic/BlueprintChoice-v0`.

An episode is one choice (a contextual bandit). Seen are the host in numbers and which blueprints it may be given; the
reward is what that choice came to when it was really tried (`blueprint_table`). Which host an episode is about, and
which trial of it, is its chance.

A blueprint that the host may not be given grows nothing, and costs `REFUSAL`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, cast

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

from esper_simic.actions import BLUEPRINTS
from esper_simic.blueprint_outcomes import FEATURES
from esper_simic.worlds.blueprint_table import HELD_OUT_HOSTS, PARTS, Cases, Part, cases_of, read_table
from esper_simic.worlds.known_answer import Bools, KnownAnswerEnv, KnownAnswerVectorEnv, Lanes
from esper_simic.worlds.spaces import ACTION_MASK, OBSERVATION

Array = npt.NDArray[Any]

REFUSAL: Final = 1.0
"""What it costs to choose what may not be chosen."""

FEATURE_BOUND: Final = 10.0

HELD_OUT_TRIALS: Final = 2


def held_out_of(table: str, named: Sequence[str] | None) -> tuple[str, ...]:
    """The hosts that are not trained on, where these are named: None means some of the package's own table's."""
    if named is not None:
        return tuple(named)
    return () if table else HELD_OUT_HOSTS


def evaluation_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the environment in which a policy is measured that was trained in one with these.

    Its cases are hosts that were not trained on, or where no host is held out, trials.
    """
    hosts = held_out_of(kwargs.get("table", ""), kwargs.get("held_out_hosts"))
    return {**kwargs, "part": "unseen-hosts" if hosts else "unseen-trials"}


@functools.cache
def load_cases(
    table: str,
    part: Part,
    held_out_hosts: tuple[str, ...],
    held_out_trials: int,
    weights: tuple[float, float],
) -> Cases:
    """The cases of a part; see `blueprint_table`."""
    return cases_of(
        read_table(table),
        part,
        held_out_hosts=held_out_hosts,
        held_out_trials=held_out_trials,
        accuracy_weight=weights[0],
        rent_weight=weights[1],
    )


class BlueprintChoiceVectorEnv(KnownAnswerVectorEnv):
    """E hosts for each of which a blueprint is to be chosen.

    Args:
        num_envs: E.
        table: File of outcomes; empty for the one that this package brings.
        part: Cases of which part: `training`, `unseen-trials`, `unseen-hosts`.
        held_out_hosts: `task/host` of those that are not trained on; None: some of the package's own table, none of
            another.
        held_out_trials: So many trials of every other place are not trained on.
        accuracy_weight: Reward of a point of accuracy more than without a blueprint.
        rent_weight: Cost of parameters, times the logarithm of how much larger they make the host.
        **settings: See `KnownAnswerVectorEnv`.

    Attributes:
        cases: What episodes are about.
        data_digest: SHA-256 of the file.

    Raises:
        ConfigError: There is no such file, or nothing in it for this part.
        ValueError: There is no such part.
    """

    DRAWS = 1
    single_space: ClassVar = Dict(
        {
            OBSERVATION: Box(-FEATURE_BOUND, FEATURE_BOUND, (len(FEATURES),), dtype=np.float32),
            ACTION_MASK: MultiBinary(len(BLUEPRINTS)),
        }
    )
    single_actions: ClassVar = Discrete(len(BLUEPRINTS))

    def __init__(
        self,
        num_envs: int = 1,
        *,
        table: str = "",
        part: str = "training",
        held_out_hosts: Sequence[str] | None = None,
        held_out_trials: int = HELD_OUT_TRIALS,
        accuracy_weight: float = 0.1,
        rent_weight: float = 0.5,
        **settings: Any,
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"part is one of {', '.join(PARTS)}, not {part!r}")
        hosts = held_out_of(table, held_out_hosts)
        self.cases = load_cases(table, part, hosts, held_out_trials, (accuracy_weight, rent_weight))
        self.data_digest = read_table(table).digest
        self._ends = np.cumsum(self.cases.weights)
        super().__init__(num_envs, **settings)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """See `KnownAnswerVectorEnv`: the host, and the trial of it, by the case's chance."""
        if len(lanes) == self.num_envs:
            self._case = np.zeros(self.num_envs, dtype=np.int64)
        drawn = np.searchsorted(self._ends, chance[:, 0], side="right")
        self._case[lanes] = np.minimum(drawn, len(self._ends) - 1)

    def observe(self) -> Any:
        """The hosts in numbers, and what they may be given."""
        return {
            OBSERVATION: self.cases.features[self._case],
            ACTION_MASK: self.cases.mask[self._case],
        }

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """What the choice came to."""
        legal = self.cases.mask[self._case, actions] > 0
        reward = np.where(legal, self.cases.reward[self._case, actions], -REFUSAL)
        return reward, np.ones(self.num_envs, dtype=bool)


class BlueprintChoiceEnv(KnownAnswerEnv):
    """One `BlueprintChoiceVectorEnv`."""

    problem: ClassVar = BlueprintChoiceVectorEnv

    @property
    def data_digest(self) -> str:
        """SHA-256 of the file of outcomes."""
        return cast("BlueprintChoiceVectorEnv", self._lane).data_digest
