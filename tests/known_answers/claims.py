"""What each algorithm is held to: how close to the optimum it comes, within how many steps of environments.

Closeness is the share of the way from the random policy's return to the best one's, both on the same held-out episodes
(`Answer.reached`). It is less than 1 where a policy that is sampled keeps some of its noise: a wrong move now and then
in Catch and GridWorld, and with real numbers the deviation, which falls by at most the learning rate with each update
(in its logarithm) and is paid for five times an episode. IQL in Target does not pass far beyond what was recorded: its
policy weighs recorded actions, and the recorded noise is half of the reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.known_answers.harness import Answer, learn

COMMON: Mapping[str, Any] = {
    "learning_rate": 3e-3,
    "hidden_size": 32,
    "unroll_length": 16,
    "batch_size": 32,
    "max_grad_norm": 1.0,
    "vtrace_lambda": 0.95,
    "entropy_coefficient": 0.01,
    "entropy_coefficient_final": 0.0,
    "experience_buffer.replay_ratio": 0.0,
    "experience_buffer.capacity": 64,
    "experience_buffer.min_experiences": 1,
    "environment.environments_per_actor": 32,
}

OFFLINE: Mapping[str, Any] = {
    "environment.behaviour": "random",
    "experience_buffer.replay_ratio": 0.9375,
    "experience_buffer.capacity": 8_000,
}
"""Another acts than the policy (here it is the harness's); of what is recorded each transition is learned from sixteen
times."""

IQL: Mapping[str, Any] = {**OFFLINE, "iql_target_rate": 0.05, "iql_expectile": 0.9, "iql_beta": 10.0}
"""Small problems whose dynamics know no chance: values may follow fast, and the best of what was done is the best."""

ONE_PULL: Mapping[str, Any] = {"unroll_length": 4}
"""Where every step is an episode, shorter unrolls make more updates."""

REAL: Mapping[str, Any] = {"unroll_length": 5, "gamma": 0.9, "entropy_coefficient": 0.0}
"""Actions of real numbers: deviations have far to fall, an Adam step at a time, and a bonus would hold them up."""

AGAIN: Mapping[str, Any] = {"experience_buffer.replay_ratio": 0.5, "experience_buffer.capacity": 256}
"""Off-policy: twice the updates of as many steps."""

EPOCHS: Mapping[str, Any] = {"ppo_epochs": 4, "ppo_target_kl": 0.05}
"""On-policy: up to four updates of every batch."""

REMEMBERING: Mapping[str, Any] = {"network": "lstm"}

EPISODE_OF_RECALL: Mapping[str, Any] = {"unroll_length": 6}
"""Recorded unrolls of whole episodes: nobody recorded what the learner would have remembered before them."""


class Claim(NamedTuple):
    """One algorithm on one problem.

    Attributes:
        algorithm: Its name.
        problem: Its name.
        steps: Environment steps.
        reached: Least share of the way from random to optimal.
        settings: What is configured beside `COMMON`.
        chance_share: Of what was recorded, see `harness.learn`; None: it learns from what it does.
    """

    algorithm: str
    problem: str
    steps: int
    reached: float
    settings: Mapping[str, Any] = {}
    chance_share: float | None = None

    @property
    def name(self) -> str:
        """For a test's."""
        return f"{self.algorithm}-{self.problem}"

    @property
    def configured(self) -> dict[str, Any]:
        """All settings."""
        annealed = {"algorithm": self.algorithm, "entropy_anneal_steps": self.steps}
        return {**COMMON, **annealed, **self.settings}


def _online(algorithm: str, target: float, real: Mapping[str, Any]) -> tuple[Claim, ...]:
    return (
        Claim(algorithm, "Bandit-v0", 20_000, 0.97, ONE_PULL),
        Claim(algorithm, "Chain-v0", 30_000, 0.98),
        Claim(algorithm, "GridWorld-v0", 60_000, 0.98),
        Claim(algorithm, "Catch-v0", 80_000, 0.97),
        Claim(algorithm, "Target-v0", 60_000, target, {**REAL, **real}),
        Claim(algorithm, "Recall-v0", 60_000, 0.97, REMEMBERING),
    )


CLAIMS: tuple[Claim, ...] = (
    *_online("IMPALA", 0.85, AGAIN),
    *_online("PPO", 0.93, EPOCHS),
    *_online("APPO", 0.93, EPOCHS),
    Claim("IQL", "Bandit-v0", 20_000, 0.9, IQL, 1.0),
    Claim("IQL", "Chain-v0", 30_000, 0.97, IQL, 1.0),
    Claim("IQL", "GridWorld-v0", 30_000, 0.95, IQL, 1.0),
    Claim("IQL", "Catch-v0", 40_000, 0.9, IQL, 0.5),
    Claim("IQL", "Target-v0", 30_000, 0.8, IQL, 0.5),
    Claim("BC", "Bandit-v0", 10_000, 0.97, OFFLINE, 0.0),
    Claim("BC", "Chain-v0", 10_000, 0.97, OFFLINE, 0.0),
    Claim("BC", "GridWorld-v0", 10_000, 0.97, OFFLINE, 0.0),
    Claim("BC", "Catch-v0", 10_000, 0.97, OFFLINE, 0.0),
    Claim("BC", "Target-v0", 40_000, 0.9, OFFLINE, 0.0),
    Claim("BC", "Recall-v0", 10_000, 0.97, {**OFFLINE, **REMEMBERING, **EPISODE_OF_RECALL}, 0.0),
)


def tried(claim: Claim, seed: int) -> Answer:
    """What comes of it with a seed."""
    return learn(claim.problem, seed, claim.steps, claim.configured, chance_share=claim.chance_share)


def holds(claim: Claim, answer: Answer) -> None:
    """Fail where it does not."""
    assert answer.reached >= claim.reached, f"{claim.name}: {answer}"
    if claim.algorithm == "IQL":
        better = answer.learned - answer.behaviour
        assert better >= 0.4 * (answer.optimum - answer.behaviour), f"{claim.name}: {answer}"
    elif claim.chance_share is not None:
        assert answer.behaviour == answer.optimum, "there is nothing better to copy"


QUICK = {
    "IMPALA": ("Bandit-v0", "Chain-v0", "Recall-v0"),
    "PPO": ("GridWorld-v0",),
    "APPO": ("Catch-v0",),
    "IQL": ("Chain-v0",),
    "BC": ("Target-v0",),
}
"""What is tried at every change, with one seed: each algorithm and each problem at least once, in seconds."""


def quick(*, is_recorded: bool) -> list[Claim]:
    """The claims of `QUICK`, of those who act themselves or of those who learn from records."""
    return [
        claim
        for claim in CLAIMS
        if claim.problem in QUICK[claim.algorithm] and is_recorded == (claim.chance_share is not None)
    ]
