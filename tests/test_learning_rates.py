"""UnifiedLRController: its schedules, its three invariants, and what it tells."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.errors import InvariantViolation
from esper_simic.learning_rates import (
    HISTORY_MAX,
    GroupConfig,
    LRPolicy,
    UnifiedLRController,
    youth,
)
from esper_simic.rate_facts import RateChanged, Tampered

POLICY = LRPolicy.POLICY_NETWORK


def parameter(*values: float) -> Tensor:
    weight = torch.tensor(values or (0.0,), requires_grad=True)
    weight.grad = torch.ones_like(weight)
    return weight


def make(
    policy: LRPolicy = POLICY,
    base: float = 1e-3,
    warmup: int = 4,
    least: float = 1e-6,
    horizon: int | None = None,
) -> tuple[UnifiedLRController, torch.optim.SGD, Tensor]:
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=123.0)
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(policy, base, warmup, least, horizon))
    return controller, optimizer, weight


def rates(controller: UnifiedLRController, steps: int) -> list[float]:
    return [controller.step("policy").rate for _ in range(steps)]


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, LRPolicy.VALUE_NETWORK, LRPolicy.EWC_ADJUSTED])
def test_warm_up_is_linear_then_constant_and_moves_the_weight_by_exactly_that(policy: LRPolicy) -> None:
    controller, _, weight = make(policy)
    used = rates(controller, 6)
    assert used == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert weight.item() == pytest.approx(-sum(used))


@given(st.floats(1e-6, 1e-2), st.integers(0, 30), st.floats(1e-6, 1e-2), st.integers(0, 50), st.booleans())
def test_without_a_cause_the_rate_is_to_the_last_bit_what_it_always_was(
    base: float, warmup: int, least: float, steps: int, named: bool
) -> None:
    controller, *_ = make(base=base, warmup=warmup, least=least)
    if named:
        controller.set_factor("policy", 0.5)
        controller.set_policy("policy", LRPolicy.FROZEN)
        controller.set_factor("policy", 1.0)
        controller.set_policy("policy", POLICY)
        controller.set_strength("policy", 0.0)
    controller.load_state_dict({"policy": steps})
    warm = min(1.0, (steps + 1) / warmup) if warmup else 1.0
    assert controller.step("policy").rate == max(base * warm, least)
    assert controller.state_dict() == {"policy": steps + 1}


def test_steps_of_one_update_have_one_rate_and_are_one_step_of_the_schedule() -> None:
    controller, _, weight = make()
    used = [controller.step("policy", moves_on=first).rate for first in (False, False, True, False, True)]
    assert used == pytest.approx([0.25e-3, 0.25e-3, 0.5e-3, 0.5e-3, 0.75e-3])
    assert weight.item() == pytest.approx(-sum(used)), "each is made"
    assert controller.state_dict() == {"policy": 3}


def test_no_warm_up_starts_at_the_base() -> None:
    controller, *_ = make(warmup=0)
    assert controller.step("policy").rate == 1e-3


def test_the_minimum_bounds_everything_but_frozen() -> None:
    controller, *_ = make(base=1e-5, warmup=100, least=1e-6)
    assert controller.step("policy").rate == 1e-6
    controller, *_ = make(base=1e-5, warmup=0, least=8e-6)
    assert controller.step("policy", factor=0.1).rate == 8e-6


def test_a_cosine_falls_to_the_minimum_within_its_horizon_and_stays() -> None:
    controller, *_ = make(warmup=2, horizon=6)
    used = rates(controller, 9)
    assert used[:2] == pytest.approx([0.5e-3, 1e-3])
    for n in range(2, 6):
        assert used[n] == pytest.approx(
            1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (n - 2) / 4)), rel=1e-12
        )
    assert used[2] == 1e-3
    assert used[4] == pytest.approx((1e-3 + 1e-6) / 2)
    assert used[6:] == [1e-6] * 3


@given(st.integers(0, 20), st.integers(1, 60), st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2))
def test_a_cosine_never_rises_after_the_warm_up_nor_leaves_its_bounds(
    warmup: int, more: int, base: float, least: float
) -> None:
    config = GroupConfig(POLICY, base, warmup, least, warmup + more)
    after = [config.rate(n) for n in range(warmup, warmup + more + 3)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    assert all(least <= rate <= max(base, least) * (1 + 1e-12) for rate in after)
    assert after[more:] == [least] * 3


def test_a_horizon_within_the_warm_up_is_refused() -> None:
    with pytest.raises(InvariantViolation, match="after 4 steps cannot follow a warm-up of 4"):
        GroupConfig(POLICY, 1e-3, 4, 1e-6, 4)


def test_frozen_moves_neither_weights_nor_the_optimisers_memory() -> None:
    weight = parameter()
    optimizer = torch.optim.Adam([weight])
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(LRPolicy.FROZEN, 1e-3, 4, 1e-6))
    assert controller.step("policy", factor=0.5).rate == 0.0
    assert (weight.item(), len(optimizer.state), controller.rates()) == (0.0, 0, {"policy": 0.0})


# -- what changes a rate beside its schedule ---------------------------------------------------------------------------


def test_a_factor_lowers_the_rate_from_the_next_step_and_is_told_once() -> None:
    controller, *_ = make(warmup=0)
    assert controller.step("policy").changed is None
    controller.set_factor("policy", 0.5)
    halved = controller.step("policy")
    assert halved.rate == 0.5e-3
    assert halved.changed == RateChanged(name="policy", step=2, causes=["factor"], before=1e-3, after=0.5e-3)
    assert controller.step("policy").changed is None
    assert controller.step("policy", factor=0.5).changed is None
    restored = controller.step("policy", factor=1.0)
    assert (restored.rate, restored.changed is not None) == (1e-3, True)
    assert controller.state_dict() == {"policy": 5}


def test_a_change_is_told_beside_what_the_same_step_would_have_been() -> None:
    controller, *_ = make(warmup=4)
    controller.step("policy")
    changed = controller.step("policy", factor=0.5).changed
    assert changed is not None
    assert (changed.before, changed.after) == (0.5e-3, 0.25e-3)


def test_a_change_that_is_taken_back_before_a_step_never_was() -> None:
    controller, *_ = make()
    controller.set_factor("policy", 0.5)
    controller.set_policy("policy", LRPolicy.FROZEN)
    controller.set_policy("policy", POLICY)
    assert controller.step("policy", factor=1.0).changed is None


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_factor_only_lowers(factor: float) -> None:
    controller, *_ = make()
    with pytest.raises(InvariantViolation, match=r"not in \(0, 1\]"):
        controller.set_factor("policy", factor)


def test_a_policy_is_switched_and_back_and_the_schedule_counts_on() -> None:
    controller, _, weight = make(warmup=4)
    rates(controller, 2)
    before = weight.item()
    controller.set_policy("policy", LRPolicy.FROZEN)
    frozen = controller.step("policy")
    assert (frozen.rate, weight.item()) == (0.0, before)
    assert frozen.changed == RateChanged(name="policy", step=3, causes=["policy"], before=0.75e-3, after=0.0)
    controller.set_policy("policy", POLICY)
    assert controller.step("policy").rate == 1e-3


def test_old_tasks_that_bind_lower_the_rate_under_ewc_adjusted_alone() -> None:
    controller, *_ = make(LRPolicy.EWC_ADJUSTED, warmup=0)
    assert rates(controller, 1) == [1e-3]
    controller.set_strength("policy", 3.0)
    bound = controller.step("policy")
    assert bound.rate == 0.25e-3
    assert bound.changed is not None
    assert bound.changed.causes == ["strength"]
    controller.set_strength("policy", 1e9)
    assert rates(controller, 1) == [1e-6]
    plain, *_ = make(warmup=0)
    plain.set_strength("policy", 3.0)
    assert rates(plain, 1) == [1e-3]
    plain.set_policy("policy", LRPolicy.EWC_ADJUSTED)
    both = plain.step("policy", factor=0.5)
    assert both.rate == 0.125e-3
    assert both.changed is not None
    assert both.changed.causes == ["policy", "factor"]


@pytest.mark.parametrize("strength", [-1e-9, float("nan"), float("inf")])
def test_a_strength_is_a_finite_amount(strength: float) -> None:
    controller, *_ = make()
    with pytest.raises(InvariantViolation, match="no consolidation"):
        controller.set_strength("policy", strength)


# -- L2: parameters come and go, and the optimiser remembers -----------------------------------------------------------


def test_names_are_registered_once_and_must_be_known() -> None:
    controller, optimizer, _ = make()
    with pytest.raises(InvariantViolation, match="registered already"):
        controller.register_optimizer("policy", optimizer, GroupConfig(LRPolicy.FROZEN, 1e-3, 0, 1e-6))
    unknown: list[Any] = [
        lambda: controller.step("value"),
        lambda: controller.forget("value"),
        lambda: controller.add_group("value", [parameter()]),
        lambda: controller.replace_parameters("value", {}),
        lambda: controller.set_factor("value", 0.5),
        lambda: controller.set_policy("value", POLICY),
        lambda: controller.set_strength("value", 1.0),
    ]
    for call in unknown:
        with pytest.raises(InvariantViolation, match=r"no optimiser named 'value'.*\['policy'\]"):
            call()


def test_a_forgotten_optimiser_is_unknown_and_its_name_free() -> None:
    controller, optimizer, _ = make()
    controller.forget("policy")
    assert controller.rates() == controller.state_dict() == {}
    controller.register_optimizer("policy", optimizer, GroupConfig(POLICY, 1e-3, 0, 1e-6))


def test_a_new_group_starts_at_a_tenth_and_is_grown_after_ten_steps() -> None:
    assert [youth(age) for age in (0, 5, 10, 11, 1000)] == pytest.approx([0.1, 0.55, 1, 1, 1])
    controller, optimizer, weight = make(warmup=0)
    rates(controller, 3)
    young = parameter()
    assert controller.add_group("policy", [young]) == 1
    assert optimizer.param_groups[1]["lr"] == 1e-4
    before = weight.item()
    joined = controller.step("policy")
    assert joined.changed == RateChanged(name="policy", step=4, causes=["joined"], before=1e-3, after=1e-3)
    assert weight.item() == pytest.approx(before - 1e-3)
    assert young.item() == pytest.approx(-1e-4)
    used = [optimizer.param_groups[1]["lr"]]
    for _ in range(11):
        assert controller.step("policy").changed is None
        used.append(optimizer.param_groups[1]["lr"])
    assert used[:10] == pytest.approx([1e-3 * (0.1 + 0.09 * age) for age in range(10)])
    assert used[10:] == [1e-3, 1e-3]
    assert controller.state_dict()["policy"]["wanted"]["joined"] == [3]


def test_a_new_group_bears_what_all_bear() -> None:
    controller, optimizer, _ = make(warmup=0)
    controller.add_group("policy", [parameter()])
    controller.step("policy", factor=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5e-3, 0.5e-4]
    controller.set_policy("policy", LRPolicy.FROZEN)
    controller.step("policy")
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_what_cannot_join_is_refused() -> None:
    controller, optimizer, weight = make()
    twice = parameter()
    for joining in ([], [weight], [twice, twice], [parameter(), weight]):
        with pytest.raises(InvariantViolation, match="cannot join 'policy'"):
            controller.add_group("policy", joining)
    assert len(optimizer.param_groups) == 1
    controller.step("policy")


def adam(*weights: Tensor, **given: Any) -> tuple[UnifiedLRController, torch.optim.Adam]:
    optimizer = torch.optim.Adam(weights, **given)
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(POLICY, 1e-3, 0, 1e-6))
    return controller, optimizer


def remembered(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, bytes]:
    return {name: bytes(value.detach().numpy().tobytes()) for name, value in optimizer.state[weight].items()}


@pytest.mark.parametrize("given", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimisers_memory_of_what_stays_is_kept_bit_for_bit(given: dict[str, Any]) -> None:
    stays, moves, goes = parameter(1.0, 2.0), parameter(3.0), parameter(4.0)
    controller, optimizer = adam(stays, moves, goes, **given)
    for step in range(5):
        for weight in (stays, moves, goes):
            weight.grad = weight.detach() * (step + 1) + 0.1
        controller.step("policy")
    whole = {name: remembered(optimizer, one) for name, one in (("stays", stays), ("moves", moves))}
    successor = parameter(30.0)
    controller.replace_parameters("policy", {moves: successor, goes: None})
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(stays), id(successor)]
    assert remembered(optimizer, stays) == whole["stays"]
    assert remembered(optimizer, successor) == whole["moves"]
    assert moves not in optimizer.state
    assert goes not in optimizer.state
    new = parameter(7.0)
    controller.add_group("policy", [new])
    assert remembered(optimizer, stays) == whole["stays"]

    # The next step is the one that the optimiser would have made had nothing happened around this parameter.
    alone = torch.tensor([1.0, 2.0], requires_grad=True)
    twin_controller, twin = adam(alone, **given)
    with torch.no_grad():
        alone.copy_(stays)
    twin.state[alone] = copy.deepcopy(optimizer.state[stays])
    twin_controller.load_state_dict({"policy": 5})
    alone.grad = stays.grad.clone() if stays.grad is not None else None
    controller.step("policy")
    twin_controller.step("policy")
    assert alone.detach().numpy().tobytes() == stays.detach().numpy().tobytes()
    assert goes.item() == pytest.approx(4.0, abs=0.1)
    assert new.item() == pytest.approx(7.0 - 1e-4, abs=1e-6)


@pytest.mark.parametrize("given", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_a_group_that_lost_all_its_parameters_does_nothing(given: dict[str, Any]) -> None:
    first, second = parameter(1.0), parameter(2.0)
    controller, optimizer = adam(first, **given)
    controller.add_group("policy", [second])
    controller.step("policy")
    controller.replace_parameters("policy", {first: None})
    before = (first.item(), second.item())
    controller.step("policy")
    assert first.item() == before[0]
    assert second.item() < before[1]
    assert len(optimizer.param_groups) == 2


def test_a_parameter_that_was_never_stepped_is_replaced_too() -> None:
    first, second = parameter(1.0), parameter(2.0)
    controller, optimizer = adam(first)
    controller.replace_parameters("policy", {first: second})
    controller.step("policy")
    assert first.item() == 1.0
    assert second.item() == pytest.approx(2.0 - 1e-3)
    assert list(optimizer.state) == [second]


def test_two_parameters_can_change_places_with_new_ones_only() -> None:
    one, two = parameter(1.0), parameter(2.0)
    controller, optimizer = adam(one, two)
    controller.step("policy")
    new = parameter(3.0)
    refused: list[tuple[dict[Tensor, Tensor | None], str]] = [
        ({parameter(): None}, "has no such parameter"),
        ({one: two}, "twice"),
        ({one: new, two: new}, "twice"),
        ({one: parameter(1.0, 2.0)}, r"float32 \(2,\) on cpu cannot take over .* of torch.float32 \(1,\)"),
        ({one: torch.zeros(1, dtype=torch.float64)}, "float64"),
        ({one: torch.zeros(1, device="meta")}, "on meta"),
        ({two: None, one: parameter(1.0, 2.0)}, "drop that one and add_group this one"),
    ]
    for replacements, says in refused:
        with pytest.raises(InvariantViolation, match=says):
            controller.replace_parameters("policy", replacements)
        assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(one), id(two)]
        assert set(optimizer.state) == {one, two}


def test_a_group_that_joined_past_the_controller_is_a_contradiction() -> None:
    controller, optimizer, _ = make()
    optimizer.add_param_group({"params": [parameter()]})
    with pytest.raises(InvariantViolation, match="2 groups, 1 are registered: only add_group"):
        controller.step("policy")


def test_an_optimiser_may_come_with_several_groups() -> None:
    optimizer = torch.optim.SGD([{"params": [parameter()]}, {"params": [parameter()]}], lr=1.0)
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(POLICY, 1e-3, 0, 1e-6))
    assert controller.add_group("policy", [parameter()]) == 2
    controller.step("policy")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 1e-4]


# -- L3: somebody else wrote a rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.5, 0.0, -1.0, 1e-3 * (1 + 2e-6), float("nan"), float("inf")])
def test_somebody_elses_rate_is_found_told_and_never_used(wrong: float) -> None:
    controller, optimizer, weight = make(warmup=0)
    controller.step("policy")
    before = weight.item()
    optimizer.param_groups[0]["lr"] = wrong
    result = controller.step("policy")
    assert result.tampered == Tampered(
        name="policy",
        step=2,
        group=0,
        groups=1,
        found=wrong if math.isfinite(wrong) else None,
        written=1e-3,
    )
    assert (result.rate, result.changed) == (1e-3, None)
    assert weight.item() == pytest.approx(before - 1e-3)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert controller.step("policy").tampered is None


def test_the_first_of_several_groups_is_told_and_all_are_written_back() -> None:
    controller, optimizer, _ = make(warmup=0)
    controller.add_group("policy", [parameter()])
    controller.add_group("policy", [parameter()])
    controller.step("policy")
    for group in optimizer.param_groups[1:]:
        group["lr"] *= 2
    tampered = controller.step("policy").tampered
    assert tampered is not None
    assert (tampered.group, tampered.groups, tampered.found, tampered.written) == (1, 2, 2e-4, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 0.19e-3, 0.19e-3])


def test_a_rate_written_to_a_frozen_optimiser_moves_nothing() -> None:
    controller, optimizer, weight = make(LRPolicy.FROZEN)
    optimizer.param_groups[0]["lr"] = 0.5
    tampered = controller.step("policy").tampered
    assert tampered is not None
    assert (tampered.found, tampered.written, weight.item()) == (0.5, 0.0, 0.0)


def test_a_scheduler_beside_the_controller_is_found() -> None:
    controller, optimizer, _ = make(warmup=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    controller.step("policy")
    scheduler.step()
    assert controller.step("policy").tampered is not None


@pytest.mark.parametrize("scale", [1 + 1e-8, 1 - 9e-7, 1 + 9e-7])
def test_a_change_within_rounding_is_none(scale: float) -> None:
    controller, optimizer, _ = make()
    controller.step("policy")
    optimizer.param_groups[0]["lr"] *= scale
    assert controller.step("policy").tampered is None


def test_history_is_bounded_and_keeps_the_newest() -> None:
    controller, optimizer, _ = make(warmup=0)
    for step in range(HISTORY_MAX + 5):
        controller.step("policy", factor=0.5 if step % 2 else 1.0)
    assert len(controller.history) == HISTORY_MAX
    assert controller.history[-1].step == HISTORY_MAX + 5
    optimizer.param_groups[0]["lr"] = 1.0
    controller.step("policy", factor=0.25)
    assert [type(fact) for fact in list(controller.history)[-2:]] == [Tampered, RateChanged]
    assert len(controller.history) == HISTORY_MAX


# -- how a step is made ------------------------------------------------------------------------------------------------


def test_a_step_can_be_made_by_another_hand() -> None:
    controller, optimizer, weight = make(warmup=0)
    seen: list[tuple[torch.optim.Optimizer, float]] = []
    controller.step("policy", make=lambda one: seen.append((one, one.param_groups[0]["lr"])))
    assert (seen, weight.item()) == ([(optimizer, 1e-3)], 0.0)
    controller.set_policy("policy", LRPolicy.FROZEN)
    controller.step("policy", make=lambda one: seen.append((one, 0.0)))
    assert len(seen) == 1
    assert controller.state_dict()["policy"]["steps"] == 2


def test_a_rate_that_is_a_tensor_is_written_in_place() -> None:
    weight, held = parameter(), torch.tensor(9.0)
    optimizer = torch.optim.Adam([weight], lr=held, foreach=False, capturable=False)
    controller = UnifiedLRController()
    controller.register_optimizer("policy", optimizer, GroupConfig(POLICY, 1e-3, 2, 1e-6))
    assert held.item() == pytest.approx(0.5e-3)
    assert [controller.step("policy").tampered for _ in range(3)] == [None] * 3
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(1e-3)
    held.fill_(0.5)
    tampered = controller.step("policy").tampered
    assert tampered is not None
    assert tampered.found == 0.5


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_restores_the_schedule_where_it_was() -> None:
    whole, *_ = make()
    used = rates(whole, 5)
    first, *_ = make()
    rates(first, 2)
    second, *_ = make()
    second.load_state_dict(first.state_dict())
    assert second.rates() == first.rates()
    assert rates(second, 3) == used[2:]


def test_state_is_a_bare_number_for_the_schedule_alone_as_it_was_once() -> None:
    controller, *_ = make()
    assert controller.state_dict() == {"policy": 0}
    rates(controller, 7)
    assert controller.state_dict() == {"policy": 7}
    controller.load_state_dict({"policy": 12})
    assert controller.state_dict() == {"policy": 12}


MOVES = st.lists(
    st.one_of(
        st.just(("step",)),
        st.tuples(st.just("factor"), st.floats(0.01, 1.0)),
        st.tuples(st.just("policy"), st.sampled_from(LRPolicy)),
        st.tuples(st.just("strength"), st.floats(0, 100)),
        st.just(("group",)),
        st.just(("tamper",)),
    ),
    max_size=25,
)


def move(controller: UnifiedLRController, optimizer: torch.optim.Optimizer, one: Any) -> Any:
    kind, *value = one
    if kind == "step":
        return controller.step("policy")
    if kind == "group":
        return controller.add_group("policy", [parameter()])
    if kind == "tamper":
        optimizer.param_groups[0]["lr"] = 0.7
        return None
    return getattr(controller, f"set_{kind}")("policy", *value)


@given(MOVES, MOVES)
@settings(max_examples=60, deadline=None)
def test_whatever_happened_a_restored_controller_goes_on_the_same_way(before: Any, after: Any) -> None:
    whole, optimizer, _ = make(warmup=5, horizon=12)
    for one in before:
        move(whole, optimizer, one)
    # The rate that somebody else wrote is no state: a new life has not been tampered with.
    optimizer.param_groups[0]["lr"] = whole.rates()["policy"]
    state = whole.state_dict()
    other, twin, _ = make(warmup=5, horizon=12)
    for one in before:
        if one == ("group",):
            move(other, twin, one)
    other.load_state_dict(msgspec.json.decode(msgspec.json.encode(state)))
    assert repr(other.state_dict()) == repr(state)
    for one in [*after, ("step",)]:
        assert move(whole, optimizer, one) == move(other, twin, one)
        assert repr(other.state_dict()) == repr(whole.state_dict())
    assert [group["lr"] for group in twin.param_groups] == [group["lr"] for group in optimizer.param_groups]


@given(MOVES)
@settings(max_examples=60, deadline=None)
def test_a_rate_is_told_to_change_exactly_when_a_cause_did(moves: Any) -> None:
    controller, optimizer, _ = make(warmup=0)
    expected = dict.fromkeys(("policy", "factor", "strength"), None) | {"joined": 0}
    used = dict(expected)
    for kind, *value in moves:
        result = move(controller, optimizer, (kind, *value))
        if kind == "group":
            expected["joined"] = (expected["joined"] or 0) + 1
        elif kind in expected:
            plain = {"policy": POLICY, "factor": 1.0, "strength": 0.0}[kind]
            expected[kind] = None if value[0] == plain else value[0]
        elif kind == "step":
            differing = [cause for cause in expected if expected[cause] != used[cause]]
            assert (result.changed.causes if result.changed else []) == differing
            used = dict(expected)


def test_state_of_other_optimisers_is_refused() -> None:
    controller, *_ = make()
    with pytest.raises(InvariantViolation, match="cannot drive"):
        controller.load_state_dict({"value": 3})


def test_state_of_other_groups_is_refused_with_the_remedy() -> None:
    controller, *_ = make()
    grown, *_ = make()
    grown.add_group("policy", [parameter()])
    with pytest.raises(
        InvariantViolation, match="state of 2 groups cannot drive 'policy', which has 1: add_group"
    ):
        controller.load_state_dict(grown.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        -1,
        2.5,
        "3",
        None,
        {},
        {"steps": -1},
        {"steps": 3, "wanted": {"factor": 0.0}},
        {"steps": 3, "wanted": {"factor": 1.5}},
        {"steps": 3, "wanted": {"strength": -1.0}},
        {"steps": 3, "wanted": {"policy": "fast"}},
        {"steps": 3, "wanted": {"joined": [-1]}},
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(wrong: Any) -> None:
    controller, *_ = make()
    rates(controller, 2)
    with pytest.raises(msgspec.ValidationError):
        controller.load_state_dict({"policy": wrong})
    assert controller.state_dict() == {"policy": 2}
