"""Plain environments stepped one after the other, as Gymnasium's vector interface without autoreset.

Whoever steps them begins the episodes of ended lanes himself: `reset(seed=[…], options={"reset_mask": mask})`, which is
Gymnasium's own way for vector environments whose autoreset is `DISABLED`. This is `gymnasium.vector.SyncVectorEnv` for
the spaces of `worlds.spaces`, without what it does for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

Array = npt.NDArray[Any]


class PlainEnvs(VectorEnv[Array, Array, Array]):
    """E environments of one kind.

    Args:
        make: Makes one of them.
        num_envs: E.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], num_envs: int) -> None:
        self._envs = [make() for _ in range(num_envs)]
        self.num_envs = num_envs
        self.single_observation_space = self._envs[0].observation_space
        self.single_action_space = self._envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observations: Any = create_empty_array(self.single_observation_space, num_envs, fn=np.zeros)
        self._rewards = np.zeros(num_envs)
        self._terminated = np.zeros(num_envs, dtype=bool)
        self._truncated = np.zeros(num_envs, dtype=bool)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every lane, or in those of `options["reset_mask"]`.

        Args:
            seed: Lane i gets `seed + i`, or the i-th of a sequence.
            options: What else stands there is handed on to the environments.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        seeds = [seed + lane for lane in range(self.num_envs)] if isinstance(seed, int) else seed
        rest = dict(options or {})
        mask = rest.pop("reset_mask", None)
        lanes = range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist()
        for lane in lanes:
            observed, _ = self._envs[lane].reset(
                seed=None if seeds is None else seeds[lane], options=rest or None
            )
            self._put(lane, observed)
        return self._copied(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Step every lane; what environments say beside is dropped."""
        # Numbers of Python for choices: environments look them up in tables and compare them with `is` and `in`.
        each = actions.tolist() if isinstance(self.single_action_space, Discrete) else actions
        for lane, (env, action) in enumerate(zip(self._envs, each, strict=True)):
            observed, reward, terminated, truncated, _ = env.step(action)
            self._put(lane, observed)
            self._rewards[lane] = reward
            self._terminated[lane] = terminated
            self._truncated[lane] = truncated
        return (
            self._copied(),
            self._rewards.copy(),
            self._terminated.copy(),
            self._truncated.copy(),
            {},
        )

    @property
    def data_digest(self) -> str:
        """Of what the environments read, where they say so."""
        return str(getattr(self._envs[0].unwrapped, "data_digest", ""))

    def _put(self, lane: int, observed: Any) -> None:
        if isinstance(self._observations, dict):
            for key, rows in self._observations.items():
                rows[lane] = observed[key]
        else:
            self._observations[lane] = observed

    def _copied(self) -> Any:
        if isinstance(self._observations, dict):
            return {key: rows.copy() for key, rows in self._observations.items()}
        return self._observations.copy()

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()
