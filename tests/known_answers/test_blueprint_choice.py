"""Karn's controller learns through the same learner as everyone: from what it chooses, and from what others chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.evaluation import PolicyActing
from esper_simic.policies.policy import Decision
from esper_simic.specs import Choices, ExperienceSpec
from esper_simic.worlds.blueprint_choice import BlueprintChoiceVectorEnv
from esper_simic.worlds.play import Acting, RandomActing
from esper_simic.worlds.rivals import BestPossible
from tests.known_answers.claims import COMMON, EPOCHS, IQL, OFFLINE
from tests.known_answers.harness import Behaviour, Loop, Recorded, configured, measured

pytestmark = pytest.mark.timeout(300)

PROBLEM = "BlueprintChoice-v0"
EPISODES = 2_000
SETTINGS: Mapping[str, Any] = {**COMMON, "unroll_length": 8, "hidden_size": 64, "entropy_coefficient": 0.05}


class Watched:
    """What another chose, recorded; see `harness.Behaviour`."""

    def __init__(self, spec: ExperienceSpec, acting: Acting, state_size: int) -> None:
        self.spec, self._acting, self.state_size = spec, acting, state_size

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.state_size)

    def act(
        self, observations: Mapping[str, Tensor], episode_start: Tensor, state: Tensor, uniforms: Tensor
    ) -> Decision:
        seen = {key: rows.numpy() for key, rows in observations.items()}
        chosen = self._acting.act(seen, episode_start.numpy(), uniforms.numpy())
        nothing = torch.zeros(len(episode_start))
        return Decision(torch.from_numpy(chosen), nothing, nothing, state)


def reached(
    algorithm: str, steps: int, settings: Mapping[str, Any], recorded: Recorded | None = None
) -> float:
    """Share of the way from chance to the best possible, on the hosts that were trained on."""
    torch.set_num_threads(1)
    annealed = {"algorithm": algorithm, "entropy_anneal_steps": steps}
    config = configured(PROBLEM, 0, {**SETTINGS, **annealed, **settings})
    loop = Loop(config, recorded)
    learner = loop.until(steps)
    loop.close()
    loop.policy.load_state_dict(learner.engine.acting_weights())
    cases = BlueprintChoiceVectorEnv(**config.environment.kwargs).cases

    def mean(make: Callable[[int], Acting]) -> float:
        return measured(loop.world, config, make, EPISODES)

    learned = mean(lambda lanes: PolicyActing(loop.policy, lanes))
    best = mean(lambda lanes: BestPossible(cases))
    random = mean(lambda lanes: RandomActing(loop.world.spec.action))
    assert best > random + 0.2
    return (learned - random) / (best - random)


@pytest.mark.parametrize(("algorithm", "settings"), [("IMPALA", {}), ("PPO", EPOCHS), ("APPO", EPOCHS)])
def test_it_comes_close_to_the_best_choices_by_trying(algorithm: str, settings: Mapping[str, Any]) -> None:
    assert reached(algorithm, 60_000, settings) >= 0.8


def watching(make: Callable[[ExperienceSpec], Acting]) -> Recorded:
    def recorded(spec: ExperienceSpec, state_size: int) -> Behaviour:
        return cast(Behaviour, Watched(spec, make(spec), state_size))

    return recorded


def test_it_learns_better_choices_than_those_that_were_recorded() -> None:
    """Everybody's choices were left to chance."""

    def random(spec: ExperienceSpec) -> Acting:
        assert isinstance(spec.action, Choices)
        return RandomActing(spec.action)

    assert reached("IQL", 20_000, IQL, watching(random)) >= 0.5


def test_it_learns_to_choose_as_somebody_did() -> None:
    def best(spec: ExperienceSpec) -> Acting:
        return BestPossible(BlueprintChoiceVectorEnv().cases)

    assert reached("BC", 20_000, OFFLINE, watching(best)) >= 0.8


def test_nothing_that_may_not_be_chosen_is_chosen() -> None:
    loop = Loop(configured(PROBLEM, 1, SETTINGS))
    loop.take_in()
    loop.take_in()
    cases = BlueprintChoiceVectorEnv().cases
    acting = PolicyActing(loop.policy, len(cases.place))
    chosen = acting.act(
        {"vector": cases.features, "action_mask": cases.mask},
        np.ones(len(cases.place), dtype=bool),
        np.random.default_rng(0).random((len(cases.place), 1)),
    )
    loop.close()
    assert cases.mask[np.arange(len(cases.place)), chosen[:, 0]].all()
    assert len(set(chosen[:, 0].tolist())) > 5
