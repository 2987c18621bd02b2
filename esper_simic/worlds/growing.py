"""The world of growing hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from esper_simic.config import EnvironmentConfig
from esper_simic.config_behaviour import RANDOM
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.growing_host.controllers import CONTROLLERS, random_log_probs
from esper_simic.growing_host.flat import flat_size, flatten
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.worlds.outcome import Outcome
from esper_simic.worlds.scripts import Chosen

Array = npt.NDArray[Any]

MEASURES: Final = ("accuracy", "parameters_added", "fossils")
"""What is measured of a host at the end of its episode: percent, numbers, seeds."""


class GrowingLanes:
    """Growing hosts as lanes; see `worlds.world.Lanes`.

    Args:
        hosts: The vector environment.
        spec: Of what is observed of them: their graphs, or flat vectors.
        success_accuracy: Accuracy (percent) at the end from which an episode is a success.

    Attributes:
        hosts: The vector environment itself, for scripted controllers, which read its `view`.
    """

    def __init__(
        self, hosts: GrowingHostVectorEnv, spec: ObservationSpec | FlatGrowthSpec, success_accuracy: float
    ) -> None:
        self.hosts = hosts
        self._is_flat = isinstance(spec, FlatGrowthSpec)
        self._success_accuracy = success_accuracy

    @property
    def num_envs(self) -> int:
        """Number of lanes."""
        return self.hosts.num_envs

    def reset(self) -> tuple[Mapping[str, Array], Mapping[str, Any]]:
        """Begin the next episode in every lane."""
        observed, infos = self.hosts.reset()
        return self._seen(observed), infos

    def step(
        self, actions: Array
    ) -> tuple[
        Mapping[str, Array],
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        Mapping[str, Any],
    ]:
        """One epoch of every host."""
        observed, reward, terminated, truncated, infos = self.hosts.step(actions)
        if "episode" in infos:
            episode = infos["episode"]
            infos |= {
                "final_obs": self._seen(infos["final_obs"]),
                "episode": episode
                | {"success": episode["accuracy"] >= self._success_accuracy, "cut": truncated},
            }
        return self._seen(observed), reward, terminated, truncated, infos

    def close(self) -> None:
        """Free what the hosts hold."""
        self.hosts.close()

    def _seen(self, observed: Mapping[str, Array]) -> Mapping[str, Array]:
        return flat_observation(observed) if self._is_flat else observed


class GrowthScript:
    """A scripted controller of growing hosts; see `worlds.scripts.Script`.

    Args:
        name: One of `growing_host.controllers.CONTROLLERS`.
        lanes: Whose hosts it looks at: it sees more of them than a policy does.
    """

    def __init__(self, name: str, lanes: GrowingLanes) -> None:
        self._controller = CONTROLLERS[name](lanes.num_envs)
        self._draws = name == RANDOM
        self._hosts = lanes.hosts

    def choose(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Chosen:
        """See `Script`."""
        self._controller.reset(episode_start)
        view = self._hosts.view()
        actions = self._controller.act(view, uniforms)
        log_probs = random_log_probs(view, actions) if self._draws else np.zeros(len(actions))
        return Chosen(actions, log_probs)


class GrowingWorld:
    """Hosts that a controller grows.

    Args:
        config: Task, host and rules.
        gamma: The learner's discount, for the reward's shaping.
    """

    def __init__(self, config: EnvironmentConfig, gamma: float) -> None:
        self._config, self._gamma = config, gamma
        self.spec = _spec_of(config)

    def lanes(
        self, lane_seeds: Sequence[int], first_episodes: Sequence[int], *, stagger: bool
    ) -> GrowingLanes:
        """Fresh lanes; each depends on its seed, its episodes' numbers and its own actions alone."""
        hosts = GrowingHostVectorEnv(
            len(lane_seeds),
            self._config.model_copy(update={"stagger": stagger}),
            gamma=self._gamma,
            lane_seeds=lane_seeds,
            first_episodes=first_episodes,
        )
        return GrowingLanes(hosts, self.spec, self._config.success_accuracy)

    def script(self, name: str, lanes: Any) -> GrowthScript:
        """See `World.script`."""
        return GrowthScript(name, lanes)

    def digest(self) -> str:
        """The digest of the task's data. It costs the loading of the task, which has to be done anyway.

        Raises:
            ConfigError: The task's data is not here or is broken, or its host does not take it; a slot or blueprint
                does not fit, or more validation samples are asked for than there are.
        """
        task = load_task(self._config.task)
        GrowingHostVectorEnv(1, self._config, gamma=self._gamma).close()
        return task.digest

    def outcome(self, episode: Mapping[str, Array], lane: int) -> Outcome:
        """See `World.outcome`."""
        return Outcome(
            episode_return=float(episode["r"][lane]),
            length=int(episode["l"][lane]),
            success=bool(episode["success"][lane]),
            measures={name: float(episode[name][lane]) for name in MEASURES},
        )


def flat_observation(observed: Mapping[str, Array]) -> dict[str, Array]:
    """A growing host's observation in the form of `FlatGrowthSpec`.

    Args:
        observed: In that of `ObservationSpec`, with any leading dimensions.
    """
    flat = flatten(observed)
    return {"vector": flat.pop("features"), **flat}


def _spec_of(config: EnvironmentConfig) -> ObservationSpec | FlatGrowthSpec:
    if config.observation == "graph":
        return observation_spec_of(config)
    slots = len(config.slots)
    return FlatGrowthSpec(flat_size(slots), slots)
