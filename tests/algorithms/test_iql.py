"""Implicit Q-learning: each term written out, separate gradients, the conservative term, slow copies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.iql import IqlLoss, IqlOptions, expectile_loss, iql_loss, soft_update

LENGTH, LANES, ACTIONS, CRITICS = 5, 3, 4, 2
OPTIONS = IqlOptions(expectile=0.8, beta=3.0, weight_max=4.0, cql_alpha=0.7)


def random_batch(seed: int, *, length: int = LENGTH, lanes: int = LANES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*extra: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=(length, lanes, *extra)))

    legal = torch.from_numpy(rng.random((length, lanes, ACTIONS)) < 0.6)
    legal[..., 0] = True
    return {
        "log_probs": -normal().abs(),
        "q_values": [normal() for _ in range(CRITICS)],
        "target_q_values": [normal() for _ in range(CRITICS)],
        "values": normal(),
        "next_values": normal(),
        "rewards": normal(),
        "discounts": torch.from_numpy(np.where(rng.random((length, lanes)) < 0.3, 0.0, 0.97)),
        "weights": torch.from_numpy(rng.random((length, lanes)) * (rng.random((length, lanes)) < 0.8)),
        "action_values": [normal(ACTIONS) for _ in range(CRITICS)],
        "legal": legal,
    }


def loss_of(batch: dict[str, Any], options: IqlOptions = OPTIONS) -> IqlLoss:
    return iql_loss(**batch, options=options)


def literal(batch: dict[str, Any], options: IqlOptions) -> dict[str, float]:
    """Every number of the loss, step by step, as the module's docstring has it."""
    plain = {
        name: [t.tolist() for t in value] if isinstance(value, list) else value.tolist()
        for name, value in batch.items()
    }
    length, lanes = batch["values"].shape
    names = "value_loss q_loss policy_loss conservative_loss mean_advantage mean_policy_weight".split()
    sums = dict.fromkeys([*names, "weight_clip_fraction", "mean_q", "mean_value"], 0.0)
    total = 0.0
    for t in range(length):
        for b in range(lanes):
            w, value = plain["weights"][t][b], plain["values"][t][b]
            u = min(q[t][b] for q in plain["target_q_values"]) - value
            target = plain["rewards"][t][b] + plain["discounts"][t][b] * plain["next_values"][t][b]
            weight = min(options.weight_max, math.exp(options.beta * u))
            sums["value_loss"] += w * (1 - options.expectile if u < 0 else options.expectile) * u * u
            sums["policy_loss"] -= w * weight * plain["log_probs"][t][b]
            sums["mean_advantage"] += w * u
            sums["mean_policy_weight"] += w * weight
            sums["weight_clip_fraction"] += w * (math.exp(options.beta * u) > options.weight_max)
            sums["mean_value"] += w * value
            for q, every in zip(plain["q_values"], plain["action_values"], strict=True):
                sums["q_loss"] += w * (target - q[t][b]) ** 2 / CRITICS
                sums["mean_q"] += w * q[t][b] / CRITICS
                open_to = [
                    x for x, is_legal in zip(every[t][b], plain["legal"][t][b], strict=True) if is_legal
                ]
                soft_maximum = math.log(sum(math.exp(x) for x in open_to))
                sums["conservative_loss"] += w * (soft_maximum - q[t][b]) / CRITICS
            total += w
    found = {name: x / total if total else 0.0 for name, x in sums.items()}
    parts = ("value_loss", "q_loss", "policy_loss")
    found["total"] = sum(found[name] for name in parts) + options.cql_alpha * found["conservative_loss"]
    return found


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from((0.5, 0.7, 0.95)),
    st.sampled_from((0.0, 1.0, 10.0)),
    st.sampled_from((1, 4)),
)
def test_every_number_equals_its_formula(seed: int, expectile: float, beta: float, length: int) -> None:
    batch, options = random_batch(seed, length=length), replace(OPTIONS, expectile=expectile, beta=beta)
    found = {name: float(value) for name, value in loss_of(batch, options).statistics().items()}
    assert found == pytest.approx(literal(batch, options), rel=1e-6, abs=1e-7)


def test_continuous_actions_need_no_values_of_all_actions() -> None:
    batch = random_batch(1)
    plain = {name: value for name, value in batch.items() if name not in {"action_values", "legal"}}
    found = loss_of(plain, replace(OPTIONS, cql_alpha=0.0))
    assert found.conservative_loss == 0
    assert torch.equal(found.q_loss, loss_of(batch).q_loss)
    everything = batch | {"legal": torch.ones_like(batch["legal"])}
    assert torch.equal(loss_of(batch | {"legal": None}).total, loss_of(everything).total)


def test_gradients_equal_finite_differences_and_reach_one_network_each() -> None:
    batch = random_batch(2)

    def rebuilt(log_probs: Tensor, values: Tensor, *rest: Tensor) -> dict[str, Any]:
        return batch | {
            "log_probs": log_probs,
            "values": values,
            "q_values": rest[:CRITICS],
            "action_values": rest[CRITICS:],
        }

    leaves = [
        leaf.clone().requires_grad_()
        for leaf in (batch["log_probs"], batch["values"], *batch["q_values"], *batch["action_values"])
    ]

    def held(values: Tensor) -> Tensor:
        """The policy's weights depend on V, but no gradient flows there."""
        return loss_of(batch | {"values": values}).value_loss

    assert torch.autograd.gradcheck(held, [leaves[1]])
    assert torch.autograd.gradcheck(
        lambda policy, *critics: loss_of(rebuilt(policy, batch["values"], *critics)).total,
        [leaves[0], *leaves[2:]],
    )
    live = loss_of(rebuilt(*leaves))
    (whole,) = torch.autograd.grad(live.total, [leaves[1]], retain_graph=True)
    (alone,) = torch.autograd.grad(live.value_loss, [leaves[1]], retain_graph=True)
    assert torch.equal(whole, alone)
    for part, reached in (("value_loss", {1}), ("policy_loss", {0}), ("q_loss", {2, 3})):
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            getattr(live, part), leaves, retain_graph=True, allow_unused=True
        )
        assert {i for i, gradient in enumerate(gradients) if gradient is not None} == reached


def test_no_gradient_flows_to_targets() -> None:
    batch = random_batch(3)
    fixed = [batch["next_values"], batch["rewards"], *batch["target_q_values"]]
    for tensor in (*fixed, batch["values"], batch["log_probs"]):
        tensor.requires_grad_()
    loss = loss_of(batch)
    loss.total.backward()
    assert all(tensor.grad is None for tensor in fixed)
    assert not any(value.requires_grad for value in loss.statistics().values())


def test_no_temperature_is_behaviour_cloning_and_the_middle_expectile_the_mean() -> None:
    batch = random_batch(4)
    found = loss_of(batch, replace(OPTIONS, beta=0.0, expectile=0.5))
    w = batch["weights"]
    assert float(found.policy_loss) == pytest.approx(float(-(w * batch["log_probs"]).sum() / w.sum()))
    errors = torch.stack(batch["target_q_values"]).amin(0) - batch["values"]
    assert float(found.value_loss) == pytest.approx(float(0.5 * (w * errors**2).sum() / w.sum()))


@settings(max_examples=15)
@given(st.floats(0.05, 0.95))
def test_the_expectile_loss_is_least_at_the_expectile(expectile: float) -> None:
    """tau E[(q - v)+] = (1 - tau) E[(v - q)+] there (Newey and Powell, 1987)."""
    q = torch.randn(200, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(expectile_loss(q - v, expectile).mean(), v)
        v = (v - 0.4 * gradient).detach().requires_grad_()
    found = v.detach()
    above, below = (q - found).clamp(min=0).mean(), (found - q).clamp(min=0).mean()
    assert float(expectile * above) == pytest.approx(float((1 - expectile) * below), abs=1e-6)


def test_huge_advantages_have_the_greatest_weight_and_stay_finite() -> None:
    batch = random_batch(6)
    for name, value in batch.items():
        if name != "legal":
            batch[name] = [q.float() for q in value] if isinstance(value, list) else value.float()
    batch["values"] -= 1e4
    found = loss_of(batch)
    assert found.mean_policy_weight == pytest.approx(4.0)
    assert found.weight_clip_fraction == pytest.approx(1.0)
    assert all(value.isfinite() for value in found.statistics().values())


def test_what_lies_behind_an_end_has_no_part() -> None:
    batch = random_batch(7)
    before = loss_of(batch)
    batch["next_values"] = batch["next_values"].masked_fill(batch["discounts"] == 0, math.inf)
    assert torch.equal(loss_of(batch).total, before.total)


def test_weights_of_zero_everywhere_give_zero() -> None:
    batch = random_batch(8)
    batch["weights"].zero_()
    assert not any(bool(value) for value in loss_of(batch).statistics().values())


@pytest.mark.parametrize("name", "values next_values rewards discounts weights".split())
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    batch = random_batch(9)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        loss_of(batch | {name: batch[name][:, :1]})


@pytest.mark.parametrize("name", ["q_values", "target_q_values", "action_values"])
def test_a_wrong_shape_of_a_critic_is_refused_by_name(name: str) -> None:
    batch = random_batch(10)
    with pytest.raises(ValueError, match=rf"^{name}\[1\] must be"):
        loss_of(batch | {name: [batch[name][0], batch[name][1][:, :1]]})


def test_critics_and_legal_actions_must_agree() -> None:
    batch = random_batch(11)
    for name in ("q_values", "target_q_values"):
        with pytest.raises(ValueError, match="at least one critic"):
            loss_of(batch | {name: []})
    with pytest.raises(ValueError, match="of the 2 critics, not of 1"):
        loss_of(batch | {"action_values": batch["action_values"][:1]})
    with pytest.raises(ValueError, match="needs action_values"):
        loss_of(batch | {"action_values": []})
    with pytest.raises(ValueError, match="^legal must be"):
        loss_of(batch | {"legal": batch["legal"][..., :2]})


@given(st.floats(0, 1), st.integers(1, 50))
def test_slow_copies_follow_exponentially(rate: float, updates: int) -> None:
    start, source = torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor([2.0, 5.0]).double()
    copies = [start]
    for _ in range(updates):
        copies = soft_update(copies, [source], rate)
    expected = source + (1 - rate) ** updates * (start - source)
    assert torch.allclose(copies[0], expected, rtol=0, atol=1e-12)
    assert start.tolist() == [1.0, -3.0]


def test_slow_copies_at_rate_one_are_exact_and_without_gradient() -> None:
    sources = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    copies = soft_update([torch.randn(3, 2), torch.randn(4)], sources, 1.0)
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
    assert not any(copy.requires_grad for copy in copies)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be in"):
        soft_update([], [], rate)


@pytest.mark.parametrize("sources", [[], [torch.zeros(3)], [torch.zeros(2), torch.zeros(2)]])
def test_other_parameters_are_refused(sources: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="same parameters"):
        soft_update([torch.zeros(2)], sources, 0.5)
