"""The scalar Gymnasium environment: one growing host. The same code as the vectorised one, with one lane."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host import masks
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.spaces import action_space, observation_space, resolve_config
from esper_simic.growing_host.view import HostView

Arrays = dict[str, NDArray[np.generic]]


class GrowingHostEnv(gymnasium.Env[Arrays, NDArray[np.int64]]):
    """One growing host; an action is one choice per head (`actions.HEADS`), a step one epoch of the host.

    The horizon ends an episode as `terminated`: the epoch is observed, so it is a finite-horizon task. `infos` hold
    `action_mask`, `reward_parts`, `action_succeeded`, `accuracy`, `parameters_added` and `episode_number`.

    Args:
        config: Task, host and rules; or give its fields as keywords.
        gamma: The learner's discount, for the reward's shaping.
        render_mode: Only None.
        **settings: Fields of `EnvironmentConfig`, instead of `config`.

    Raises:
        ConfigError: The configuration cannot be obeyed.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(
        self,
        config: EnvironmentConfig | None = None,
        *,
        gamma: float = 0.99,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.config = resolve_config(config, settings)
        self.render_mode = render_mode
        self._hosts = GrowingHosts(1, self.config, gamma=gamma)
        self.spec_observation = self._hosts.spec
        self.observation_space = observation_space(self.spec_observation)  # type: ignore[assignment]
        self.action_space = action_space(len(self.config.slots))
        self._lane_seed: int | None = None
        self._episode = -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Begin an episode: number 0 of the lane `seed`, or without a seed the next one of the same lane."""
        super().reset(seed=seed)
        if seed is not None:
            self._lane_seed, self._episode = seed, -1
        elif self._lane_seed is None:
            self._lane_seed = int(self.np_random.integers(2**63))
        self._episode += 1
        self._hosts.start(np.array([0]), [self._lane_seed], [self._episode])
        observed = self._observe()
        return observed, self._info(observed)

    def step(self, action: NDArray[np.int64]) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """One epoch of the host.

        Raises:
            ContractError: `reset` was not called, the episode is over, or the action is not in the action space.
        """
        if self._episode < 0 or self._hosts.epoch[0] >= self.config.max_epochs:
            raise ContractError("reset the environment: no episode is under way")
        result = self._hosts.step(np.asarray(action)[None])
        observed = self._observe()
        info = self._info(observed) | {
            "reward_parts": {name: float(part[0]) for name, part in result.reward_parts.items()},
            "action_succeeded": bool(result.succeeded[0]),
        }
        return observed, float(result.reward[0]), bool(result.terminated[0]), False, info

    def view(self) -> HostView:
        """A frozen picture of the host, for scripted controllers."""
        return self._hosts.view()

    def _observe(self) -> Arrays:
        return {key: array[0] for key, array in self._hosts.observe().items()}

    def _info(self, observed: Arrays) -> dict[str, Any]:
        packed = observed["action_mask"].astype(np.int8, copy=False)
        return {
            "action_mask": masks.per_head(packed[None], len(self.config.slots))[0],
            "accuracy": float(self._hosts.accuracy[0]),
            "parameters_added": int(self._hosts.parameters_added[0]),
            "episode_number": self._episode,
        }
