"""The scalar Gymnasium environment: one growing host. The same code as the vectorised one, with one lane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host import masks
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.picture import check_render_mode, drawn
from esper_simic.growing_host.spaces import action_space, observation_space, resolve_config
from esper_simic.growing_host.view import HostView

Arrays = dict[str, NDArray[np.generic]]


class GrowingHostEnv(gymnasium.Env[Arrays, NDArray[np.int64]]):
    """One growing host; an action is one choice per head (`actions.HEADS`), a step one epoch of the host.

    The horizon ends an episode as `terminated`: the epoch is observed, so it is a finite-horizon task. A host that
    breaks down is rolled back by the governor, which ends its episode as `truncated`. `infos` hold `action_mask`,
    `reward_parts`, `action_succeeded`, `accuracy`, `parameters_added` and `episode_number`.

    Args:
        config: Task, host and rules; or give its fields as keywords.
        gamma: The learner's discount, for the reward's shaping.
        render_mode: `ansi`: lines of text; `rgb_array`: an image; None: nothing is drawn.
        **settings: Fields of `EnvironmentConfig`, instead of `config`.

    Raises:
        ConfigError: The configuration cannot be obeyed.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(
        self,
        config: EnvironmentConfig | None = None,
        *,
        gamma: float = 0.99,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.config = resolve_config(config, settings)
        self.render_mode = check_render_mode(render_mode)
        self._hosts = GrowingHosts(1, self.config, gamma=gamma)
        self.spec_observation = self._hosts.spec
        self.observation_space = observation_space(self.spec_observation)  # type: ignore[assignment]
        self.action_space = action_space(len(self.config.slots))
        self._lane_seed: int | None = None
        self._episode = -1
        self._is_over = True
        self._curve: list[float] = []

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
        self._is_over = False
        self._curve = [float(self._hosts.accuracy[0])]
        observed = self._observe()
        return observed, self._info(observed)

    def step(self, action: NDArray[np.int64]) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """One epoch of the host.

        Args:
            action: `[heads]` integers, the choice of each of `actions.HEADS`. One that `action_mask` forbids changes
                nothing, and `action_succeeded` is false.

        Returns:
            Observation (arrays of `spec_observation.shapes()`), reward, terminated (the horizon), truncated (rolled
            back), infos.

        Raises:
            ContractError: `reset` was not called, the episode is over, or the action is not in the action space.
        """
        if self._is_over:
            raise ContractError("reset the environment: no episode is under way")
        result = self._hosts.step(np.asarray(action)[None])
        self._is_over = bool(result.terminated[0] or result.rolled_back[0])
        self._curve.append(float(self._hosts.accuracy[0]))
        observed = self._observe()
        info = self._info(observed) | {
            "reward_parts": {name: float(part[0]) for name, part in result.reward_parts.items()},
            "action_succeeded": bool(result.succeeded[0]),
        }
        ends = bool(result.terminated[0]), bool(result.rolled_back[0])
        return observed, float(result.reward[0]), *ends, info

    def render(self) -> str | NDArray[np.uint8] | None:
        """The host, its slots, their alphas, and its accuracy over the episode, in the form of `render_mode`.

        Raises:
            ContractError: `reset` was not called.
        """
        if self.render_mode is None:
            return None
        if not self._curve:
            raise ContractError("reset the environment before it is drawn")
        return drawn(self._hosts.picture(0, np.array(self._curve)), self.render_mode)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, copied."""
        return {
            "hosts": self._hosts.state_dict(),
            "lane_seed": self._lane_seed,
            "episode": self._episode,
            "is_over": self._is_over,
            "curve": list(self._curve),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another environment of the same configuration was, bit for bit from then on.

        Raises:
            ContractError: It is not the state of such an environment.
        """
        self._hosts.load_state_dict(state["hosts"])
        self._lane_seed, self._episode = state["lane_seed"], state["episode"]
        self._is_over, self._curve = state["is_over"], list(state["curve"])

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
