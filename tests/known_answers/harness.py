"""Learning without processes: lanes, policy and learner in one loop, a function of the configuration and its seed.

The same loop as a run's, without its wire: the actor's weights are those after the newest update, every unroll is
admitted, and updates are made as long as there is enough fresh experience. No clock has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtri
from torch import Tensor

import esper_simic  # noqa: F401 - registers the known answers
from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.evaluation import PolicyActing, held_out_seeds
from esper_simic.events import ExperienceAdmitted
from esper_simic.learner import Learner
from esper_simic.policies.build import build_policy
from esper_simic.policies.policy import Decision, Policy
from esper_simic.safety import StepInputs
from esper_simic.specs import Choices, ExperienceSpec
from esper_simic.unroll import begin, unroll
from esper_simic.worlds.known_answers import CatchVectorEnv, GridWorldVectorEnv, TargetVectorEnv
from esper_simic.worlds.play import Acting, RandomActing, play
from esper_simic.worlds.world import Lanes, World, world_of

Array = npt.NDArray[Any]

NAMESPACE = "esper_simic"


class Rule(Protocol):
    """What to do where, for E lanes; it may remember."""

    def __call__(self, vector: Array, episode_start: Array) -> Array:
        """Actions `[E, …]` for observations `[E, features]`."""


# -- the best that can be done -----------------------------------------------------------------------------------------


def best_arm(vector: Array, episode_start: Array) -> Array:
    """The last arm pays best."""
    return np.full((len(vector), 1), 3)


def go_right(vector: Array, episode_start: Array) -> Array:
    """The far end pays best."""
    return np.ones((len(vector), 1), dtype=np.int64)


def walk_round_the_pit(vector: Array, episode_start: Array) -> Array:
    """The move that leads to the cell nearest to the goal."""
    moves: Array = SHORTEST[vector.argmax(axis=1)]
    return moves[:, None]


def _shortest() -> Array:
    """The best move of each cell: distances are those of a flood from the goal that never enters the pit."""
    grid = GridWorldVectorEnv
    neighbours = np.zeros((grid.SIDE**2, len(grid.MOVES)), dtype=np.int64)
    for cell in range(grid.SIDE**2):
        for move, (down, right) in enumerate(grid.MOVES):
            row = min(max(cell // grid.SIDE + down, 0), grid.SIDE - 1)
            column = min(max(cell % grid.SIDE + right, 0), grid.SIDE - 1)
            neighbours[cell, move] = row * grid.SIDE + column
    distance = np.full(grid.SIDE**2, np.inf)
    distance[grid.GOAL] = 0
    for _ in range(grid.SIDE**2):
        reached = distance[neighbours].min(axis=1) + 1
        reached[[grid.GOAL, grid.PIT]] = 0, np.inf
        distance = np.minimum(distance, reached)
    found: Array = distance[neighbours].argmin(axis=1)
    return found


SHORTEST = _shortest()


def follow_the_ball(vector: Array, episode_start: Array) -> Array:
    """Towards the column of the ball."""
    board = vector.reshape(-1, CatchVectorEnv.ROWS, CatchVectorEnv.COLUMNS)
    paddle = board[:, -1].argmax(axis=1)
    ball = board[:, :-1].sum(axis=1).argmax(axis=1)
    moves: Array = np.sign(ball - paddle) + 1
    return moves[:, None]


def straight_home(vector: Array, episode_start: Array) -> Array:
    """As far towards the origin as a move goes, in units of such a move."""
    return np.clip(-vector[:, :2] / TargetVectorEnv.REACH, -1, 1).astype(np.float32)


class RememberTheCue:
    """Shown once, asked for later."""

    def __init__(self) -> None:
        self._cue: Array | None = None

    def __call__(self, vector: Array, episode_start: Array) -> Array:
        shown = (vector[:, 1] > 0).astype(np.int64)
        self._cue = shown if self._cue is None else np.where(episode_start, shown, self._cue)
        return self._cue[:, None].copy()


OPTIMA: Mapping[str, Callable[[], Rule]] = {
    "Bandit-v0": lambda: best_arm,
    "Chain-v0": lambda: go_right,
    "GridWorld-v0": lambda: walk_round_the_pit,
    "Catch-v0": lambda: follow_the_ball,
    "Target-v0": lambda: straight_home,
    "Recall-v0": RememberTheCue,
}


class RuleActing:
    """A rule, as an evaluation has it."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """See `worlds.play.Acting`."""
        return self._rule(observation["vector"], episode_start)


class Behaviour:
    """Whoever is recorded: a rule, but with a share of its actions left to chance.

    Args:
        spec: Of the world.
        rule: What is done otherwise.
        chance_share: Share of choices drawn with equal chance; real numbers get normal noise of this deviation.
        state_size: Width of the recurrent state in its records, which is that of whoever learns from them; all zeros,
            which is right where every unroll begins with an episode.
    """

    def __init__(self, spec: ExperienceSpec, rule: Rule, chance_share: float, state_size: int = 0) -> None:
        self.spec, self._rule, self._share, self.state_size = spec, rule, chance_share, state_size

    def initial_state(self, batch: int) -> Tensor:
        """Nothing is remembered."""
        return torch.zeros(batch, self.state_size)

    def act(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, uniforms: Tensor
    ) -> Decision:
        """See `Policy`. Nobody knows values here: an episode that is cut is taken for one that ends."""
        chance = uniforms.numpy()
        done = self._rule(observations["vector"].numpy(), episode_start.numpy())
        if isinstance(self.spec.action, Choices):
            # One number says whether, and which.
            drawn = (chance / max(self._share, 1e-12) * np.array(self.spec.action.sizes)).astype(np.int64)
            done = np.where(chance < self._share, drawn, done)
        else:
            done = (done + self._share * ndtri(np.maximum(chance, 1e-300))).astype(np.float32)
        nothing = torch.zeros(len(episode_start))
        return Decision(torch.from_numpy(done), nothing, nothing, state)


Recorded = Callable[[ExperienceSpec, int], Behaviour]


# -- learning ----------------------------------------------------------------------------------------------------------


class Loop:
    """One learner and what brings it experience.

    Args:
        config: The configuration; its lanes are those of one actor.
        behaviour: Makes who acts, given the width of the recurrent state; None: the learner's own newest policy.
    """

    def __init__(self, config: Config, behaviour: Recorded | None = None) -> None:
        self._config, trainer = config, config.simic_trainer
        self.world: World = world_of(config.environment, trainer.gamma)
        self.learner = Learner(config, self.world.spec)
        self.policy = build_policy(self.world.spec, trainer, seeding.generator(trainer.seed, "policy"))
        self._actor = (
            self.policy
            if behaviour is None
            else cast(Policy, behaviour(self.world.spec, self.policy.state_size))
        )
        lanes = config.environment.environments_per_actor
        seeds = [seeding.derive(trainer.seed, "actor", 0, lane) for lane in range(lanes)]
        self._lanes: Lanes = self.world.lanes(seeds, [0] * lanes, stagger=config.environment.stagger)
        observation, _ = self._lanes.reset()
        self._carry = begin(self._actor, observation, seeds, np.zeros(lanes, dtype=np.int64))
        self._sequence = 0

    def until(self, environment_steps: int) -> Learner:
        """Act and learn until so many steps of environments were made."""
        while self.learner.environment_steps < environment_steps:
            self.take_in()
            while self.learner.can_step():
                report = self.learner.step(StepInputs(at_s=float(self.learner.steps_done)))
                if report.failure:
                    raise AssertionError(f"update {report.step}: {report.failure}")
        return self.learner

    def take_in(self) -> None:
        """One unroll more, admitted; nothing is learned of it yet."""
        if self._actor is self.policy:
            self.policy.load_state_dict(self.learner.engine.acting_weights())
        numbers = [int(number) for number in self._carry.episode_numbers]
        length = self._config.simic_trainer.unroll_length
        trajectory, finished = unroll(self._actor, self._lanes, self._carry, length)
        self._sequence += 1
        event = ExperienceAdmitted(
            actor=0,
            incarnation=0,
            sequence=self._sequence,
            policy_version=self.learner.steps_done,
            length=trajectory.length,
            lanes=trajectory.lanes,
            episode_numbers=numbers,
            episodes=finished,
        )
        self.learner.admit(self._sequence, event, trajectory)

    def close(self) -> None:
        """Close the lanes."""
        self._lanes.close()


class Answer(NamedTuple):
    """What a policy came to on held-out episodes, beside the best and the random policy on the same ones.

    Attributes:
        learned: Mean return of the learned policy, sampled as it acts.
        optimum: Of the best policy.
        random: Of the random one.
        behaviour: Of whoever was recorded; NaN where nobody was.
        updates: Updates made.
    """

    learned: float
    optimum: float
    random: float
    behaviour: float
    updates: int

    @property
    def reached(self) -> float:
        """Share of the way from random to optimal."""
        return (self.learned - self.random) / (self.optimum - self.random)


def configured(problem: str, seed: int, settings: Mapping[str, Any]) -> Config:
    """A configuration of a problem; `settings` are those of `simic_trainer`, and of other sections by dotted key."""
    sections: dict[str, dict[str, Any]] = {
        "simic_trainer": {"seed": seed},
        "experience_buffer": {},
        "environment": {"id": f"{NAMESPACE}/{problem}", "stagger": False},
        "supervisor": {"num_actors": 1},
    }
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections[section or "simic_trainer"][name] = value
    return parse("", base=sections)


def measured(world: World, config: Config, make: Callable[[int], Acting], episodes: int) -> float:
    """Mean return on held-out episodes."""
    seeds = held_out_seeds(config.simic_trainer.seed, episodes)
    played = play(world, seeds, make, lanes_max=episodes)
    return float(np.mean([episode.episode_return for episode in played]))


def learn(
    problem: str,
    seed: int,
    steps: int,
    settings: Mapping[str, Any],
    *,
    chance_share: float | None = None,
    episodes: int = 300,
) -> Answer:
    """Learn a problem and be measured.

    Args:
        problem: Name of a known answer.
        seed: Of everything.
        steps: Environment steps to learn from.
        settings: See `configured`.
        chance_share: Learn from recordings of the best policy, with this share of its actions left to chance; None:
            from what the learner's own policy does.
        episodes: Held-out episodes of the measurement.
    """
    torch.set_num_threads(1)
    config = configured(problem, seed, settings)
    share = chance_share

    def recorded(spec: ExperienceSpec, state_size: int) -> Behaviour:
        return Behaviour(spec, OPTIMA[problem](), share or 0.0, state_size)

    loop = Loop(config, None if share is None else recorded)
    learner = loop.until(steps)
    loop.close()
    loop.policy.load_state_dict(learner.engine.acting_weights())
    world = loop.world

    def mean(make: Callable[[int], Acting]) -> float:
        return measured(world, config, make, episodes)

    return Answer(
        learned=mean(lambda lanes: PolicyActing(loop.policy, lanes)),
        optimum=mean(lambda lanes: RuleActing(OPTIMA[problem]())),
        random=mean(lambda lanes: RandomActing(world.spec.action)),
        behaviour=math.nan if share is None else mean(lambda lanes: _Watched(recorded(world.spec, 0))),
        updates=learner.steps_done,
    )


class _Watched:
    """A behaviour, as an evaluation has it."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def act(self, observation: Mapping[str, Array], episode_start: Array, uniforms: Array) -> Array:
        """See `worlds.play.Acting`."""
        decision = self._behaviour.act(
            {"vector": torch.from_numpy(observation["vector"])},
            torch.from_numpy(episode_start),
            torch.zeros(len(episode_start), 0),
            torch.from_numpy(uniforms),
        )
        return decision.actions.numpy()
