"""The vectorised Gymnasium environment: E growing hosts, one computation.

Autoreset mode is SAME_STEP: when a lane's episode ends, the step that ends it already returns the next episode's first
observation, and the finished one's last observation is in `infos["final_obs"]`. A host that breaks down is rolled back
by the governor, which ends its episode as `truncated`.

| info | shape | meaning |
|---|---|---|
| `action_mask` | per lane, per head | masks in the form `action_space.sample(mask)` takes |
| `reward_parts` | name to `[E]` | named parts of the reward; they sum to it |
| `action_succeeded` | `[E]` | false where the action was refused and nothing happened |
| `accuracy` | `[E]` | validation accuracy after the step, percent (of the episode that this step belongs to) |
| `parameters_added` | `[E]` | parameters of blended and fossilised seeds |
| `episode_number` | `[E]` | number of the episode this step belongs to |
| `final_obs`, `_final_obs` | mapping of `[E, ...]`, `[E]` | last observation of episodes that ended; valid rows |
| `episode`, `_episode` | `r l accuracy parameters_added fossils`, `[E]` | their sums and results; valid rows |
| | `rolled_back`, `[E]` | whether the governor ended them |
| | `stage blueprint composition`, `[E, S]` | what was in their slots at the end |

`final_obs` and `episode` are there only in steps in which an episode ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host import masks
from esper_simic.growing_host.core import GrowingHosts, StepResult
from esper_simic.growing_host.picture import check_render_mode, drawn
from esper_simic.growing_host.spaces import action_space, observation_space, resolve_config
from esper_simic.growing_host.view import HostView

Arrays = dict[str, NDArray[np.generic]]


class GrowingHostVectorEnv(VectorEnv[Arrays, NDArray[np.int64], NDArray[np.generic]]):
    """E growing hosts that are trained, grown and measured together.

    Args:
        num_envs: Number of lanes, E.
        config: Task, host and rules; or give its fields as keywords.
        gamma: The learner's discount, for the reward's shaping.
        lane_seeds: Seeds of the lanes while `reset` is given none; drawn from Gymnasium's entropy by default.
        first_episodes: Episode number each lane starts with after a seeded `reset`; 0 by default.
        render_mode: `ansi`: lines of text; `rgb_array`: images; one of each lane. None: nothing is drawn.
        **settings: Fields of `EnvironmentConfig`, instead of `config`.

    Raises:
        ConfigError: The configuration cannot be obeyed.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as Gymnasium declares it
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        config: EnvironmentConfig | None = None,
        *,
        gamma: float = 0.99,
        lane_seeds: Sequence[int] | None = None,
        first_episodes: Sequence[int] | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.config = resolve_config(config, settings)
        self.num_envs = num_envs
        self.render_mode = check_render_mode(render_mode)
        self._hosts = GrowingHosts(num_envs, self.config, gamma=gamma)
        self.spec_observation = self._hosts.spec
        slots = len(self.config.slots)
        self.single_observation_space = observation_space(self.spec_observation)
        self.single_action_space = action_space(slots)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = action_space(slots, num_envs)
        self._lane_seeds = self._per_lane(lane_seeds, "lane_seeds")
        self._first_episodes = self._per_lane(first_episodes, "first_episodes") or [0] * num_envs
        self._next_episodes = list(self._first_episodes)
        self._episodes = np.zeros(num_envs, dtype=np.int64)
        self._cuts = np.full(num_envs, self.config.max_epochs)
        self._returns = np.zeros(num_envs)
        self._curves: list[list[float]] = [[] for _ in range(num_envs)]
        self._ready = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Begin a fresh episode in every lane.

        Args:
            seed: Lane i gets `seed + i`, or the i-th of a list, and starts with its first episode. Without one lanes
                keep their seeds and go on with the next episode.
            options: `{"stagger": False}` does not cut first episodes short, whatever the configuration says.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is not None:
            given = [seed + lane for lane in range(self.num_envs)] if isinstance(seed, int) else seed
            self._lane_seeds = self._per_lane(given, "seed")
            self._next_episodes = list(self._first_episodes)
        elif self._lane_seeds is None:
            self._lane_seeds = self.np_random.integers(2**63, size=self.num_envs).tolist()
        self._cuts[:] = self.config.max_epochs
        if (options or {}).get("stagger", self.config.stagger):
            self._cuts[:] = staggered_cuts(self.num_envs, self.config.max_epochs)
        self._begin(np.arange(self.num_envs))
        self._ready = True
        observed = self._hosts.observe()
        return observed, self._infos(observed)

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Arrays, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One host epoch in every lane; see the module for the infos.

        Raises:
            ContractError: `reset` was not called, or the actions are not in the action space.
        """
        if not self._ready:
            raise ContractError("reset the environment before its first step")
        result = self._hosts.step(actions)
        self._returns += result.reward
        truncated = ((self._hosts.epoch >= self._cuts) & ~result.terminated) | result.rolled_back
        for curve, accuracy in zip(self._curves, self._hosts.accuracy.tolist(), strict=True):
            curve.append(accuracy)
        ended = result.terminated | truncated
        observed = self._hosts.observe()
        infos = self._infos(observed) | {
            "reward_parts": result.reward_parts,
            "action_succeeded": result.succeeded,
        }
        if ended.any():
            infos |= self._finish(ended, result.rolled_back, observed)
            lanes = np.flatnonzero(ended)
            self._cuts[lanes] = self.config.max_epochs
            self._begin(lanes)
            observed = self._hosts.observe()
            infos["action_mask"] = self._head_masks(observed)
        return observed, result.reward, result.terminated, truncated, infos

    def view(self) -> HostView:
        """A frozen picture of all lanes, for scripted controllers."""
        return self._hosts.view()

    def render(self) -> tuple[str | NDArray[np.uint8], ...] | None:
        """Each host, its slots, their alphas, and its accuracy over the episode, in the form of `render_mode`.

        Raises:
            ContractError: `reset` was not called.
        """
        if self.render_mode is None:
            return None
        if not self._ready:
            raise ContractError("reset the environment before it is drawn")
        return tuple(
            drawn(self._hosts.picture(lane, np.array(curve)), self.render_mode)
            for lane, curve in enumerate(self._curves)
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on, copied."""
        return {
            "hosts": self._hosts.state_dict(),
            "lane_seeds": self._lane_seeds,
            "next_episodes": list(self._next_episodes),
            "curves": [list(curve) for curve in self._curves],
            "ready": self._ready,
            **{name: getattr(self, name).copy() for name in self._ARRAYS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another environment of the same lanes and configuration was, bit for bit from then on.

        Raises:
            ContractError: It is not the state of such an environment.
        """
        self._hosts.load_state_dict(state["hosts"])
        self._lane_seeds = self._per_lane(state["lane_seeds"], "lane_seeds")
        self._next_episodes = list(state["next_episodes"])
        self._curves = [list(curve) for curve in state["curves"]]
        self._ready = bool(state["ready"])
        for name in self._ARRAYS:
            np.copyto(getattr(self, name), state[name])

    _ARRAYS = ("_episodes", "_cuts", "_returns")

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing is held open."""

    def _begin(self, lanes: NDArray[np.int64]) -> None:
        """Start the next episode of some lanes."""
        seeds = self._lane_seeds or []
        chosen = lanes.tolist()
        episodes = [self._next_episodes[lane] for lane in chosen]
        self._hosts.start(lanes, [seeds[lane] for lane in chosen], episodes)
        self._episodes[lanes] = episodes
        self._returns[lanes] = 0
        accuracy = self._hosts.accuracy
        for lane in chosen:
            self._next_episodes[lane] += 1
            self._curves[lane] = [float(accuracy[lane])]

    def _finish(
        self, ended: NDArray[np.bool_], rolled_back: NDArray[np.bool_], observed: Arrays
    ) -> dict[str, Any]:
        """What is told about episodes that end in this step."""
        return {
            "final_obs": observed,
            "_final_obs": ended,
            "episode": {
                "r": self._returns.copy(),
                "l": self._hosts.epoch.copy(),
                "rolled_back": rolled_back.copy(),
                "accuracy": self._hosts.accuracy,
                "parameters_added": self._hosts.parameters_added,
                "fossils": self._hosts.fossils,
                "stage": self._hosts.slots.stage.copy(),
                "blueprint": self._hosts.slots.blueprint.copy(),
                "composition": self._hosts.slots.composition.copy(),
            },
            "_episode": ended.copy(),
        }

    def _infos(self, observed: Arrays) -> dict[str, Any]:
        return {
            "action_mask": self._head_masks(observed),
            "accuracy": self._hosts.accuracy,
            "parameters_added": self._hosts.parameters_added,
            "episode_number": self._episodes.copy(),
        }

    def _head_masks(self, observed: Arrays) -> tuple[tuple[NDArray[np.int8], ...], ...]:
        return masks.per_head(observed["action_mask"].astype(np.int8, copy=False), len(self.config.slots))

    def _per_lane(self, values: Sequence[int | None] | None, name: str) -> list[int] | None:
        if values is None:
            return None
        whole = [int(value) for value in values if value is not None and 0 <= value < 2**63]
        if len(whole) != self.num_envs:
            raise ContractError(
                f"{name} must hold {self.num_envs} integers in [0, 2**63), one a lane; got {list(values)}"
            )
        return whole


def staggered_cuts(lanes: int, max_epochs: int) -> NDArray[np.int64]:
    """Epoch at which each lane's first episode is cut: `max(1, round(max_epochs (i + 1) / lanes))`.

    Without it all lanes are in the same phase of an episode for ever, and every batch shows one phase only.
    """
    cuts = np.rint(max_epochs * np.arange(1, lanes + 1) / lanes).astype(np.int64)
    return np.maximum(cuts, 1)


__all__ = ["GrowingHostVectorEnv", "StepResult", "staggered_cuts"]
