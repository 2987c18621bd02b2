"""Weighted means and explained variance against plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.algorithms.weighted import explained_variance, weighted_mean

PAIRS = st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 3)), min_size=1, max_size=20)


@given(PAIRS, st.floats(0.5, 100))
def test_the_mean_is_that_of_the_weights_whatever_their_size(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    x = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    w = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
    truth = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    assert float(weighted_mean(x, w)) == pytest.approx(truth, abs=1e-12)
    assert float(weighted_mean(x, factor * w)) == pytest.approx(truth, abs=1e-12)


def test_without_any_weight_the_mean_and_its_gradient_are_zero() -> None:
    x = torch.ones(3, requires_grad=True)
    mean = weighted_mean(x, torch.zeros(3))
    mean.backward()
    assert mean == 0
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0]


def test_explained_variance_is_one_minus_the_share_that_is_left() -> None:
    targets, values = [1.0, 4.0, -2.0, 0.5], [0.0, 3.0, -2.5, 1.0]
    left = statistics.pvariance([t - v for t, v in zip(targets, values, strict=True)])
    found = explained_variance(torch.tensor([targets]), torch.tensor([values]))
    assert float(found) == pytest.approx(1 - left / statistics.pvariance(targets), rel=1e-6)
    assert float(explained_variance(torch.tensor([targets]), torch.tensor([targets]))) == 1
    assert float(explained_variance(torch.tensor([[2.0]]), torch.tensor([[5.0]]))) == 1
