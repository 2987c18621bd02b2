"""Whole episodes of any controller on held-out seeds: one function for the learned policy and every baseline.

Controllers are compared on the same seeds: held-out seed i is the stream `(run_seed, "evaluation", i)`, which no
training episode uses. What two of them differ by is taken seed by seed (`compare`). Chance of a bootstrap is the stream
`(first seed, "bootstrap")`: a function of the run, and the same for every controller.

A controller is also measured against what it built: `fixed-network` is, seed by seed, the network that a reference
controller grew there, whole from its first epoch and trained as long (`growing_host.fixed_networks`). Nobody acts in
it, so it has an accuracy and parameters and earns no return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from esper_simic import seeding
from esper_simic.actions import BLUEPRINTS, HEADS
from esper_simic.comparison import Estimate, Interval, Paired, bootstrap_interval, mean_interval, paired
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.graphs import FlatGrowthSpec
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.controllers import CONTROLLERS, Controller
from esper_simic.growing_host.fixed_networks import Contents, final_contents, train_fixed_networks
from esper_simic.growing_host.grafts import NO_SEED
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.policy import Policy
from esper_simic.worlds.growing import flat_observation

Array = npt.NDArray[Any]

LEARNED: Final = "learned"

FIXED: Final = "fixed-network"
"""The networks that the episodes of a reference grew, trained whole from the start."""


class Grown(msgspec.Struct, frozen=True):
    """A seed that is part of what a finished host computes: its blueprint, and the name of its `Composition`."""

    blueprint: str
    composition: str


class EpisodeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one held-out episode came to.

    Attributes:
        seed: Of the lane; the episode is number 0 of it.
        episode_return: Undiscounted sum of the rewards; None where nobody acted.
        accuracy: Validation accuracy at the end, percent.
        parameters_added: Parameters of blended and fossilised seeds at the end.
        fossils: Fossilised seeds at the end.
        grown: What each slot held at the end, in the order of the configuration; None where nothing was blended in.
    """

    seed: int
    episode_return: float | None
    accuracy: float
    parameters_added: int
    fossils: int
    grown: tuple[Grown | None, ...]


class PolicyOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """A controller's episodes and, always together, the intervals of return, accuracy and parameters added.

    Of each the mean with Student's interval, and the interquartile mean with its bootstrap interval; None of returns
    where nobody acted.
    """

    name: str
    episodes: list[EpisodeOutcome]
    episode_return: Interval | None
    accuracy: Interval
    parameters_added: Interval
    episode_return_middle: Estimate | None
    accuracy_middle: Estimate
    parameters_added_middle: Estimate


class PolicyComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One controller against another on the same seeds; a positive difference means that the first has more.

    `episode_return` is None where one of the two has none.
    """

    name: str
    against: str
    episode_return: Paired | None
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


class PolicyActing:
    """A policy, sampled: its best single choice may wait for ever where a sampled one goes on.

    Args:
        policy: What acts.
        lanes: In how many lanes.
    """

    def __init__(self, policy: Policy, lanes: int) -> None:
        self._policy = policy
        self._keys = tuple(policy.spec.shapes())
        self._state = policy.initial_state(lanes)

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """Actions `[E, …]`; see `worlds.play.Acting`."""
        decision = self._policy.act(
            {key: torch.from_numpy(np.ascontiguousarray(observation[key])) for key in self._keys},
            torch.from_numpy(episode_start),
            self._state,
            torch.from_numpy(uniforms),
        )
        self._state = decision.state
        return decision.actions.numpy()


class _Learned:
    """The learned policy in episodes that all begin at once."""

    def __init__(self, policy: Policy, lanes: int) -> None:
        self._acting = PolicyActing(policy, lanes)
        self._is_flat = isinstance(policy.spec, FlatGrowthSpec)
        self._start = np.ones(lanes, dtype=bool)

    def act(self, env: GrowingHostVectorEnv, observation: Mapping[str, Array], uniforms: Array) -> Array:
        seen = flat_observation(observation) if self._is_flat else observation
        actions = self._acting.act(seen, self._start, uniforms)
        self._start = np.zeros_like(self._start)
        return actions


def baseline_names() -> tuple[str, ...]:
    """Names of the scripted controllers, in the order in which they are shown."""
    return tuple(CONTROLLERS)


def held_out_seeds(run_seed: int, episodes: int) -> list[int]:
    """Seeds of the held-out episodes of a run."""
    return [seeding.derive(run_seed, "evaluation", index) for index in range(episodes)]


def evaluate(
    name: str,
    config: EnvironmentConfig,
    seeds: Sequence[int],
    *,
    gamma: float,
    policy: Policy | None = None,
    reference: Sequence[EpisodeOutcome] | None = None,
    observer: Callable[[], None] | None = None,
) -> PolicyOutcome:
    """Run one whole episode on each seed, in vectors of `config.environments_per_actor` lanes.

    Args:
        name: `learned` (then `policy` is needed), one of `baseline_names()`, or `fixed-network` (then `reference` is
            needed).
        config: Environment of the evaluation; first episodes are not cut short.
        seeds: Held-out seeds, one an episode; at least two.
        gamma: Discount of the reward's shaping.
        policy: The learned policy.
        reference: Episodes of another controller on the same seeds in the same environment: the networks they ended
            with are those that are trained from the start.
        observer: Told after every epoch of all lanes that there was progress.

    Raises:
        ValueError: No such controller, `learned` without a policy, or `fixed-network` without a reference on its seeds.
    """
    watch = observer or _unobserved
    if name == FIXED:
        return _outcome(name, _fixed_networks(config, seeds, reference, watch))
    episodes: list[EpisodeOutcome] = []
    width = config.environments_per_actor
    for start in range(0, len(seeds), width):
        chunk = list(seeds[start : start + width])
        episodes.extend(_episodes(name, config, chunk, gamma, policy, watch))
    return _outcome(name, episodes)


def _outcome(name: str, episodes: list[EpisodeOutcome]) -> PolicyOutcome:
    seed = episodes[0].seed if episodes else 0
    returns, accuracies, parameters = _figures(episodes)
    return PolicyOutcome(
        name=name,
        episodes=episodes,
        episode_return=None if returns is None else mean_interval(returns),
        accuracy=mean_interval(accuracies),
        parameters_added=mean_interval(parameters),
        episode_return_middle=None if returns is None else bootstrap_interval([returns], rng=chance_of(seed)),
        accuracy_middle=bootstrap_interval([accuracies], rng=chance_of(seed)),
        parameters_added_middle=bootstrap_interval([parameters], rng=chance_of(seed)),
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
    (returns, accuracies, parameters), (others, *rest) = _figures(ours.episodes), _figures(theirs.episodes)

    def differing(one: list[float], other: list[float]) -> Paired:
        return paired(one, other, rng=chance_of(seeds[0]))

    return PolicyComparison(
        name=ours.name,
        against=theirs.name,
        episode_return=None if returns is None or others is None else differing(returns, others),
        accuracy=differing(accuracies, rest[0]),
        parameters_added=differing(parameters, rest[1]),
    )


def _figures(episodes: Sequence[EpisodeOutcome]) -> tuple[list[float] | None, list[float], list[float]]:
    """Returns (None if one episode has none), accuracies, parameters added: one entry an episode."""
    returns = [episode.episode_return for episode in episodes if episode.episode_return is not None]
    return (
        returns if len(returns) == len(episodes) else None,
        [episode.accuracy for episode in episodes],
        [float(episode.parameters_added) for episode in episodes],
    )


def chance_of(seed: int) -> np.random.Generator:
    """The bootstrap's chance, by the first held-out seed."""
    return seeding.generator(seed, "bootstrap")


def _unobserved() -> None:
    pass


def _episodes(
    name: str,
    config: EnvironmentConfig,
    seeds: Sequence[int],
    gamma: float,
    policy: Policy | None,
    observer: Callable[[], None],
) -> list[EpisodeOutcome]:
    """The first episode of each lane; one that the governor ended leaves its lane to play on, unheeded."""
    env = GrowingHostVectorEnv(len(seeds), config, gamma=gamma, lane_seeds=seeds)
    observation, _ = env.reset(options={"stagger": False})
    acting = _acting(name, len(seeds), policy)
    streams = [seeding.generator(seed, "controller") for seed in seeds]
    outcomes: dict[int, EpisodeOutcome] = {}
    for _ in range(config.max_epochs):
        uniforms = np.stack([stream.random(len(HEADS)) for stream in streams])
        observation, _, _, _, infos = env.step(acting.act(env, observation, uniforms))
        for lane in np.flatnonzero(infos.get("_episode", ())).tolist():
            outcomes.setdefault(lane, _ended(seeds[lane], infos["episode"], lane))
        observer()
    if len(outcomes) < len(seeds):
        raise InvariantViolation(
            f"episodes of {name!r} did not end at their horizon of {config.max_epochs} epochs"
        )
    return [outcomes[lane] for lane in range(len(seeds))]


def _ended(seed: int, episode: Mapping[str, Array], lane: int) -> EpisodeOutcome:
    contents = final_contents(*(episode[key][lane] for key in ("stage", "blueprint", "composition")))
    return EpisodeOutcome(
        seed=seed,
        episode_return=float(episode["r"][lane]),
        accuracy=float(episode["accuracy"][lane]),
        parameters_added=int(episode["parameters_added"][lane]),
        fossils=int(episode["fossils"][lane]),
        grown=tuple(
            None if kind == NO_SEED else Grown(BLUEPRINTS[kind], Composition(composition).name)
            for kind, composition in zip(
                contents.blueprint.tolist(), contents.composition.tolist(), strict=True
            )
        ),
    )


def _fixed_networks(
    config: EnvironmentConfig,
    seeds: Sequence[int],
    reference: Sequence[EpisodeOutcome] | None,
    observer: Callable[[], None],
) -> list[EpisodeOutcome]:
    """What the reference's networks would have become, had they been whole from their first epoch."""
    if reference is None or [episode.seed for episode in reference] != list(seeds):
        raise ValueError(
            f"evaluating {FIXED!r} needs the reference episodes of a controller on the same seeds"
        )
    slots = [episode.grown for episode in reference]
    kinds = [[NO_SEED if slot is None else BLUEPRINTS.index(slot.blueprint) for slot in row] for row in slots]
    joins = [[0 if slot is None else Composition[slot.composition].value for slot in row] for row in slots]
    contents = Contents(np.array(kinds, dtype=np.int64), np.array(joins, dtype=np.int64))
    trained = train_fixed_networks(contents, config, seeds, [0] * len(seeds), observer=observer)
    return [
        EpisodeOutcome(
            seed=episode.seed,
            episode_return=None,
            accuracy=float(trained.accuracy[lane]),
            parameters_added=int(trained.parameters_added[lane]),
            fossils=sum(slot is not None for slot in episode.grown),
            grown=episode.grown,
        )
        for lane, episode in enumerate(reference)
    ]


def _acting(name: str, lanes: int, policy: Policy | None) -> _Acting:
    if name == LEARNED:
        if policy is None:
            raise ValueError("evaluating 'learned' needs a policy")
        return _Learned(policy, lanes)
    if name not in CONTROLLERS:
        raise ValueError(f"unknown controller {name!r}; known: {', '.join((LEARNED, *CONTROLLERS, FIXED))}")
    return _Scripted(CONTROLLERS[name](lanes))
