"""Whole episodes of anything that acts, on held-out seeds, in any world.

Episode i is number 0 of the lane with seed `seeds[i]`, from its first step to its last; a lane that is done before the
others plays on, unheeded. Chance of the actions is the stream `(seed, "controller")`, as in `evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from esper_simic import seeding
from esper_simic.errors import BudgetExceeded
from esper_simic.specs import ActionSpec
from esper_simic.worlds.scripts import RandomScript

if TYPE_CHECKING:  # for its name alone: growing hosts, which it knows too, bring torch
    from esper_simic.worlds.world import World

Array = npt.NDArray[Any]

STEPS_MAX: Final = 100_000
"""Steps after which an episode is taken for one that never ends."""


class PlayedEpisode(msgspec.Struct, frozen=True, kw_only=True):
    """What one held-out episode came to.

    Attributes:
        seed: Of the lane; the episode is number 0 of it.
        episode_return: Undiscounted sum of the rewards.
        length: Steps.
        truncated: Whether it was cut from outside.
        success: Whether the world calls it one.
        measures: What else the world measured, by name.
    """

    seed: int
    episode_return: float
    length: int
    truncated: bool
    success: bool
    measures: dict[str, float]


class Acting(Protocol):
    """Whatever chooses actions for E lanes; it may remember."""

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """Actions `[E, …]` as the world's `spec` says.

        Args:
            observation: Each `[E, …]`.
            episode_start: `[E]` bool; the observation begins an episode.
            uniforms: `[E, chance]` float64 in [0, 1), as many as one action takes.
        """


class RandomActing:
    """Acts by chance alone; see `RandomScript`.

    Args:
        action: What an action is.
    """

    def __init__(self, action: ActionSpec) -> None:
        self._script = RandomScript(action)

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """See `Acting`."""
        return self._script.choose(observation, episode_start, uniforms).actions


def play(
    world: World,
    seeds: Sequence[int],
    acting: Callable[[int], Acting],
    *,
    lanes_max: int,
    steps_max: int = STEPS_MAX,
    observer: Callable[[], None] | None = None,
) -> list[PlayedEpisode]:
    """Play one whole episode on each seed.

    Args:
        world: Where.
        seeds: Held-out seeds, such as those of `evaluation.held_out_seeds`.
        acting: Makes what acts in so many lanes; called once for every `lanes_max` seeds.
        lanes_max: Lanes stepped together.
        steps_max: Most steps of an episode.
        observer: Told after every step of all lanes that there was progress.

    Returns:
        The episodes, in the order of the seeds.

    Raises:
        BudgetExceeded: An episode did not end within `steps_max` steps.
    """
    played: list[PlayedEpisode] = []
    for start in range(0, len(seeds), lanes_max):
        chunk = list(seeds[start : start + lanes_max])
        played.extend(_play(world, chunk, acting(len(chunk)), steps_max, observer))
    return played


def _play(
    world: World, seeds: list[int], acting: Acting, steps_max: int, observer: Callable[[], None] | None
) -> list[PlayedEpisode]:
    lanes = world.lanes(seeds, [0] * len(seeds), stagger=False)
    streams = [seeding.generator(seed, "controller") for seed in seeds]
    start = np.ones(len(seeds), dtype=bool)
    played: dict[int, PlayedEpisode] = {}
    try:
        observation, _ = lanes.reset()
        for _ in range(steps_max):
            uniforms = np.stack([stream.random(world.spec.action.chance) for stream in streams])
            actions = acting.act(observation, start, uniforms)
            observation, _, terminated, truncated, infos = lanes.step(actions)
            start = terminated | truncated
            for lane in np.flatnonzero(start).tolist():
                if lane not in played:
                    played[lane] = _ended(world, seeds[lane], infos["episode"], lane, bool(truncated[lane]))
            if observer is not None:
                observer()
            if len(played) == len(seeds):
                return [played[lane] for lane in range(len(seeds))]
    finally:
        lanes.close()
    raise BudgetExceeded(
        f"{len(seeds) - len(played)} of {len(seeds)} episodes did not end within {steps_max} steps; give the "
        f"environment a time limit (environment.kwargs.max_episode_steps)"
    )


def _ended(
    world: World, seed: int, episode: Mapping[str, Array], lane: int, truncated: bool
) -> PlayedEpisode:
    outcome = world.outcome(episode, lane)
    return PlayedEpisode(
        seed=seed,
        episode_return=outcome.episode_return,
        length=outcome.length,
        truncated=truncated,
        success=outcome.success,
        measures=outcome.measures,
    )
