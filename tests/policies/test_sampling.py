"""Inversion of distribution functions: literal walks, exact ends, SciPy's quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper_simic.policies.sampling import UNIFORM_MIN, invert_probabilities, normal_quantiles

LAST = math.nextafter(1.0, 0.0)
uniforms = st.one_of(st.floats(0, LAST), st.sampled_from((0.0, LAST, 0.5)))
weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e3)), min_size=1, max_size=9).filter(any)


@given(weights, uniforms, st.sampled_from((torch.float32, torch.float64)))
def test_a_choice_of_probability_zero_is_never_drawn(
    row: list[float], uniform: float, dtype: torch.dtype
) -> None:
    drawn = invert_probabilities(
        torch.tensor([row], dtype=dtype), torch.tensor([uniform], dtype=torch.float64)
    )
    assert 0 <= drawn.item() < len(row)
    assert row[int(drawn)] > 0


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any), st.data())
def test_it_is_the_choice_in_whose_interval_the_uniform_lies(row: list[int], data: st.DataObject) -> None:
    # Whole weights over a power of two: every step of the walk is exact.
    total = sum(row)
    numerator = data.draw(st.integers(0, 2**20 - 1))
    walked, expected = 0, -1
    for choice, weight in enumerate(row):
        walked += weight
        if numerator * total < walked * 2**20:
            expected = choice
            break
    found = invert_probabilities(
        torch.tensor([row], dtype=torch.float32), torch.tensor([numerator / 2**20], dtype=torch.float64)
    )
    assert found.item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_uniform_stays_below_the_total_whatever_it_is(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.random((20_000, 3))).to(dtype)
    rows[:, 2] = 0
    drawn = invert_probabilities(rows, torch.full((20_000,), LAST, dtype=torch.float64))
    assert (drawn == 1).all()


def test_normal_quantiles_are_those_of_scipy() -> None:
    uniform = np.concatenate([np.random.default_rng(1).random(2000), [2.0**-53, 0.5, LAST]])
    found = normal_quantiles(torch.from_numpy(uniform))
    assert found.numpy() == pytest.approx(stats.norm.ppf(uniform), rel=1e-9, abs=1e-12)


def test_the_quantile_of_zero_is_finite_and_below_all_others() -> None:
    low, above = normal_quantiles(torch.tensor([0.0, 2.0**-53], dtype=torch.float64)).tolist()
    assert low == pytest.approx(stats.norm.ppf(UNIFORM_MIN))
    assert -9 < low < above < -8
