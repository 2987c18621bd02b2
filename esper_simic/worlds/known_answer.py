"""Small problems as Gymnasium environments, vectorised and plain: one computation behind both.

All chance of an episode is a few uniform numbers drawn when it begins, from its seed alone, by SplitMix64: NumPy makes
those of a thousand lanes at once. After them an episode is a function of its actions, so that its best and its random
return can be enumerated.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Discrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from esper_simic.errors import ContractError

Array = npt.NDArray[Any]
Lanes = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment: 2**64 divided by the golden ratio, made odd."""

SUCCESSOR: Final = 2**20
"""Place in a seed's stream of the seed that follows it: behind all numbers an episode could take."""

SEED_MAX: Final = 2**63


def stream(seeds: Array, first: int, count: int) -> Array:
    """Numbers `first` to `first + count` of the SplitMix64 streams of seeds `[N]` uint64: `[N, count]` uint64."""
    places = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    z = seeds[:, None] + places * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed


def uniforms(seeds: Array, count: int) -> npt.NDArray[np.float64]:
    """The chance of episodes with these seeds: `[N, count]` in [0, 1)."""
    return (stream(seeds, 0, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def successors(seeds: Array) -> Array:
    """The seeds `[N]` of the episodes that follow ones with these seeds where nobody names others."""
    return stream(seeds, SUCCESSOR, 1)[:, 0] >> np.uint64(1)


class KnownAnswerVectorEnv(VectorEnv[Array, Array, Array]):
    """E copies of a problem whose optimal return is known.

    With autoreset `SAME_STEP` (the default) an ended lane's next episode has the seed that follows its own. With
    `DISABLED` whoever steps begins it: `reset(seed=[…], options={"reset_mask": mask})`.

    Args:
        num_envs: E.
        max_episode_steps: Episodes are cut (`truncated`) after so many steps; None: never.
        render_mode: None; nothing is drawn.
        autoreset_mode: `SAME_STEP` or `DISABLED`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as Gymnasium declares it
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    OPTIMAL_RETURN: ClassVar[float]
    """Expected return of the best policy."""

    RANDOM_RETURN: ClassVar[float]
    """Expected return of the policy that chooses every action with equal chance."""

    DRAWS: ClassVar[int]
    """Uniform numbers an episode takes."""

    single_space: ClassVar[Space[Any]]
    single_actions: ClassVar[Space[Any]]

    data_digest: str = ""
    """Of what the problem read."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        if autoreset_mode not in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED) or render_mode is not None:
            raise ValueError("autoreset is SAME_STEP or DISABLED, and nothing is drawn")
        self.num_envs = num_envs
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        self.single_observation_space, self.single_action_space = self.single_space, self.single_actions
        self.observation_space = batch_space(self.single_space, num_envs)
        self.action_space = batch_space(self.single_actions, num_envs)
        self.elapsed: Lanes = np.zeros(num_envs, dtype=np.int64)
        self._limit = np.iinfo(np.int64).max if max_episode_steps is None else max_episode_steps
        self._seeds = np.zeros(num_envs, dtype=np.uint64)
        self._is_ready = False
        self.begin(np.arange(num_envs), np.zeros((num_envs, self.DRAWS)))

    @abstractmethod
    def begin(self, lanes: Lanes, chance: Array) -> None:
        """Put lanes `[N]` at the start of the episodes with this chance `[N, DRAWS]`; `elapsed` is 0 there."""

    @abstractmethod
    def observe(self) -> Any:
        """Observations of all lanes, a batch of `single_space` in memory of its own."""

    @abstractmethod
    def move(self, actions: Array) -> tuple[Array, Bools]:
        """Act in all lanes; `elapsed` counts this step already.

        Returns:
            Rewards `[E]` and whether the episode ended by itself `[E]`.
        """

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every lane, or in some.

        Args:
            seed: Lane i gets `seed + i`, or the i-th of a sequence; a lane without one goes on with the seed that
                follows its own, and before any with one of `np_random`.
            options: `reset_mask` `[E]` bool: the lanes; all of them without it.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        mask = (options or {}).get("reset_mask")
        lanes = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        seeds = [seed + lane for lane in range(self.num_envs)] if isinstance(seed, int) else seed
        if not self._is_ready:
            self._seeds = self.np_random.integers(SEED_MAX, size=self.num_envs).astype(np.uint64)
        following = successors(self._seeds) if self._is_ready else self._seeds
        for lane in lanes.tolist():
            own = None if seeds is None else seeds[lane]
            self._seeds[lane] = following[lane] if own is None else own
        self._is_ready = True
        self._begin(lanes)
        return self.observe(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Bools, Bools, dict[str, Any]]:
        """Act in every lane.

        Args:
            actions: A batch of `single_action_space`: `[E]` integers, or `[E, …]` numbers within its bounds.

        Raises:
            ContractError: `reset` was not called, or an action is not of the space.
        """
        if not self._is_ready:
            raise ContractError("reset the environments before their first step")
        # NumPy would take a negative choice from the back, and a NaN would be passed on.
        if not self._are_of_the_space(actions):
            raise ContractError(
                f"actions are a batch of {self.num_envs} of {self.single_actions}, not {actions!r}"
            )
        self.elapsed += 1
        reward, terminated = self.move(actions)
        truncated = (self.elapsed >= self._limit) & ~terminated
        ended = terminated | truncated
        observed, infos = self.observe(), {}
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and ended.any():
            infos = {"final_obs": observed, "_final_obs": ended}
            lanes = np.flatnonzero(ended)
            self._seeds[lanes] = successors(self._seeds[lanes])
            self._begin(lanes)
            observed = self.observe()
        return observed, reward, terminated, truncated, infos

    def _are_of_the_space(self, actions: Array) -> bool:
        space = self.single_actions
        if actions.shape != (self.num_envs, *(space.shape or ())):
            return False
        if isinstance(space, Discrete):
            return actions.dtype.kind in "iu" and int(actions.min()) >= 0 and int(actions.max()) < space.n
        return isinstance(space, Box) and bool(((actions >= space.low) & (actions <= space.high)).all())

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing is held open."""

    def _begin(self, lanes: Lanes) -> None:
        self.elapsed[lanes] = 0
        self.begin(lanes, uniforms(self._seeds[lanes], self.DRAWS))


class KnownAnswerEnv(gymnasium.Env[Any, Any]):
    """One copy of a problem; the vectorised one with one lane.

    Args:
        render_mode: None; nothing is drawn.
        **settings: Those of the problem.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    problem: ClassVar[type[KnownAnswerVectorEnv]]

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = render_mode
        self._lane = self.problem(
            1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, **settings
        )
        self.observation_space = self._lane.single_observation_space
        self.action_space = self._lane.single_action_space
        self._is_over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: the one with this seed, or without one the one that follows."""
        super().reset(seed=seed)
        self._lane.np_random = self.np_random
        self._is_over = False
        observed, infos = self._lane.reset(seed=None if seed is None else [seed])
        return self._single(observed), infos

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act.

        Raises:
            ContractError: `reset` was not called, the episode is over, or the action is not of the action space.
        """
        if self._is_over:
            raise ContractError("reset the environment: its episode is over")
        observed, reward, terminated, _, infos = self._lane.step(np.asarray(action)[None])
        self._is_over = bool(terminated[0])
        return self._single(observed), float(reward[0]), self._is_over, False, infos

    def _single(self, observed: Any) -> Any:
        if isinstance(self.observation_space, Dict):
            return {key: rows[0] for key, rows in observed.items()}
        return int(observed[0]) if isinstance(self.observation_space, Discrete) else observed[0]
