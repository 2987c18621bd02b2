"""TD(0) against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.algorithms.gae import gae
from esper_simic.algorithms.temporal_difference import td_targets


def random_arguments(length: int, lanes: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    arrays = {
        "discounts": np.where(rng.random((length, lanes)) < 0.25, 0.0, 0.97),
        "rewards": rng.normal(size=(length, lanes)),
        "values": rng.normal(size=(length, lanes)),
        "bootstrap_value": rng.normal(size=lanes),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize(("length", "lanes"), [(1, 1), (1, 3), (6, 1), (9, 4)])
def test_each_target_looks_one_step_ahead(length: int, lanes: int) -> None:
    arguments = random_arguments(length, lanes, seed=length)
    found = td_targets(**arguments)
    plain = {name: tensor.tolist() for name, tensor in arguments.items()}
    values = [*plain["values"], plain["bootstrap_value"]]
    for t in range(length):
        for lane in range(lanes):
            target = plain["rewards"][t][lane] + plain["discounts"][t][lane] * values[t + 1][lane]
            assert float(found.vs[t, lane]) == pytest.approx(target, abs=1e-15)
            assert float(found.pg_advantages[t, lane]) == pytest.approx(target - values[t][lane], abs=1e-15)


def test_it_is_generalised_advantage_estimation_without_memory() -> None:
    arguments = random_arguments(9, 4, seed=1)
    estimated, found = gae(**arguments, lambda_=0.0), td_targets(**arguments)
    assert torch.allclose(found.pg_advantages, estimated.advantages, rtol=0, atol=1e-14)


def test_infinite_values_do_not_cross_an_episode_end_and_no_gradient_flows() -> None:
    arguments = random_arguments(5, 2, seed=2)
    arguments["discounts"][2] = 0.0
    arguments["values"][3] = math.inf
    arguments["rewards"].requires_grad_()
    found = td_targets(**arguments)
    assert found.vs[2].isfinite().all()
    assert not found.vs.requires_grad
    assert not found.pg_advantages.requires_grad


@pytest.mark.parametrize("name", ["rewards", "values", "bootstrap_value"])
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    arguments = random_arguments(5, 2, seed=3)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        td_targets(**arguments | {name: arguments[name][..., :1]})
