"""UnifiedLRController: its schedules and its three invariants."""

from __future__ import annotations

import pytest
import torch

from esper_simic.errors import InvariantViolation
from esper_simic.learning_rates import GroupConfig, LRPolicy, UnifiedLRController


def make(
    policy: LRPolicy = LRPolicy.POLICY_NETWORK, base: float = 1e-3, warmup: int = 4, least: float = 1e-6
) -> tuple[UnifiedLRController, torch.optim.SGD, torch.Tensor]:
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=123.0)
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(policy, base, warmup, least))
    return controller, optimizer, weight


def test_warm_up_is_linear_then_constant_and_moves_the_weight_by_exactly_that() -> None:
    controller, _, weight = make()
    used = [controller.step("policy") for _ in range(6)]
    assert used == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert weight.item() == pytest.approx(-sum(used))


def test_no_warm_up_starts_at_the_base() -> None:
    controller, *_ = make(warmup=0)
    assert controller.step("policy") == 1e-3


def test_the_minimum_bounds_the_warm_up() -> None:
    controller, *_ = make(base=1e-5, warmup=100, least=1e-6)
    assert controller.step("policy") == 1e-6


def test_frozen_does_not_move() -> None:
    controller, _, weight = make(policy=LRPolicy.FROZEN)
    assert controller.step("policy") == 0.0
    assert weight.item() == 0.0


def test_somebody_else_changing_a_rate_is_found_before_the_step() -> None:
    controller, optimizer, weight = make()
    controller.step("policy")
    before = weight.item()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(InvariantViolation, match="only UnifiedLRController"):
        controller.step("policy")
    assert weight.item() == before


def test_a_change_within_rounding_is_none() -> None:
    controller, optimizer, _ = make()
    controller.step("policy")
    optimizer.param_groups[0]["lr"] *= 1 + 1e-8
    controller.step("policy")


def test_names_are_registered_once_and_must_be_known() -> None:
    controller, optimizer, _ = make()
    with pytest.raises(InvariantViolation, match="registered already"):
        controller.register_optimizer("policy", optimizer, GroupConfig(LRPolicy.FROZEN, 1e-3, 0, 1e-6))
    with pytest.raises(InvariantViolation, match=r"no optimiser named 'value'.*\['policy'\]"):
        controller.step("value")


def test_state_restores_the_schedule_where_it_was() -> None:
    whole, *_ = make()
    rates = [whole.step("policy") for _ in range(5)]
    first, *_ = make()
    for _ in range(2):
        first.step("policy")
    second, *_ = make()
    second.load_state_dict(first.state_dict())
    assert second.rates() == first.rates()
    assert [second.step("policy") for _ in range(3)] == rates[2:]


def test_state_of_other_optimisers_is_refused() -> None:
    controller, *_ = make()
    with pytest.raises(InvariantViolation, match="cannot drive"):
        controller.load_state_dict({"value": 3})
