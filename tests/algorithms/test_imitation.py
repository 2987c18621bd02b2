"""Behaviour cloning: the likelihood written out, its gradient, what is irrelevant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.imitation import ImitationHead, imitation_loss


def random_batch(seed: int, *, length: int = 5, lanes: int = 3) -> tuple[dict[str, ImitationHead], Tensor]:
    rng = np.random.default_rng(seed)
    shape = (length, lanes)
    heads = {
        name: ImitationHead(
            torch.from_numpy(-rng.exponential(size=shape)),
            torch.from_numpy(rng.random(shape)),
            torch.from_numpy(rng.random(shape) < share),
            torch.from_numpy(rng.random(shape) < 0.5) if name != "slot" else None,
        )
        for name, share in (("op", 1.1), ("slot", 0.5), ("tempo", 0.3))
    }
    return heads, torch.from_numpy(rng.random(shape) * (rng.random(shape) < 0.7))


def mean(terms: list[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in terms)
    return sum(value * weight for value, weight in terms) / total if total else 0.0


@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 5)), st.sampled_from((1, 3)))
def test_every_number_equals_its_formula(seed: int, length: int, lanes: int) -> None:
    heads, weights = random_batch(seed, length=length, lanes=lanes)
    nll, entropies, expected = [], [], {}
    per_head: dict[str, list[tuple[int, int]]] = {name: [] for name in heads}
    for t in range(length):
        for b in range(lanes):
            relevant = {name: head for name, head in heads.items() if head.relevance[t, b]}
            w = float(weights[t, b])
            nll.append((-sum(float(head.log_probs[t, b]) for head in relevant.values()), w))
            entropies.append((sum(float(head.entropies[t, b]) for head in relevant.values()), w))
            for name in relevant:
                per_head[name].append((t, b))
    for name, head in heads.items():
        at = per_head[name]
        expected[f"head_nll.{name}"] = mean([(-float(head.log_probs[i]), float(weights[i])) for i in at])
        if head.hits is not None:
            hits = [(float(head.hits[i]), float(weights[i])) for i in at]
            expected[f"head_accuracy.{name}"] = mean(hits)
    expected |= {"total": mean(nll), "entropy": mean(entropies)}
    found = {name: float(value) for name, value in imitation_loss(heads, weights).statistics().items()}
    assert found == pytest.approx(expected, abs=1e-6)


def test_gradients_equal_finite_differences_and_entropy_has_none() -> None:
    heads, weights = random_batch(1)

    def total(*log_probs: Tensor) -> Tensor:
        moved = {
            name: head._replace(log_probs=x, entropies=head.entropies.clone().requires_grad_())
            for (name, head), x in zip(heads.items(), log_probs, strict=True)
        }
        found = imitation_loss(moved, weights)
        assert not found.entropy.requires_grad
        return found.total

    assert torch.autograd.gradcheck(
        total, [head.log_probs.clone().requires_grad_() for head in heads.values()]
    )


def test_an_irrelevant_choice_has_no_part_even_at_probability_zero() -> None:
    heads, weights = random_batch(2)
    slot = heads["slot"]
    hidden = torch.where(slot.relevance, slot.log_probs, -math.inf).requires_grad_()
    found = imitation_loss(heads | {"slot": slot._replace(log_probs=hidden)}, weights)
    found.total.backward()
    assert torch.equal(found.total, imitation_loss(heads, weights).total)
    assert hidden.grad is not None
    assert (hidden.grad[~slot.relevance] == 0).all()
    assert hidden.grad.isfinite().all()


def test_weights_of_zero_everywhere_give_zero() -> None:
    heads, weights = random_batch(3)
    found = imitation_loss(heads, torch.zeros_like(weights))
    assert not any(bool(value) for value in found.statistics().values())


def test_no_heads_and_wrong_shapes_are_refused_by_name() -> None:
    heads, weights = random_batch(4)
    with pytest.raises(ValueError, match="at least one head"):
        imitation_loss({}, weights)
    with pytest.raises(ValueError, match="^weights must be"):
        imitation_loss(heads, weights[0])
    for part in ImitationHead._fields:
        tensor = getattr(heads["op"], part)
        with pytest.raises(ValueError, match=f"^{part} of op must be"):
            imitation_loss(heads | {"op": heads["op"]._replace(**{part: tensor[:1]})}, weights)
