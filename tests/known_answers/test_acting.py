"""IMPALA, PPO and APPO find the best policy by themselves: one seed of some claims; all are proven by `tests/prove`."""

from __future__ import annotations

import numpy as np
import pytest

from esper_simic.worlds import known_answers
from esper_simic.worlds.known_answer import KnownAnswerVectorEnv
from esper_simic.worlds.play import RandomActing
from tests.known_answers.claims import CLAIMS, COMMON, Claim, holds, quick, tried
from tests.known_answers.harness import OPTIMA, Loop, RuleActing, configured, measured

pytestmark = pytest.mark.timeout(300)

PROBLEMS = [
    (f"{kind.__name__.removesuffix('VectorEnv')}-v0", kind)
    for kind in KnownAnswerVectorEnv.__subclasses__()
    if kind.__module__ == known_answers.__name__
]


@pytest.mark.parametrize("claim", quick(is_recorded=False), ids=lambda claim: claim.name)
def test_it_comes_close_to_the_best_within_its_steps(claim: Claim) -> None:
    holds(claim, tried(claim, seed=0))


def test_every_algorithm_is_held_to_every_problem_it_can_solve() -> None:
    names = {name for name, _ in PROBLEMS}
    assert names == set(OPTIMA)
    for algorithm in ("IMPALA", "PPO", "APPO", "BC"):
        assert {claim.problem for claim in CLAIMS if claim.algorithm == algorithm} == names
    # Its critics remember nothing.
    assert {claim.problem for claim in CLAIMS if claim.algorithm == "IQL"} == names - {"Recall-v0"}


@pytest.mark.parametrize(("problem", "kind"), PROBLEMS, ids=[name for name, _ in PROBLEMS])
def test_what_is_taken_for_the_best_is_the_best(problem: str, kind: type[KnownAnswerVectorEnv]) -> None:
    """Rules and random policy come to the returns that are known of the problem, up to the chance of the starts."""
    config = configured(problem, 3, COMMON)
    loop = Loop(config)
    episodes = 2_000
    best = measured(loop.world, config, lambda lanes: RuleActing(OPTIMA[problem]()), episodes)
    random = measured(loop.world, config, lambda lanes: RandomActing(loop.world.spec.action), episodes)
    loop.close()
    span = kind.OPTIMAL_RETURN - kind.RANDOM_RETURN
    assert best == pytest.approx(kind.OPTIMAL_RETURN, abs=0.05 * span)
    assert random == pytest.approx(kind.RANDOM_RETURN, abs=0.05 * span)


def test_a_loop_is_a_function_of_its_seed() -> None:
    def digests(seed: int) -> list[str]:
        loop = Loop(configured("Catch-v0", seed, {**COMMON, "algorithm": "PPO"}))
        found = [loop.until(steps).state().digest for steps in (512, 2_048)]
        loop.close()
        return found

    first, again, other = digests(1), digests(1), digests(2)
    assert first == again
    assert not np.intersect1d(first, other).size
