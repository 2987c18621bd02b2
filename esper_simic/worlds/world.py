"""A world: what a run trains in, as everything else sees it.

Unrolls, trajectories, learner and evaluation know a world's `spec` and its lanes, nothing more. `world_of` is the one
place where a configuration becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from esper_simic.config import EnvironmentConfig
from esper_simic.config_gym import BLUEPRINT_CHOICE, GROWING_HOST
from esper_simic.specs import ExperienceSpec
from esper_simic.worlds.blueprint_choice import evaluation_kwargs
from esper_simic.worlds.growing import GrowingWorld
from esper_simic.worlds.gymnasium_world import GymnasiumWorld
from esper_simic.worlds.outcome import Outcome
from esper_simic.worlds.scripts import Script

Array = npt.NDArray[Any]


class Lanes(Protocol):
    """E environments stepped together; autoreset is SAME_STEP.

    A lane whose episode ends in a step already returns the next episode's first observation with it.

    | info | shape | meaning |
    |---|---|---|
    | `final_obs`, `_final_obs` | mapping of `[E, …]`, `[E]` | last observation of episodes that ended; valid rows |
    | `episode`, `_episode` | `r l success cut` and measures, each `[E, …]`; `[E]` | their results; valid rows |

    `cut` episodes did not end by the world's own rules, time limits among them: they were staggered, or `rolled_back`,
    which a world with a governor tells beside.
    Both infos are there only in steps in which an episode ends. `truncated` lanes were cut from outside and are never
    also `terminated`. Observations may be kept: no later step writes into them.
    """

    @property
    def num_envs(self) -> int:
        """Number of lanes, E."""

    def reset(self) -> tuple[Mapping[str, Array], Mapping[str, Any]]:
        """Begin the next episode in every lane: after construction the one numbered in `first_episodes`."""

    def step(
        self, actions: Array
    ) -> tuple[
        Mapping[str, Array],
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        Mapping[str, Any],
    ]:
        """Step every lane.

        Args:
            actions: `[E, …]` in shape and dtype of `ExperienceSpec.action`, as the policy gave them.

        Returns:
            Observation, reward `[E]` float64, terminated `[E]`, truncated `[E]`, infos.
        """

    def close(self) -> None:
        """Free what the environments hold."""


class World(Protocol):
    """What a run trains in."""

    @property
    def spec(self) -> ExperienceSpec:
        """Shapes of observations and actions; known without any data of the world."""

    def lanes(self, lane_seeds: Sequence[int], first_episodes: Sequence[int], *, stagger: bool) -> Lanes:
        """Fresh lanes, to be reset before their first step.

        They are a function of these arguments and of the actions.

        Args:
            lane_seeds: One a lane, in [0, 2**63).
            first_episodes: Number of the episode each lane begins with.
            stagger: Cut the first episodes short, so that the lanes' phases spread where a horizon is known.
        """

    def script(self, name: str, lanes: Lanes) -> Script:
        """A scripted policy of this world (`EnvironmentConfig.scripts`), to act in these lanes of it."""

    def digest(self) -> str:
        """Make sure that this machine can run the world; the identity of its data, 64 hexadecimal digits.

        Raises:
            ConfigError: It cannot.
        """

    def outcome(self, episode: Mapping[str, Array], lane: int) -> Outcome:
        """The result of a lane's episode, from `infos["episode"]` of the step in which it ended."""


def world_of(config: EnvironmentConfig, gamma: float) -> World:
    """The world of a configuration.

    Args:
        config: Section `environment`.
        gamma: The learner's discount; growing hosts shape their reward with it.

    Raises:
        ConfigError: There is no such id here, it cannot be made, or its spaces are not ones a policy can be made for.
    """
    if config.id == GROWING_HOST:
        return GrowingWorld(config, gamma)
    return GymnasiumWorld(
        config.id, config.kwargs, vectorised=config.vectorised == "auto", success_return=config.success_return
    )


def held_out_world_of(config: EnvironmentConfig, gamma: float) -> World:
    """The world in which a policy is measured that was trained in `world_of` the same.

    They differ where seeds alone hold nothing out: recorded outcomes are divided.

    Args:
        config: Section `environment`.
        gamma: The learner's discount.

    Raises:
        ConfigError: See `world_of`.
    """
    if config.id == BLUEPRINT_CHOICE:
        config = config.model_copy(update={"kwargs": evaluation_kwargs(config.kwargs)})
    return world_of(config, gamma)
