"""The IMPALA loss: every term written out, its gradients by finite differences, its weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.algorithms.impala import ImpalaLoss, impala_loss
from esper_simic.algorithms.temporal_difference import td_targets
from esper_simic.algorithms.vtrace import vtrace

LENGTH, LANES = 6, 4
OPTIONS: dict[str, Any] = {
    "clip_rho": 1.2,
    "clip_c": 0.9,
    "clip_pg_rho": 0.7,
    "lambda_": 0.95,
    "value_coefficient": 0.5,
    "entropy_coefficient": 0.02,
}


def random_batch(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    shape = (LENGTH, LANES)
    arrays = {
        "log_probs": -rng.exponential(size=shape),
        "behaviour_log_probs": -rng.exponential(size=shape),
        "values": rng.normal(size=shape),
        "bootstrap_value": rng.normal(size=LANES),
        "rewards": rng.normal(size=shape),
        "discounts": np.where(rng.random(shape) < 0.2, 0.0, 0.97),
        "entropies": rng.random(shape),
        "policy_weights": (rng.random(shape) < 0.7).astype(np.float64),
        "value_weights": rng.choice([0.2, 1.0], size=shape),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def loss_of(batch: dict[str, Tensor], **options: Any) -> ImpalaLoss:
    arguments: dict[str, Any] = batch | OPTIONS | options
    return impala_loss(**arguments)


def targets_of(
    batch: dict[str, Tensor], targets: str = "vtrace"
) -> tuple[list[list[float]], list[list[float]]]:
    """Targets and advantages; `test_vtrace` and `test_temporal_difference` prove them."""
    if targets == "td":
        names = ("discounts", "rewards", "values", "bootstrap_value")
        one_step = td_targets(*(batch[name] for name in names))
        return one_step.vs.tolist(), one_step.pg_advantages.tolist()
    found = vtrace(
        batch["log_probs"] - batch["behaviour_log_probs"],
        batch["discounts"],
        batch["rewards"],
        batch["values"],
        batch["bootstrap_value"],
        clip_rho=OPTIONS["clip_rho"],
        clip_c=OPTIONS["clip_c"],
        clip_pg_rho=OPTIONS["clip_pg_rho"],
        lambda_=OPTIONS["lambda_"],
    )
    return found.vs.tolist(), found.pg_advantages.tolist()


def weighted_mean(terms: list[float], weights: list[float]) -> float:
    return sum(w * x for w, x in zip(weights, terms, strict=True)) / sum(weights)


def variance(terms: list[float]) -> float:
    mean = sum(terms) / len(terms)
    return sum((x - mean) ** 2 for x in terms) / len(terms)


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


@pytest.mark.parametrize("targets", ["vtrace", "td"])
@pytest.mark.parametrize("seed", range(5))
def test_every_term_equals_its_formula(seed: int, targets: str) -> None:
    batch = random_batch(seed)
    found = {name: float(value) for name, value in loss_of(batch, targets=targets).statistics().items()}
    vs, advantages = (flat(rows) for rows in targets_of(batch, targets))
    log_probs, behaviour, values, entropies, w, u = (
        flat(batch[name].tolist())
        for name in (
            "log_probs",
            "behaviour_log_probs",
            "values",
            "entropies",
            "policy_weights",
            "value_weights",
        )
    )
    log_ratios = [new - old for new, old in zip(log_probs, behaviour, strict=True)]
    ratios = [math.exp(x) for x in log_ratios]
    errors = [v - x for v, x in zip(vs, values, strict=True)]
    expected = {
        "policy_loss": -weighted_mean([a * p for a, p in zip(advantages, log_probs, strict=True)], w),
        "value_loss": weighted_mean([e * e / 2 for e in errors], u),
        "entropy": weighted_mean(entropies, w),
        "mean_rho": weighted_mean(ratios, w),
        "clip_fraction": weighted_mean([float(r > 1.2) for r in ratios], w),
        "approx_kl": weighted_mean([r - 1 - x for r, x in zip(ratios, log_ratios, strict=True)], w),
        "explained_variance": 1 - variance(errors) / variance(vs),
        "mean_advantage": weighted_mean(advantages, w),
        "mean_value": sum(values) / len(values),
    }
    expected["total"] = expected["policy_loss"] + 0.5 * expected["value_loss"] - 0.02 * expected["entropy"]
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("targets", ["vtrace", "td"])
def test_gradients_equal_finite_differences_with_targets_held_fixed(targets: str) -> None:
    batch = random_batch(10)
    vs, advantages = (torch.tensor(rows, dtype=torch.float64) for rows in targets_of(batch, targets))
    w, u = batch["policy_weights"], batch["value_weights"]

    def with_fixed_targets(log_probs: Tensor, values: Tensor, entropies: Tensor) -> Tensor:
        policy = -(w * advantages * log_probs).sum() / w.sum()
        value = (u * (vs - values) ** 2 / 2).sum() / u.sum()
        return policy + 0.5 * value - 0.02 * (w * entropies).sum() / w.sum()

    names = ("log_probs", "values", "entropies")
    leaves = [batch[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(with_fixed_targets, leaves)
    fixed = torch.autograd.grad(with_fixed_targets(*leaves), leaves)
    moved = batch | dict(zip(names, leaves, strict=True))
    live = torch.autograd.grad(loss_of(moved, targets=targets).total, leaves)
    for name, one, other in zip(names, fixed, live, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12), name


def test_no_gradient_flows_through_targets() -> None:
    batch = random_batch(11)
    for name in ("bootstrap_value", "rewards", "behaviour_log_probs"):
        batch[name].requires_grad_()
    batch["log_probs"].requires_grad_()
    loss = loss_of(batch)
    loss.total.backward()
    for name in ("bootstrap_value", "rewards", "behaviour_log_probs"):
        assert batch[name].grad is None, name
    assert not any(value.requires_grad for value in loss.statistics().values())


def test_a_step_of_weight_zero_has_no_part_in_the_loss() -> None:
    batch = random_batch(12)
    batch["discounts"].zero_()  # each step is an episode, so that targets of others do not see this one
    batch["policy_weights"][3, 2] = batch["value_weights"][3, 2] = 0
    before = loss_of(batch).total
    for name in ("log_probs", "values", "entropies", "rewards"):
        batch[name][3, 2] -= 1.7
        batch[name].requires_grad_(name != "rewards")
    after = loss_of(batch).total
    assert torch.equal(before, after)
    after.backward()
    for name in ("log_probs", "values", "entropies"):
        gradient = batch[name].grad
        assert gradient is not None
        assert gradient[3, 2] == 0, name
        assert gradient[3, 1] != 0 or batch["policy_weights"][3, 1] == 0, name


def test_weights_of_zero_everywhere_give_zero_and_finite_gradients() -> None:
    batch = random_batch(13)
    batch["policy_weights"].zero_()
    batch["value_weights"].zero_()
    for name in ("log_probs", "values", "entropies"):
        batch[name].requires_grad_()
    loss = loss_of(batch)
    loss.total.backward()
    assert loss.total == 0
    for name in ("log_probs", "values", "entropies"):
        gradient = batch[name].grad
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros(LENGTH, LANES, dtype=torch.float64)), name


def test_the_size_of_the_loss_does_not_depend_on_the_size_of_the_batch() -> None:
    batch = random_batch(14)
    doubled = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in batch.items()}
    assert float(loss_of(doubled).total) == pytest.approx(float(loss_of(batch).total), abs=1e-12)


def test_on_policy_nothing_is_clipped_and_nothing_diverges() -> None:
    batch = random_batch(15)
    batch["behaviour_log_probs"] = batch["log_probs"].clone()
    loss = loss_of(batch)
    assert [float(part) for part in (loss.mean_rho, loss.clip_fraction, loss.approx_kl)] == [1, 0, 0]


def test_without_a_clip_nothing_counts_as_clipped() -> None:
    loss = loss_of(random_batch(16), clip_rho=None, clip_c=None)
    assert loss.clip_fraction == 0


def test_perfect_values_explain_everything() -> None:
    batch = random_batch(17)
    batch["discounts"].zero_()
    batch["values"] = batch["rewards"].clone()
    loss = loss_of(batch)
    assert float(loss.explained_variance) == pytest.approx(1.0)
    assert loss.value_loss == 0


def test_log_ratios_beyond_any_number_keep_the_loss_finite() -> None:
    batch = random_batch(18)
    batch["log_probs"][0] = -1e4
    batch["behaviour_log_probs"][1] = -1e4
    assert all(value.isfinite() for value in loss_of(batch, clip_rho=1.0).statistics().values())


def test_one_step_targets_know_no_importance_weight() -> None:
    batch = random_batch(20)
    wild = batch | {"behaviour_log_probs": batch["behaviour_log_probs"] - 30}
    options: dict[str, Any] = {"targets": "td", "clip_rho": None, "clip_c": None, "clip_pg_rho": None}
    assert torch.equal(loss_of(batch, **options).total, loss_of(wild, **options).total)
    assert loss_of(batch, **options | {"targets": "vtrace"}).total != loss_of(batch, **options).total


def test_the_clip_of_the_advantage_is_its_own() -> None:
    batch = random_batch(21)
    loose, tight = loss_of(batch, clip_pg_rho=None), loss_of(batch, clip_pg_rho=0.01)
    assert torch.equal(loose.value_loss, tight.value_loss)
    assert tight.policy_loss.abs() < 0.1 * loose.policy_loss.abs()
    one = loss_of(batch, clip_pg_rho=1.0).policy_loss
    arguments: dict[str, Any] = batch | {key: OPTIONS[key] for key in OPTIONS if key != "clip_pg_rho"}
    assert torch.equal(impala_loss(**arguments).policy_loss, one), "the default is 1, as of vtrace"


@pytest.mark.parametrize(("length", "lanes"), [(1, 1), (1, 4), (6, 1)])
@pytest.mark.parametrize("targets", ["vtrace", "td"])
def test_single_steps_and_single_lanes_have_finite_losses(length: int, lanes: int, targets: str) -> None:
    batch = {name: tensor[..., :lanes] for name, tensor in random_batch(22).items()}
    batch = {n: t if n == "bootstrap_value" else t[:length] for n, t in batch.items()}
    assert all(value.isfinite() for value in loss_of(batch, targets=targets).statistics().values())


@pytest.mark.parametrize("name", sorted(set(random_batch(0)) - {"log_probs"}))
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    batch = random_batch(19)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        loss_of(batch | {name: batch[name][..., :1]})
