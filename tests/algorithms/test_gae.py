"""Generalised advantages against the literal double sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.gae import gae

NAMES = ("rewards", "discounts", "values", "bootstrap_value")


def random_arguments(length: int, lanes: int, seed: int, *, ends: float = 0.25) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    arrays = {
        "rewards": rng.normal(size=(length, lanes)),
        "discounts": np.where(rng.random((length, lanes)) < ends, 0.0, 0.97),
        "values": rng.normal(size=(length, lanes)),
        "bootstrap_value": rng.normal(size=lanes),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def literal(arguments: dict[str, Tensor], lambda_: float) -> list[list[float]]:
    """Equation 16 of Schulman et al. (2016): A_t = sum_l (gamma lambda)^l delta_{t+l}, one discount a step."""
    rewards, discounts = arguments["rewards"].tolist(), arguments["discounts"].tolist()
    values = [*arguments["values"].tolist(), arguments["bootstrap_value"].tolist()]
    length, lanes = arguments["rewards"].shape
    advantages = [[0.0] * lanes for _ in range(length)]
    for lane in range(lanes):
        for t in range(length):
            for k in range(t, length):
                weight = 1.0
                for i in range(t, k):
                    weight *= discounts[i][lane] * lambda_
                delta = rewards[k][lane] + discounts[k][lane] * values[k + 1][lane] - values[k][lane]
                advantages[t][lane] += weight * delta
    return advantages


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.3, 0.95, 1.0))
)
def test_equals_the_double_sum(length: int, lanes: int, seed: int, lambda_: float) -> None:
    arguments = random_arguments(length, lanes, seed)
    found = gae(**arguments, lambda_=lambda_)
    assert found.advantages.numpy() == pytest.approx(np.array(literal(arguments, lambda_)), abs=1e-10)
    assert torch.equal(found.returns, found.advantages + arguments["values"])


def test_lambda_zero_is_the_temporal_difference() -> None:
    arguments = random_arguments(7, 3, seed=0)
    following = torch.cat([arguments["values"][1:], arguments["bootstrap_value"].unsqueeze(0)])
    expected = arguments["rewards"] + arguments["discounts"] * following - arguments["values"]
    assert torch.equal(gae(**arguments, lambda_=0.0).advantages, expected)


def test_lambda_one_is_the_monte_carlo_return_minus_the_value() -> None:
    arguments = random_arguments(7, 3, seed=1)
    found = gae(**arguments, lambda_=1.0)
    following = arguments["bootstrap_value"]
    for t in reversed(range(7)):
        following = arguments["rewards"][t] + arguments["discounts"][t] * following
        assert torch.allclose(found.returns[t], following, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rewards", "discounts", "values"])
def test_nothing_crosses_an_episode_end(name: str) -> None:
    arguments = random_arguments(10, 2, seed=2, ends=0.0)
    arguments["discounts"][4, 1] = 0.0
    before = gae(**arguments, lambda_=0.9).advantages
    arguments[name][5:] = arguments[name][5:] * 1.5 + 7
    arguments["bootstrap_value"] += 100
    after = gae(**arguments, lambda_=0.9).advantages
    assert torch.equal(before[:5, 1], after[:5, 1])
    assert not torch.equal(before[:5, 0], after[:5, 0])


def test_long_unrolls_equal_the_recursion() -> None:
    arguments = random_arguments(120, 3, seed=6, ends=0.05)
    found = gae(**arguments, lambda_=0.95)
    plain = {name: tensor.tolist() for name, tensor in arguments.items()}
    for lane in range(3):
        following, value_after = 0.0, plain["bootstrap_value"][lane]
        for t in reversed(range(120)):
            gamma, value = plain["discounts"][t][lane], plain["values"][t][lane]
            delta = plain["rewards"][t][lane] + gamma * value_after - value
            following, value_after = delta + gamma * 0.95 * following, value
            assert float(found.advantages[t, lane]) == pytest.approx(following, abs=1e-11)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("length", [12, 40])
def test_a_poisoned_episode_does_not_reach_the_one_before_it(poison: float, length: int) -> None:
    arguments = random_arguments(length, 2, seed=7, ends=0.0)
    arguments["discounts"][5] = 0.0
    clean = gae(**arguments, lambda_=0.9)
    arguments["values"][6:] = poison
    found = gae(**arguments, lambda_=0.9)
    assert torch.allclose(found.advantages[:6], clean.advantages[:6], rtol=1e-12, atol=1e-13)
    assert torch.allclose(found.returns[:6], clean.returns[:6], rtol=1e-12, atol=1e-13)


def test_no_gradient_flows() -> None:
    arguments = random_arguments(4, 2, seed=3)
    for tensor in arguments.values():
        tensor.requires_grad_()
    found = gae(**arguments, lambda_=0.9)
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_wrong_shape_or_dtype_is_refused_by_name(name: str) -> None:
    arguments = random_arguments(4, 3, seed=4)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        gae(**arguments | {name: arguments[name][..., :1]}, lambda_=0.9)
    with pytest.raises(ValueError, match=f"^{name} must be .*float64 like rewards, it is .*float32"):
        gae(**arguments | {name: arguments[name].float()}, lambda_=0.9)


@pytest.mark.parametrize("rewards", [torch.zeros(4), torch.zeros(0, 3), torch.zeros(4, 3, dtype=torch.int64)])
def test_wrong_rewards_are_refused_by_name(rewards: Tensor) -> None:
    arguments = random_arguments(4, 3, seed=5)
    with pytest.raises(ValueError, match=r"^rewards must be \[T, B\] floating point"):
        gae(**arguments | {"rewards": rewards}, lambda_=0.9)
