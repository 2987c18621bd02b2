"""One way from a loss to a step: clipped, all or nothing, at the rates of one controller."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esper_simic.learning_rates import GroupConfig, LRPolicy
from esper_simic.updates.optimisers import ADAM_EPSILON, Group, Optimisers
from tests.updates.ground import copied

RATES = {"first": 0.01, "second": 0.001}


def make() -> tuple[Optimisers, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    groups = {
        name: Group([parameter], GroupConfig(LRPolicy.POLICY_NETWORK, rate, 0, 1e-6))
        for (name, rate), parameter in zip(RATES.items(), parameters, strict=True)
    }
    return Optimisers(groups, {"fused": True}), parameters


def loss_of(parameters: list[nn.Parameter], factor: float = 1.0) -> torch.Tensor:
    return factor * (parameters[0].square().sum() + 2 * parameters[1].sum())


def test_a_step_is_adams_on_the_gradient_clipped_over_all_groups() -> None:
    optimisers, parameters = make()
    gradients = [torch.tensor([2.0, -4.0]), torch.tensor([[2.0]])]
    norm = math.sqrt(4 + 16 + 4)
    before = [parameter.detach().clone() for parameter in parameters]
    assert optimisers.minimise(loss_of(parameters), max_norm=0.5) == pytest.approx(norm)
    for old, new, gradient, rate in zip(before, parameters, gradients, RATES.values(), strict=True):
        clipped = gradient * 0.5 / norm
        assert torch.allclose(new, old - rate * clipped / (clipped.abs() + ADAM_EPSILON), atol=1e-6)
    assert optimisers.rates.state_dict() == {"first": 1, "second": 1}


def test_gradients_do_not_add_up_over_steps() -> None:
    optimisers, parameters = make()
    slope = parameters[1].sum() * 3
    for _ in range(3):
        assert optimisers.minimise(slope + 0 * parameters[0].sum(), max_norm=1e9) == 3.0
        slope = parameters[1].sum() * 3


@pytest.mark.parametrize("factor", [math.inf, math.nan, -math.inf])
def test_what_is_not_finite_moves_nothing(factor: float) -> None:
    optimisers, parameters = make()
    optimisers.minimise(loss_of(parameters), max_norm=1.0)
    before = copied(dict(enumerate(parameters)) | optimisers.tensors())  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match=r"loss (-?inf|nan), gradient norm"):
        optimisers.minimise(loss_of(parameters, factor), max_norm=1.0)
    assert copied(dict(enumerate(parameters)) | optimisers.tensors()) == before  # type: ignore[arg-type]
    assert optimisers.rates.state_dict() == {"first": 1, "second": 1}


def test_an_infinite_gradient_of_a_finite_loss_moves_nothing() -> None:
    optimisers, parameters = make()
    with torch.no_grad():
        parameters[0][0] = 0.0
    before = copied(dict(enumerate(parameters)))  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match=r"loss 0\.0, gradient norm inf"):
        optimisers.minimise(parameters[0][0].sqrt() + 0 * parameters[1].sum(), max_norm=1.0)
    assert copied(dict(enumerate(parameters))) == before  # type: ignore[arg-type]


def test_the_factor_is_on_every_rate_and_told_once() -> None:
    optimisers, parameters = make()
    optimisers.minimise(loss_of(parameters), max_norm=1.0)
    assert optimisers.take_news() == ((), ())
    optimisers.lr_factor = 0.25
    optimisers.minimise(loss_of(parameters), max_norm=1.0)
    changed, tampered = optimisers.take_news()
    assert {fact.name: fact.before for fact in changed} == RATES
    assert [fact.after for fact in changed] == pytest.approx([rate / 4 for rate in RATES.values()])
    assert tampered == ()
    assert optimisers.take_news() == ((), ())


def test_a_rate_of_somebody_else_is_told() -> None:
    optimisers, parameters = make()
    optimisers._by_name["second"].param_groups[0]["lr"] = 5.0
    before = parameters[1].detach().clone()
    optimisers.minimise(loss_of(parameters), max_norm=1e9)
    _, tampered = optimisers.take_news()
    assert [(fact.name, fact.found, fact.written) for fact in tampered] == [("second", 5.0, 0.001)]
    assert torch.allclose(before - parameters[1], torch.tensor(0.001), atol=1e-5), (
        "none of it reached a weight"
    )


def test_tensors_make_other_optimisers_go_on_alike_and_stay_their_own() -> None:
    one, first = make()
    for _ in range(3):
        one.minimise(loss_of(first), max_norm=1.0)
    two, second = make()
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    two.load_tensors(one.tensors())
    for parameter, source in zip(second, first, strict=True):
        parameter.data.copy_(source.data)
    one.minimise(loss_of(first), max_norm=1.0)
    assert copied(two.tensors()) == copied(kept), "they are copied"
    two.minimise(loss_of(second), max_norm=1.0)
    assert copied(one.tensors()) == copied(two.tensors()) != copied(kept)
    assert set(kept) == {f"{name}.0.{field}" for name in RATES for field in ("step", "exp_avg", "exp_avg_sq")}


def test_none_are_the_tensors_of_the_beginning() -> None:
    optimisers, parameters = make()
    assert optimisers.tensors() == {}
    optimisers.minimise(loss_of(parameters), max_norm=1.0)
    optimisers.load_tensors({})
    assert optimisers.tensors() == {}


def test_tensors_of_other_optimisers_are_refused() -> None:
    optimisers, _ = make()
    with pytest.raises(ValueError, match=r"state of an optimiser 'third'; there are first, second"):
        optimisers.load_tensors({"third.0.step": torch.zeros(())})
