"""Entropy floors: the penalty written out, its gradient, its schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.entropy_floor import EntropyFloor, entropy_floor_penalty, entropy_floor_scale

FLOORS = {"op": EntropyFloor(0.6, 0.3), "slot": EntropyFloor(0.5, 0.1), "absent": EntropyFloor(1.0, 9.0)}


def random_arguments(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(5, 3, generator=generator, dtype=torch.float64)

    return {
        "entropies": {"op": uniform(), "slot": uniform()},
        "available": {"op": uniform() < 0.7, "slot": uniform() < 0.5},
        "weights": (uniform() < 0.8).double(),
    }


@given(st.integers(0, 2**31), st.floats(0, 2))
def test_the_penalty_is_its_formula(seed: int, scale: float) -> None:
    arguments = random_arguments(seed)
    expected = 0.0
    for head, floor in FLOORS.items():
        if head == "absent":
            continue
        rows = zip(
            arguments["entropies"][head].flatten().tolist(),
            arguments["available"][head].flatten().tolist(),
            arguments["weights"].flatten().tolist(),
            strict=True,
        )
        counted = [(entropy, weight) for entropy, available, weight in rows if available and weight]
        if counted:
            mean = sum(e * w for e, w in counted) / sum(w for _, w in counted)
            expected += scale * floor.coefficient * max(0.0, floor.level - mean) ** 2
    assert float(entropy_floor_penalty(**arguments, floors=FLOORS, scale=scale)) == pytest.approx(
        expected, abs=1e-9
    )


def test_its_gradient_opens_what_is_closed_and_leaves_what_is_open() -> None:
    arguments = random_arguments(1)
    closed, opened = arguments["entropies"]["op"] * 0.2, arguments["entropies"]["slot"] * 0.1 + 0.9

    def penalty(op: Tensor, slot: Tensor) -> Tensor:
        return entropy_floor_penalty(
            {"op": op, "slot": slot}, arguments["available"], arguments["weights"], FLOORS
        )

    leaves = [closed.requires_grad_(), opened.requires_grad_()]
    assert torch.autograd.gradcheck(penalty, leaves)
    op, slot = torch.autograd.grad(penalty(*leaves), leaves)
    counted = (arguments["available"]["op"] & (arguments["weights"] > 0)).bool()
    assert (op[counted] < 0).all()
    assert (op[~counted] == 0).all()
    assert (slot == 0).all()


def test_a_head_that_never_was_available_has_no_penalty() -> None:
    arguments = random_arguments(2)
    arguments["available"]["op"].zero_()
    arguments["entropies"]["op"].requires_grad_()
    only_op = {"op": FLOORS["op"]}
    penalty = entropy_floor_penalty(**arguments, floors=only_op)
    penalty.backward()
    assert penalty == 0
    assert not arguments["entropies"]["op"].grad.any()
    assert entropy_floor_penalty(**arguments, floors={}) == 0


def test_floors_count_more_at_first_and_half_at_the_end() -> None:
    found = [entropy_floor_scale(p) for p in (0.0, 0.24, 0.25, 0.5, 0.75, 0.875, 1.0)]
    assert found == [1.5, 1.5, 1.0, 1.0, 1.0, 0.75, 0.5]
    for outside in (-0.01, 1.01):
        with pytest.raises(ValueError, match="progress"):
            entropy_floor_scale(outside)


def test_wrong_shapes_are_refused_by_name() -> None:
    arguments = random_arguments(3)
    short = {head: tensor[:2] for head, tensor in arguments["entropies"].items()}
    with pytest.raises(ValueError, match="^entropies of op must be"):
        entropy_floor_penalty(**arguments | {"entropies": short}, floors=FLOORS)
    short = {head: tensor[:2] for head, tensor in arguments["available"].items()}
    with pytest.raises(ValueError, match="^availability of op must be"):
        entropy_floor_penalty(**arguments | {"available": short}, floors=FLOORS)
