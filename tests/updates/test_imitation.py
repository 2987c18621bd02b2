"""Behaviour cloning's update: what was recorded becomes likely, and values learn nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.updates.ground import SPECS, Ground, T


def negative_log_likelihood(ground: Ground) -> float:
    """Mean over the steps at which there was a choice, computed the slow way."""
    batch = ground.batch
    with torch.no_grad():
        log_probs = batch.evaluate(ground.policy).log_probs[:T]
    counted = [
        -float(log_prob)
        for log_prob, weight in zip(log_probs.flatten(), batch.policy_weights.flatten(), strict=True)
        if weight > 0
    ]
    return sum(counted) / len(counted)


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_recorded_becomes_likely(spec: str) -> None:
    ground = Ground("BC", spec, learning_rate=3e-3, max_grad_norm=10.0)
    found = [negative_log_likelihood(ground)]
    for _ in range(40):
        updated = ground.update()
        assert updated.loss == pytest.approx(found[-1], rel=1e-4, abs=1e-5)
        found.append(negative_log_likelihood(ground))
    assert found[-1] < found[0] - 0.1
    assert sum(after < before for before, after in pairwise(found)) > 30


def test_values_learn_nothing() -> None:
    ground = Ground("BC", "one")
    before = [parameter.detach().clone() for parameter in ground.policy.value_parameters()]
    updated = ground.update()
    for old, new in zip(before, ground.policy.value_parameters(), strict=True):
        assert torch.equal(old, new)
    assert (updated.value_loss, updated.ratios) == (0.0, None)
    assert updated.policy_loss == updated.loss == updated.metrics["policy_loss"]


def test_forced_steps_are_not_copied() -> None:
    ground = Ground("BC", "masked")
    mask = ground.trajectory.observations["action_mask"]
    mask.zero_()
    mask[..., [0, 3, 4]] = 1  # one choice of each head: 3 + 1 + 4
    ground.trajectory.actions.zero_()
    updated = ground.update()
    assert (updated.loss, updated.grad_norm) == (0.0, 0.0)


def test_each_head_is_told_apart() -> None:
    updated = Ground("BC", "many").update()
    assert {"head_nll.a", "head_nll.b", "head_nll.c"} <= set(updated.metrics)
    assert updated.metrics["head_nll.b"] == 0.0, "it has one choice"
    assert sum(updated.metrics[f"head_nll.{head}"] for head in "abc") == pytest.approx(updated.loss, rel=1e-5)
    assert all(math.isfinite(value) for value in updated.metrics.values())
