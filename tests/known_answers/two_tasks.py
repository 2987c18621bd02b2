"""Two tasks of one shape, one after the other: what a training that holds nothing forgets.

A sign is shown, and one of four arms pays 1; which one depends on the sign. There are eight signs: the first half is
one task, the second half another. They do not contradict each other, so a policy can know both; but signs share
features, so what is learned of one half moves what is done at the other. In each half a sign's opposite is there too:
every feature has mean 0 and variance 1 in both, so that observations are normalised alike, and what is forgotten is
forgotten by the weights alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box, Discrete

from esper_simic import seeding
from esper_simic.config import Config, parse
from esper_simic.evaluation import PolicyActing
from esper_simic.events import CurriculumJudged, ExperienceAdmitted
from esper_simic.learner import Learner
from esper_simic.policies.build import build_policy
from esper_simic.safety import StepInputs
from esper_simic.unroll import UnrollCarry, begin, unroll
from esper_simic.worlds.known_answer import Bools, KnownAnswerEnv, KnownAnswerVectorEnv, Lanes
from esper_simic.worlds.lanes import GymnasiumLanes
from esper_simic.worlds.world import World, world_of
from tests.known_answers.harness import measured

Array = npt.NDArray[Any]

SIGNS: Final = 8
FEATURES: Final = 6
ARMS: Final = 4
RANDOM: Final = 1 / ARMS
ENTROPY: Final = 0.05


def _pictures() -> Array:
    some = np.random.default_rng(5).choice([-1.0, 1.0], (SIGNS // 2, FEATURES)).astype(np.float32)
    both: Array = np.stack([some, -some], axis=1).reshape(SIGNS, FEATURES)
    return both


class SignsVectorEnv(KnownAnswerVectorEnv):
    """One sign, one arm. The best policy gets 1, the random one 1/4.

    Args:
        part: Which half of the signs is shown, 0 or 1.
        **settings: See `KnownAnswerVectorEnv`.
    """

    OPTIMAL_RETURN = 1.0
    RANDOM_RETURN = RANDOM
    DRAWS = 1
    single_space = Box(-1.0, 1.0, (FEATURES,), dtype=np.float32)
    single_actions = Discrete(ARMS)
    PICTURES: Final = _pictures()
    PAYS: Final = np.array([0, 1, 2, 3, 1, 2, 3, 0])

    def __init__(self, num_envs: int = 1, *, part: int = 0, **settings: Any) -> None:
        self._first = part * SIGNS // 2
        super().__init__(num_envs, **settings)

    def begin(self, lanes: Lanes, chance: Array) -> None:
        """Show a sign of the half."""
        if len(lanes) == self.num_envs:
            self._sign = np.zeros(self.num_envs, dtype=np.int64)
        self._sign[lanes] = self._first + (chance[:, 0] * SIGNS / 2).astype(np.int64)

    def observe(self) -> Array:
        """The sign's features."""
        return self.PICTURES[self._sign]

    def move(self, actions: Array) -> tuple[Array, Bools]:
        """Pull."""
        return (actions == self.PAYS[self._sign]).astype(np.float64), np.ones(self.num_envs, dtype=bool)


class SignsEnv(KnownAnswerEnv):
    """One `SignsVectorEnv`."""

    problem: ClassVar = SignsVectorEnv


SIGNS_ID: Final = f"{__name__}:two_tasks/Signs-v0"

gymnasium.register(
    id="two_tasks/Signs-v0",
    entry_point=f"{__name__}:SignsEnv",
    vector_entry_point=f"{__name__}:SignsVectorEnv",
)


def configured(seed: int = 0, *, behaviour: str = "policy", **settings: Any) -> Config:
    """The first half until nine of ten choices are right, then the second; settings are those of `simic_trainer`."""
    stage = {"min_success_rate": 0.9, "min_episodes": 300, "max_episodes": 100_000, "success": "return >= 1"}
    trainer = {
        "seed": seed,
        "batch_size": 16,
        "unroll_length": 4,
        "hidden_size": 16,
        "learning_rate": 0.005,
        "entropy_coefficient": ENTROPY,
        "entropy_coefficient_final": ENTROPY,
        "network": "mlp",
        "curriculum_stages": [
            stage | {"name": "first half", "difficulty": 0.5, "environment": {"kwargs": {"part": 0}}},
            stage | {"name": "second half", "difficulty": 1.0, "environment": {"kwargs": {"part": 1}}},
        ],
    }
    return parse(
        "",
        base={
            "simic_trainer": trainer | settings,
            "experience_buffer": {"capacity": 256, "min_experiences": 16, "replay_ratio": 0.0},
            "environment": {
                "id": SIGNS_ID,
                "environments_per_actor": 16,
                "stagger": False,
                "behaviour": behaviour,
            },
            "supervisor": {"num_actors": 1},
        },
    )


class Staged:
    """A learner and one actor in one loop, who goes where the curriculum is; no clock has a part in it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.worlds = tuple(world_of(one, config.simic_trainer.gamma) for one in config.stage_environments())
        self.learner = Learner(config, self.worlds[0].spec)
        trainer = config.simic_trainer
        self.policy = build_policy(self.worlds[0].spec, trainer, seeding.generator(trainer.seed, "policy"))
        self.judged: list[CurriculumJudged] = []
        self.metrics: dict[str, float] = {}
        """Of the newest update."""
        self.chance = np.random.default_rng(trainer.seed)
        self._sequence = 0
        self._stage, self._lanes, self._carry = self._enter(0, np.zeros(self._count, dtype=np.int64))

    @property
    def _count(self) -> int:
        return self.config.environment.environments_per_actor

    def _enter(self, stage: int, first: Array) -> tuple[int, GymnasiumLanes, UnrollCarry]:
        seeds = [
            seeding.derive(self.config.simic_trainer.seed, "actor", 0, lane) for lane in range(self._count)
        ]
        lanes = self.worlds[stage].lanes(seeds, first.tolist(), stagger=False)
        assert isinstance(lanes, GymnasiumLanes)
        observation, _ = lanes.reset()
        return stage, lanes, begin(self.policy, observation, seeds, first)

    def turn(self) -> None:
        """One unroll, a look at the curriculum, and every update that can be made."""
        self.policy.load_state_dict(self.learner.engine.acting_weights())
        if self._stage != self.learner.stage:
            self._lanes.close()
            following = self._carry.episode_numbers + 1
            self._stage, self._lanes, self._carry = self._enter(self.learner.stage, following)
        numbers = self._carry.episode_numbers.tolist()
        trainer = self.config.simic_trainer
        trajectory, finished = unroll(self.policy, self._lanes, self._carry, trainer.unroll_length)
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
            stage=self._stage,
        )
        self.learner.admit(self._sequence, event, trajectory)
        verdict = self.learner.verdict(float(self.learner.steps_done))
        if verdict is not None:
            self.learner.judge(verdict)
            self.judged.append(verdict)
        while self.learner.can_step():
            report = self.learner.step(StepInputs(at_s=float(self.learner.steps_done)))
            assert not report.failure, report.failure
            self.metrics = report.metrics

    def newest(self, count: int) -> Array:
        """Serial numbers of the newest experiences."""
        inserted = self.learner.buffer.inserted
        return np.arange(inserted - count, inserted)

    def until_stage(self, stage: int, turns_max: int = 2000) -> None:
        """Go on until the curriculum is in a stage."""
        for _ in range(turns_max):
            if self.learner.stage == stage:
                return
            self.turn()
        raise AssertionError(f"stage {stage} was not reached in {turns_max} turns")

    def turns(self, count: int) -> None:
        """Go on for so many turns."""
        for _ in range(count):
            self.turn()

    def score(self, part: int, episodes: int = 200) -> float:
        """Mean return of the policy on held-out episodes of one half."""
        self.policy.load_state_dict(self.learner.engine.acting_weights())
        world: World = self.worlds[part]
        return measured(world, self.config, lambda lanes: PolicyActing(self.policy, lanes), episodes)


class Memory(NamedTuple):
    """Shares of right choices.

    Attributes:
        learned: In the first half when it was passed.
        kept: In the first half after the second one was learned.
        new: In the second half then.
        updates: Made in the second half.
    """

    learned: float
    kept: float
    new: float
    updates: int

    @property
    def forgotten(self) -> float:
        """What the second half cost of the first."""
        return self.learned - self.kept


def remember(seed: int, turns: int, ewc_lambda: float, **settings: Any) -> Memory:
    """Learn the first half until it is passed, then the second for so many turns."""
    torch.set_num_threads(1)
    loop = Staged(configured(seed, ewc_lambda=ewc_lambda, **settings))
    loop.until_stage(1)
    learned, before = loop.score(0), loop.learner.steps_done
    loop.turns(turns)
    return Memory(learned, loop.score(0), loop.score(1), loop.learner.steps_done - before)
