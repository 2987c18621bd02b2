"""A Gymnasium vector environment as lanes: episodes by number, SAME_STEP, true last observations.

Episode n of a lane is the environment reset with the seed `episode_seed(lane_seed, n)`, in whatever way the
environments are vectorised. So lanes of environments whose chance comes from that seed alone depend each on its own
seed, number and actions. The vector environment must leave resetting to its user (autoreset `DISABLED`): `PlainEnvs`,
`CartPoles`, `KnownAnswerVectorEnv` and any class that takes `reset_mask`.

A vector environment that resets ended lanes itself, within the same step (`SAME_STEP`), is taken as it is: its lanes
are a function of all lane seeds, all first episodes and all actions together, and are not staggered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from esper_simic import seeding
from esper_simic.errors import ContractError
from esper_simic.worlds.spaces import ActionForm, Floats, ObservationForm

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Observation = dict[str, Array]

SEED_BITS: Final = 31
"""Environments hand their seed on to generators that take no more."""


def episode_seed(lane_seed: int, number: int) -> int:
    """The seed with which episode `number` of a lane is reset, in [0, 2**31)."""
    return seeding.derive(lane_seed, number) >> (63 - SEED_BITS)


class GymnasiumLanes:
    """See the module and `worlds.world.Lanes`.

    Args:
        envs: E environments; closed with the lanes.
        name: Their id, for what is said of them.
        forms: How observations and actions are translated.
        lane_seeds: One a lane.
        first_episodes: Number of the episode each lane begins with.
        horizon: Steps after which an episode is cut by its time limit; needed to stagger first episodes, else None.
        success_return: An episode with this return or more is a success; without one none is.
    """

    def __init__(
        self,
        envs: VectorEnv[Array, Array, Array],
        name: str,
        forms: tuple[ObservationForm, ActionForm],
        *,
        lane_seeds: Sequence[int],
        first_episodes: Sequence[int],
        horizon: int | None,
        success_return: float | None,
    ) -> None:
        if len(lane_seeds) != envs.num_envs or len(first_episodes) != envs.num_envs:
            raise ContractError(
                f"{envs.num_envs} lanes of {name} got {len(lane_seeds)} seeds and {len(first_episodes)} episodes"
            )
        self._envs, self._name = envs, name
        self._observation_form, self._action_form = forms
        self._restarts_itself = envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self._lane_seeds = tuple(lane_seeds)
        self._next_episodes = list(first_episodes)
        self._success_return = np.inf if success_return is None else success_return
        lanes = envs.num_envs
        self._returns = np.zeros(lanes)
        self._lengths = np.zeros(lanes, dtype=np.int64)
        self._never = np.iinfo(np.int64).max
        self._cuts = np.full(lanes, self._never)
        if horizon is not None and not self._restarts_itself:
            self._cuts = np.maximum(np.rint(horizon * np.arange(1, lanes + 1) / lanes).astype(np.int64), 1)
        self._is_ready = False

    @property
    def num_envs(self) -> int:
        """Number of lanes."""
        return self._envs.num_envs

    def reset(self) -> tuple[Observation, dict[str, Any]]:
        """Begin the next episode in every lane: the first time those that `first_episodes` numbers."""
        if self._is_ready:
            self._cuts[:] = self._never
        observed = self._begin(np.arange(self.num_envs))
        self._is_ready = True
        return self._observation_form.named(observed), {}

    def step(
        self, actions: Array
    ) -> tuple[Observation, npt.NDArray[np.float64], Bools, Bools, dict[str, Any]]:
        """Step every lane.

        Raises:
            ContractError: `reset` was not called, or an environment gave a number that is none.
        """
        if not self._is_ready:
            raise ContractError(f"reset the lanes of {self._name} before their first step")
        native = self._action_form.native(actions)
        observed, rewards, terminated, truncated, infos = self._envs.step(native)
        vectors = self._observation_form.vectors(observed)
        # Adding 0 makes memory of its own, and one zero of two: episodes are compared by their bytes.
        reward = np.asarray(rewards, dtype=np.float64) + 0.0
        self._returns += reward
        self._lengths += 1
        # An episode that is over is not cut: nothing follows its last observation.
        shortened = (self._lengths >= self._cuts) & ~terminated & ~truncated
        cut = (truncated | shortened) & ~terminated
        ended = terminated | cut
        self._check(vectors, reward)
        if not ended.any():
            return self._observation_form.named(vectors), reward, terminated, cut, {}
        lanes = np.flatnonzero(ended)
        told = self._finish(ended, shortened, lanes, vectors, infos)
        following = self._observation_form.named(self._continued(lanes, vectors))
        return following, reward, terminated, cut, told

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def _begin(self, lanes: Indices) -> Floats:
        """Start the next episode of some lanes; the observations of all."""
        if self._restarts_itself:
            # Once for all: later episodes begin by the environments' own chance.
            named = seeding.derive(*self._lane_seeds, *self._next_episodes) >> (63 - SEED_BITS)
            observed, _ = self._envs.reset(seed=named)
        else:
            seeds: list[int | None] = [None] * self.num_envs
            mask = np.zeros(self.num_envs, dtype=bool)
            mask[lanes] = True
            for lane in lanes.tolist():
                seeds[lane] = episode_seed(self._lane_seeds[lane], self._next_episodes[lane])
            # Gymnasium's own classes take a list too, and it is the way to name a lane's seed.
            observed, _ = self._envs.reset(
                seed=seeds,  # type: ignore[arg-type]
                options=None if len(lanes) == self.num_envs else {"reset_mask": mask},
            )
        self._count(lanes)
        return self._observation_form.vectors(observed)

    def _count(self, lanes: Indices) -> None:
        """Books of lanes whose next episode has begun."""
        self._returns[lanes] = 0
        self._lengths[lanes] = 0
        for lane in lanes.tolist():
            self._next_episodes[lane] += 1

    def _continued(self, lanes: Indices, vectors: Floats) -> Floats:
        """The observations to act on, with ended lanes in their next episodes."""
        self._cuts[lanes] = self._never
        if not self._restarts_itself:
            return self._begin(lanes)
        self._count(lanes)
        return vectors

    def _finish(
        self, ended: Bools, shortened: Bools, lanes: Indices, vectors: Floats, infos: dict[str, Any]
    ) -> dict[str, Any]:
        """What is told of episodes that end in this step."""
        final = vectors
        if self._restarts_itself:
            final = vectors.copy()
            last = np.stack([infos["final_obs"][lane] for lane in lanes.tolist()])
            final[lanes] = self._observation_form.vectors(last)
        returns = self._returns.copy()
        return {
            "final_obs": self._observation_form.named(final),
            "_final_obs": ended,
            "episode": {
                "r": returns,
                "l": self._lengths.copy(),
                "success": returns >= self._success_return,
                "cut": shortened,
            },
            "_episode": ended.copy(),
        }

    def _check(self, vectors: Floats, reward: Array) -> None:
        if np.isfinite(vectors).all() and np.isfinite(reward).all():
            return
        sound = np.isfinite(vectors).all(axis=1) & np.isfinite(reward)
        lane = int(np.flatnonzero(~sound)[0])
        raise ContractError(
            f"{self._name} gave a number that is none, or none that float32 holds, in lane {lane}, episode "
            f"{self._next_episodes[lane] - 1}, step {self._lengths[lane]}: reward {reward[lane]}, observation "
            f"{vectors[lane].tolist()}"
        )
