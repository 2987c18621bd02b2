"""Unrolls in which a script acts: the policy watches, and a later life comes to stand where the script stood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.config import EnvironmentConfig, TrainerConfig
from esper_simic.errors import InvariantViolation
from esper_simic.policies.build import build_policy
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, encode
from esper_simic.unroll import UnrollCarry, begin, resimulate, unroll
from esper_simic.worlds.growing import GrowingLanes, GrowthScript
from esper_simic.worlds.world import world_of

LANES, LENGTH = 2, 9
SEEDS, FIRST = (5, 6), (0, 3)
CONFIG = EnvironmentConfig(
    max_epochs=20,
    training_epochs_min=2,
    train_batches=1,
    train_batch_size=4,
    validation_samples=20,
    host_lr=1e-9,
)


class Acting:
    """Lanes in which a script acts and a policy watches."""

    def __init__(self, name: str) -> None:
        world = world_of(CONFIG, 0.99)
        lanes = world.lanes(SEEDS, FIRST, stagger=True)
        assert isinstance(lanes, GrowingLanes)
        self.lanes, self.script = lanes, GrowthScript(name, lanes)
        self.policy: Policy = build_policy(
            world.spec, TrainerConfig(hidden_size=16), np.random.default_rng(0)
        )
        observation, _ = lanes.reset()
        self.carry: UnrollCarry = begin(self.policy, observation, SEEDS, np.array(FIRST))

    def unroll(self) -> tuple[Trajectory, Tensor]:
        trajectory, _ = unroll(self.policy, self.lanes, self.carry, LENGTH, self.script)
        return trajectory, self.carry.state.clone()


def test_the_script_acts_and_the_policy_watches() -> None:
    acting = Acting("patient")
    first, state_after = acting.unroll()
    second, _ = acting.unroll()
    assert first.behaviour_log_probs.eq(0).all(), "a fixed schedule does what it does for certain"
    assert first.actions.any()
    evaluation = acting.policy.evaluate(
        {key: rows[:LENGTH] for key, rows in first.observations.items()},
        first.episode_start[:LENGTH],
        first.initial_state,
        first.actions,
    )
    assert torch.allclose(evaluation.state, state_after, atol=1e-6), "its memory is of what was observed"
    assert torch.equal(second.initial_state, state_after)
    assert evaluation.log_probs.isfinite().all(), "what a script does is legal for a policy"
    cut = (first.truncation_values != 0) | (second.truncation_values != 0)
    assert cut.any(), "a staggered episode was cut, and its last value is the policy's"


@pytest.mark.parametrize("name", ["heuristic", "random"])
def test_a_later_life_stands_where_the_script_stood_with_all_it_remembers(name: str) -> None:
    straight = Acting(name)
    made = [straight.unroll() for _ in range(3)]
    later = Acting(name)
    assert list(resimulate(later.lanes, later.carry, made[:2], later.script)) == [1, 2]
    again, state = later.unroll()
    assert encode(again) == encode(made[2][0])
    assert torch.equal(state, made[2][1])


def test_a_script_that_does_otherwise_than_was_recorded_is_told() -> None:
    acting = Acting("random")
    trajectory, state = acting.unroll()
    other = replace(trajectory, actions=trajectory.actions.clone())
    other.actions[4, 1, 0] = 0 if other.actions[4, 1, 0] else 1
    later = Acting("random")
    with pytest.raises(InvariantViolation, match="step 4: actions"):
        list(resimulate(later.lanes, later.carry, [(other, state)], later.script))
