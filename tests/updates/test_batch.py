"""A batch: rewards, ends and weights as every algorithm wants them, step by step."""

from __future__ import annotations

import pytest
import torch

from esper_simic.actions import Op
from esper_simic.reward_scale import RewardScale
from esper_simic.updates.batch import FORCED_VALUE_WEIGHT, prepare
from tests.updates.ground import LANES, SPECS, Ground, T


@pytest.mark.parametrize("spec", SPECS)
def test_every_step_has_its_reward_its_discount_and_its_weights(spec: str) -> None:
    ground = Ground(spec=spec, reward_clip=0.4, gamma=0.95)
    scale = RewardScale(0.95)
    begins = ground.trajectory.episode_start[0]
    scale.update(0, begins, ground.trajectory.rewards * 3, ground.trajectory.ended)
    ground.force(1, 2)
    batch = prepare(ground.trajectory, ground.policy, scale, ground.trainer)
    assert bool((batch.policy_weights == 0).any()) == ("action_mask" in ground.trajectory.observations)
    assert (batch.length, batch.lanes) == (T, LANES)
    free = ground.policy.free(ground.trajectory.observations)
    for t in range(T):
        for lane in range(LANES):
            scaled = float(ground.trajectory.rewards[t, lane]) / scale.deviation
            reward = min(max(scaled, -0.4), 0.4) + 0.95 * float(ground.trajectory.truncation_values[t, lane])
            assert float(batch.rewards[t, lane]) == pytest.approx(reward, abs=1e-6)
            ended = bool(ground.trajectory.ended[t, lane])
            assert float(batch.discounts[t, lane]) == pytest.approx(0.0 if ended else 0.95)
            choice = bool(free[t, lane] > 0)
            assert float(batch.policy_weights[t, lane]) == float(choice)
            assert float(batch.value_weights[t, lane]) == pytest.approx(
                1.0 if choice else FORCED_VALUE_WEIGHT
            )


def test_some_lanes_of_a_batch_are_those_lanes_in_that_order() -> None:
    batch = Ground(spec="masked").batch
    lanes = torch.tensor([4, 1])
    part = batch.of_lanes(lanes)
    assert (part.length, part.lanes) == (T, 2)
    for one, lane in enumerate((4, 1)):
        for name in ("rewards", "discounts", "policy_weights", "value_weights"):
            assert torch.equal(getattr(part, name)[:, one], getattr(batch, name)[:, lane]), name
        for name, tensor in batch.trajectory.tensors().items():
            axis = 0 if name == "initial_state" else 1
            assert torch.equal(
                part.trajectory.tensors()[name].select(axis, one), tensor.select(axis, lane)
            ), name


@pytest.mark.parametrize("spec", SPECS)
def test_lanes_are_evaluated_alone_as_they_are_together(spec: str) -> None:
    ground = Ground(spec=spec)
    whole = ground.batch.evaluate(ground.policy)
    part = ground.batch.of_lanes(torch.tensor([3, 0])).evaluate(ground.policy)
    assert whole.log_probs.shape == (T + 1, LANES)
    for one, lane in enumerate((3, 0)):
        assert torch.allclose(part.log_probs[:T, one], whole.log_probs[:T, lane], atol=1e-5)
        assert torch.allclose(part.values[:, one], whole.values[:, lane], atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_the_evaluation_is_of_what_was_done(spec: str) -> None:
    ground = Ground(spec=spec)
    found = ground.batch.evaluate(ground.policy).log_probs[:T]
    assert torch.allclose(found, ground.trajectory.behaviour_log_probs, atol=1e-5)


def test_the_last_row_stands_for_waiting_which_is_always_legal() -> None:
    """Any other operation might be masked there."""
    ground = Ground(spec="graph")
    layout = SPECS["graph"].mask_layout  # type: ignore[attr-defined]
    mask = ground.trajectory.observations["action_mask"]
    mask[-1, :, layout.op] = torch.eye(len(Op), dtype=torch.int8)[Op.WAIT]
    evaluation = ground.batch.evaluate(ground.policy)
    assert bool(evaluation.log_probs.isfinite().all())
    assert bool((evaluation.log_probs[-1] == 0).all()), "the only choice there is"


def test_head_entropies_are_means_over_the_steps_at_which_the_head_counted() -> None:
    ground = Ground(spec="graph")
    batch = ground.batch
    with torch.no_grad():
        evaluation = batch.evaluate(ground.policy)
    found = batch.head_entropies(evaluation)
    assert set(found) == {f"head_entropy.{head}" for head in evaluation.heads.head_entropies}
    for head, entropy in evaluation.heads.head_entropies.items():
        counted = [
            float(entropy[t, lane])
            for t in range(T)
            for lane in range(LANES)
            if batch.policy_weights[t, lane] > 0 and evaluation.heads.relevance[head][t, lane] > 0
        ]
        expected = sum(counted) / len(counted) if counted else 0.0
        assert found[f"head_entropy.{head}"] == pytest.approx(expected, abs=1e-5), head
