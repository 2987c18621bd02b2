"""The affine recursion against plain Python, whichever way it is solved: bits, precision, ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms import recursion
from esper_simic.algorithms.recursion import (
    DOUBLING_LANES_MAX,
    LOOP_STEPS_MAX,
    affine_scan,
    next_values,
)

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chosen": affine_scan,
    "looped": recursion._looped,
    "looped_cutting_ends": recursion._looped_cutting_ends,
    "doubled": recursion._doubled,
    "doubled_cutting_ends": recursion._doubled_cutting_ends,
}
LENGTHS = (1, 2, 3, 7, 8, 9, LOOP_STEPS_MAX, LOOP_STEPS_MAX + 1, 31, 32, 33, 80)


def random_problem(length: int, lanes: int, seed: int, *, ends: float = 0.1) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    decays = np.where(rng.random((length, lanes)) < ends, 0.0, rng.random((length, lanes)) ** 0.1)
    return torch.from_numpy(decays), torch.from_numpy(rng.normal(size=(length, lanes)))


def literal(decays: Tensor, terms: Tensor) -> Tensor:
    """y_t = b_t + a_t y_{t+1}, one number after the other; nothing comes through a decay of 0."""
    a, b = decays.double().tolist(), terms.double().tolist()
    length, lanes = terms.shape
    sums = [[0.0] * lanes for _ in range(length)]
    for lane in range(lanes):
        following = 0.0
        for t in reversed(range(length)):
            following = b[t][lane] + (0.0 if a[t][lane] == 0 else a[t][lane] * following)
            sums[t][lane] = following
    return torch.tensor(sums, dtype=torch.float64).reshape(length, lanes)


@pytest.mark.parametrize("way", WAYS)
@given(length=st.sampled_from(LENGTHS), lanes=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_every_way_solves_the_recursion(way: str, length: int, lanes: int, seed: int) -> None:
    decays, terms = random_problem(length, lanes, seed)
    before = decays.clone(), terms.clone()
    assert torch.allclose(WAYS[way](decays, terms), literal(decays, terms), rtol=1e-13, atol=1e-13)
    assert torch.equal(decays, before[0]), "arguments are the caller's"
    assert torch.equal(terms, before[1]), "arguments are the caller's"


@pytest.mark.parametrize("length", [2, 10, LOOP_STEPS_MAX])
@pytest.mark.parametrize("lanes", [1, 32, 77])
def test_short_unrolls_have_the_bits_of_single_steps(length: int, lanes: int) -> None:
    """Journals written before there was doubling are replayed to the bit."""
    decays, terms = (tensor.float() for tensor in random_problem(length, lanes, seed=1))
    rows = list(terms.unbind(0))
    for t in range(length - 2, -1, -1):
        rows[t] = torch.addcmul(rows[t], decays[t], rows[t + 1])
    assert torch.equal(affine_scan(decays, terms), torch.stack(rows))


@pytest.mark.parametrize("length", [25, 80, 1000])
@pytest.mark.parametrize("ends", [0.0, 0.02])
def test_doubling_rounds_no_worse_than_the_loop(length: int, ends: float) -> None:
    """In float32, against the literal recursion in float64: within twice the loop's own largest error."""
    decays, terms = (tensor.float() for tensor in random_problem(length, 32, seed=2, ends=ends))
    truth = literal(decays, terms)
    errors = {name: float((WAYS[name](decays, terms).double() - truth).abs().max()) for name in WAYS}
    assert errors["looped"] > 0
    for name in ("doubled", "doubled_cutting_ends", "chosen"):
        assert errors[name] <= 2 * errors["looped"], errors


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [10, 60])
def test_nothing_crosses_an_end(way: str, length: int) -> None:
    decays, terms = random_problem(length, 2, seed=3, ends=0.0)
    decays[5, 1] = 0.0
    before = WAYS[way](decays, terms)
    terms[6:] += 1e6
    decays[6:] *= 0.5
    after = WAYS[way](decays, terms)
    assert torch.equal(before[:6, 1], after[:6, 1])
    assert not torch.equal(before[:6, 0], after[:6, 0])


@pytest.mark.parametrize("way", ["chosen", "looped_cutting_ends", "doubled_cutting_ends"])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("length", [9, 60])
def test_not_even_infinity_crosses_an_end(way: str, poison: float, length: int) -> None:
    decays, terms = random_problem(length, 3, seed=4, ends=0.0)
    decays[3, 1] = 0.0
    terms[6, 1] = poison
    found, truth = WAYS[way](decays, terms), literal(decays, terms)
    assert found[:4].isfinite().all()
    assert not found[4:7, 1].isfinite().any()
    assert torch.allclose(found, truth, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_sum_that_overflows_while_its_terms_do_not_changes_nothing() -> None:
    decays = torch.full((40, 3), 0.5)
    terms = torch.full((40, 3), 1e38)
    found = affine_scan(decays, terms)
    assert not found.sum().isfinite()
    assert torch.allclose(found.double(), literal(decays, terms), rtol=1e-6)


def test_products_that_overflow_are_not_formed_where_the_recursion_needs_none() -> None:
    decays, terms = torch.full((60, 2), 1e9), torch.zeros(60, 2)
    terms[0] = 1.0
    assert torch.equal(affine_scan(decays, terms), terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_without_numpy_are_solved_by_torch(dtype: torch.dtype) -> None:
    decays, terms = (tensor.to(dtype) for tensor in random_problem(40, 3, seed=5))
    found = affine_scan(decays, terms)
    assert found.dtype == dtype
    scale = float(literal(decays, terms).abs().max())
    assert float((found.double() - literal(decays, terms)).abs().max()) < 0.05 * scale


def test_wide_unrolls_are_looped_and_narrow_long_ones_doubled() -> None:
    decays, terms = (tensor.float() for tensor in random_problem(40, DOUBLING_LANES_MAX + 1, seed=6))
    assert torch.equal(affine_scan(decays, terms), recursion._looped(decays, terms))
    decays, terms = decays[:, 1:].contiguous(), terms[:, 1:].contiguous()
    assert torch.equal(affine_scan(decays, terms), recursion._doubled(decays, terms))


def test_views_of_any_stride_are_solved() -> None:
    decays, terms = random_problem(3, 50, seed=7)
    assert torch.allclose(affine_scan(decays.t(), terms.t()), literal(decays.t(), terms.t()), rtol=1e-13)


def test_no_gradient_flows_and_no_lanes_are_no_problem() -> None:
    decays, terms = (tensor.requires_grad_() for tensor in random_problem(30, 2, seed=8))
    assert not affine_scan(decays, terms).requires_grad
    assert affine_scan(torch.zeros(30, 0), torch.zeros(30, 0)).shape == (30, 0)


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^decays must be"):
        affine_scan(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="^terms must be"):
        affine_scan(torch.zeros(4), torch.zeros(4))


def test_next_values_are_the_following_rows_and_nothing_behind_an_end() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.inf], [5.0, 6.0]])
    discounts = torch.tensor([[0.9, 0.0], [0.9, 0.9], [0.0, 0.9]])
    found = next_values(values, torch.tensor([7.0, 8.0]), discounts)
    assert found.tolist() == [[3.0, 0.0], [5.0, 6.0], [0.0, 8.0]]
