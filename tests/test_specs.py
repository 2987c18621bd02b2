"""Specs of observations and actions: what they say, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import ContractError
from esper_simic.specs import Choices, Continuous, VectorSpec, action_bounds, check_shapes

TWO = Choices(("left", "right"), (2, 3))


def test_an_action_of_choices_has_one_index_and_one_uniform_a_head() -> None:
    assert (TWO.shape, TWO.dtype, TWO.chance) == ((2,), "int64", 2)
    bounds = action_bounds(TWO)
    assert bounds is not None
    assert bounds.tolist() == [2, 3]


def test_an_action_of_numbers_has_one_number_and_one_uniform_a_dimension() -> None:
    action = Continuous((-1.0, -2.0, 0.0), (1.0, 2.0, math.inf))
    assert (action.shape, action.dtype, action.chance) == ((3,), "float32", 3)
    assert not action.is_bounded
    assert Continuous((-1.0,), (1.0,)).is_bounded
    assert action_bounds(action) is None


@pytest.mark.parametrize(("heads", "sizes"), [((), ()), (("a",), ()), (("a", "b"), (2, 0))])
def test_a_head_without_choices_is_refused(heads: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one choice"):
        Choices(heads, sizes)


@pytest.mark.parametrize(("low", "high"), [((), ()), ((0.0,), ())])
def test_a_dimension_without_ends_is_refused(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="low and a high end"):
        Continuous(low, high)


def test_a_plain_vector_has_no_indices_and_nothing_to_check() -> None:
    spec = VectorSpec(4, TWO)
    assert spec.shapes() == {"vector": ((4,), "float32")}
    seen = {"vector": torch.zeros(3, 4)}
    spec.check(seen)
    assert (spec.bounds(), spec.present(seen)) == ({}, {})


def test_numbers_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="only choices can be masked"):
        VectorSpec(4, Continuous((0.0,), (1.0,)), masked=True)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_mask_must_leave_every_head_a_choice(rows: list[list[bool]]) -> None:
    spec = VectorSpec(4, TWO, masked=True)
    assert spec.shapes()["action_mask"] == ((5,), "int8")
    assert int(spec.bounds()["action_mask"]) == 2
    seen = {"vector": torch.zeros(len(rows), 4), "action_mask": torch.tensor(rows, dtype=torch.int8)}
    left = all(any(row[:2]) for row in rows)
    if left and all(any(row[2:]) for row in rows):
        spec.check(seen)
    else:
        with pytest.raises(ContractError, match=f"no legal choice of {'right' if left else 'left'}$"):
            spec.check(seen)


def test_shapes_are_checked_with_their_leading_dimensions() -> None:
    shapes = VectorSpec(4, TWO).shapes()
    check_shapes(shapes, {"vector": torch.zeros(2, 3, 4), "other": torch.zeros(1)}, (2, 3))
    with pytest.raises(ValueError, match=r"^observations\.vector must be \[3, 4\], it is \[3, 5\]$"):
        check_shapes(shapes, {"vector": torch.zeros(3, 5)}, (3,))
    with pytest.raises(ValueError, match="^observations lack vector$"):
        check_shapes(shapes, {}, (3,))


def test_bounds_hold_for_every_index() -> None:
    bounds = action_bounds(Choices(("only",), (7,)))
    assert bounds is not None
    assert (np.arange(7)[:, None] < bounds).all()
