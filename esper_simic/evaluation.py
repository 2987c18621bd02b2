"""Whole episodes of any controller on held-out seeds: one function for the learned policy and every baseline.

Controllers are compared on the same seeds: held-out seed i is the stream `(run_seed, "evaluation", i)`, which no
training episode uses. What two of them differ by is taken seed by seed (`compare`). Chance of a bootstrap is the stream
`(first seed, "bootstrap")`: a function of the run, and the same for every controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.comparison import Estimate, Interval, Paired, bootstrap_interval, mean_interval, paired
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.controllers import (
    Controller,
    Farm,
    FixedSchedule,
    HeuristicController,
    NeverGrow,
    PatientController,
    RandomController,
)
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.graph_policy import GraphPolicy, observations_from_numpy

Array = npt.NDArray[Any]

LEARNED: Final = "learned"


class EpisodeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one held-out episode came to; accuracy in percent."""

    seed: int
    episode_return: float
    accuracy: float
    parameters_added: int
    fossils: int


class PolicyOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """A controller's episodes and, always together, the intervals of return, accuracy and parameters added.

    Of each the mean with Student's interval, and the interquartile mean with its bootstrap interval.
    """

    name: str
    episodes: list[EpisodeOutcome]
    episode_return: Interval
    accuracy: Interval
    parameters_added: Interval
    episode_return_middle: Estimate
    accuracy_middle: Estimate
    parameters_added_middle: Estimate


class PolicyComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One controller against another on the same seeds; a positive difference means that the first has more."""

    name: str
    against: str
    episode_return: Paired
    accuracy: Paired
    parameters_added: Paired


class _Acting(Protocol):
    def act(self, env: GrowingHostVectorEnv, observation: Mapping[str, Array], uniforms: Array) -> Array: ...


class _Scripted:
    """A scripted controller: it reads the environment's view."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def act(self, env: GrowingHostVectorEnv, observation: Mapping[str, Array], uniforms: Array) -> Array:
        return self._controller.act(env.view(), uniforms)


class _Learned:
    """The learned policy, sampled: its best single choice may wait for ever where a sampled one goes on."""

    def __init__(self, policy: GraphPolicy, lanes: int) -> None:
        self._policy = policy
        self._state = policy.initial_state(lanes)
        self._start = torch.ones(lanes, dtype=torch.bool)

    def act(self, env: GrowingHostVectorEnv, observation: Mapping[str, Array], uniforms: Array) -> Array:
        decision = self._policy.act(
            observations_from_numpy(observation), self._start, self._state, torch.from_numpy(uniforms)
        )
        self._state, self._start = decision.state, torch.zeros_like(self._start)
        return decision.actions.numpy()


def baseline_names() -> tuple[str, ...]:
    """Names of the scripted controllers, in the order in which they are shown."""
    return tuple(_BASELINES)


_BASELINES: Final[dict[str, Callable[[int], Controller]]] = {
    "heuristic": HeuristicController,
    "patient": lambda lanes: PatientController(),
    "fixed-schedule": lambda lanes: FixedSchedule(),
    "farm": lambda lanes: Farm(),
    "random": lambda lanes: RandomController(),
    "never-grow": lambda lanes: NeverGrow(),
}


def held_out_seeds(run_seed: int, episodes: int) -> list[int]:
    """Seeds of the held-out episodes of a run."""
    return [seeding.derive(run_seed, "evaluation", index) for index in range(episodes)]


def evaluate(
    name: str,
    config: EnvironmentConfig,
    seeds: Sequence[int],
    *,
    gamma: float,
    policy: GraphPolicy | None = None,
    observer: Callable[[], None] | None = None,
) -> PolicyOutcome:
    """Run one whole episode on each seed, in vectors of `config.environments_per_actor` lanes.

    Args:
        name: `learned` (then `policy` is needed) or one of `baseline_names()`.
        config: Environment of the evaluation; first episodes are not cut short.
        seeds: Held-out seeds, one an episode; at least two.
        gamma: Discount of the reward's shaping.
        policy: The learned policy.
        observer: Told after every epoch of all lanes that there was progress.

    Raises:
        ValueError: No such controller, or `learned` without a policy.
    """
    episodes: list[EpisodeOutcome] = []
    width = config.environments_per_actor
    for start in range(0, len(seeds), width):
        chunk = list(seeds[start : start + width])
        episodes.extend(_episodes(name, config, chunk, gamma, policy, observer or _unobserved))
    returns, accuracies, parameters = _figures(episodes)
    return PolicyOutcome(
        name=name,
        episodes=episodes,
        episode_return=mean_interval(returns),
        accuracy=mean_interval(accuracies),
        parameters_added=mean_interval(parameters),
        episode_return_middle=bootstrap_interval([returns], rng=_chance(seeds[0])),
        accuracy_middle=bootstrap_interval([accuracies], rng=_chance(seeds[0])),
        parameters_added_middle=bootstrap_interval([parameters], rng=_chance(seeds[0])),
    )


def compare(ours: PolicyOutcome, theirs: PolicyOutcome) -> PolicyComparison:
    """What two controllers differ by, seed by seed.

    Raises:
        ValueError: They were not measured on the same seeds in the same order.
    """
    seeds = [episode.seed for episode in ours.episodes]
    if seeds != [episode.seed for episode in theirs.episodes]:
        raise ValueError(
            f"{ours.name!r} and {theirs.name!r} were measured on different seeds: evaluate both on one list"
        )
    episode_return, accuracy, parameters_added = (
        paired(one, other, rng=_chance(seeds[0]))
        for one, other in zip(_figures(ours.episodes), _figures(theirs.episodes), strict=True)
    )
    return PolicyComparison(
        name=ours.name,
        against=theirs.name,
        episode_return=episode_return,
        accuracy=accuracy,
        parameters_added=parameters_added,
    )


def _figures(episodes: Sequence[EpisodeOutcome]) -> tuple[list[float], list[float], list[float]]:
    """Returns, accuracies, parameters added: one entry an episode."""
    return (
        [episode.episode_return for episode in episodes],
        [episode.accuracy for episode in episodes],
        [float(episode.parameters_added) for episode in episodes],
    )


def _chance(seed: int) -> np.random.Generator:
    return seeding.generator(seed, "bootstrap")


def _unobserved() -> None:
    pass


def _episodes(
    name: str,
    config: EnvironmentConfig,
    seeds: Sequence[int],
    gamma: float,
    policy: GraphPolicy | None,
    observer: Callable[[], None],
) -> list[EpisodeOutcome]:
    env = GrowingHostVectorEnv(len(seeds), config, gamma=gamma, lane_seeds=seeds)
    observation, _ = env.reset(options={"stagger": False})
    acting = _acting(name, len(seeds), policy)
    streams = [seeding.generator(seed, "controller") for seed in seeds]
    episode: Mapping[str, Array] = {}
    for _ in range(config.max_epochs):
        uniforms = np.stack([stream.random(len(HEADS)) for stream in streams])
        observation, _, _, _, infos = env.step(acting.act(env, observation, uniforms))
        episode = infos.get("episode", {})
        observer()
    if not episode:
        raise InvariantViolation(
            f"episodes of {name!r} did not end at their horizon of {config.max_epochs} epochs"
        )
    return [
        EpisodeOutcome(
            seed=seed,
            episode_return=float(episode["r"][lane]),
            accuracy=float(episode["accuracy"][lane]),
            parameters_added=int(episode["parameters_added"][lane]),
            fossils=int(episode["fossils"][lane]),
        )
        for lane, seed in enumerate(seeds)
    ]


def _acting(name: str, lanes: int, policy: GraphPolicy | None) -> _Acting:
    if name == LEARNED:
        if policy is None:
            raise ValueError("evaluating 'learned' needs a policy")
        return _Learned(policy, lanes)
    if name not in _BASELINES:
        raise ValueError(f"unknown controller {name!r}; known: {', '.join((LEARNED, *_BASELINES))}")
    return _Scripted(_BASELINES[name](lanes))
