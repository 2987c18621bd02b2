"""IMPALA's update: one step down its loss, by the targets that may be trusted; and what an update's terms say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from esper_simic.algorithms.impala import impala_loss
from esper_simic.breaker import VtraceRatios
from esper_simic.safety import StepMode
from esper_simic.updates import impala as impala_module
from esper_simic.updates.update import ratios_of
from tests.updates.ground import SPECS, Ground, T, copied, weights


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every loss."""
    seen: list[dict[str, Any]] = []

    def listening(**arguments: Any) -> Any:
        seen.append(arguments)
        return impala_loss(**arguments)

    monkeypatch.setattr(impala_module, "impala_loss", listening)
    return seen


@pytest.mark.parametrize("spec", SPECS)
def test_an_update_is_one_step_and_says_what_the_loss_said(spec: str, asked: list[dict[str, Any]]) -> None:
    ground = Ground(spec=spec, rho_bar=1.5, c_bar=1.2, clip_pg_rho=1.3, vtrace_lambda=0.9)
    before = copied(weights(ground.engine))
    updated = ground.update()
    assert copied(weights(ground.engine)) != before
    assert ground.engine.optimisers.rates.state_dict() == {"policy": 1, "value": 1}
    (arguments,) = asked
    assert (arguments["clip_rho"], arguments["clip_c"], arguments["clip_pg_rho"]) == (1.5, 1.2, 1.3)
    assert (arguments["lambda_"], arguments["entropy_coefficient"]) == (0.9, 0.01)
    with torch.no_grad():
        loss = impala_loss(**arguments)
    assert (updated.loss, updated.policy_loss, updated.value_loss) == (
        float(loss.total),
        float(loss.policy_loss),
        float(loss.value_loss),
    )
    assert updated.grad_norm > 0
    entropies = {name for name in updated.metrics if name.startswith("head_entropy.")}
    heads = ground.batch.evaluate(ground.policy).heads.head_entropies
    assert entropies == {f"head_entropy.{head}" for head in heads}
    assert all(type(value) is float and math.isfinite(value) for value in updated.metrics.values())
    assert updated.ratios is not None
    assert updated.ratios.mean_ratio == pytest.approx(1.0, abs=1e-4), "the policy has done it itself"


@pytest.mark.parametrize(
    ("settings", "mode", "expected"),
    [
        ({}, StepMode(), "vtrace"),
        ({}, StepMode(targets="td"), "td"),
        ({"vtrace_enabled": False}, StepMode(), "td"),
        ({"vtrace_mean_ratio_max": 1.1}, StepMode(), "td"),
    ],
    ids=["trusted", "given up", "switched off", "of no use here"],
)
def test_targets_are_vtraces_where_it_can_be_trusted(
    settings: dict[str, Any], mode: StepMode, expected: str, asked: list[dict[str, Any]]
) -> None:
    ground = Ground(**settings)
    ground.trajectory.behaviour_log_probs.sub_(0.5)  # each ratio is e^0.5
    ground.update(mode)
    assert [arguments["targets"] for arguments in asked] == [expected]


@pytest.mark.parametrize("spec", ["graph", "many", "masked"])
def test_the_loss_is_asked_of_the_batch_and_of_what_the_policy_thinks_of_it(
    spec: str, asked: list[dict[str, Any]]
) -> None:
    ground = Ground(spec=spec)
    ground.force(1, 2)
    batch = ground.batch
    evaluation = batch.evaluate(ground.policy)
    ground.update()
    (arguments,) = asked
    expected = {
        "log_probs": evaluation.log_probs[:T],
        "behaviour_log_probs": ground.trajectory.behaviour_log_probs,
        "values": evaluation.values[:T],
        "bootstrap_value": evaluation.values[T],
        "rewards": batch.rewards,
        "discounts": batch.discounts,
        "entropies": evaluation.entropy[:T],
        "policy_weights": batch.policy_weights,
        "value_weights": batch.value_weights,
    }
    assert {name: torch.equal(arguments[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(
        expected, True
    )
    learned = {name for name in expected if arguments[name].requires_grad}
    assert learned == {"log_probs", "values", "entropies"}


def test_the_norm_that_gradients_are_clipped_to_has_the_modes_factor() -> None:
    ground = Ground(max_grad_norm=0.8)
    assert ground.terms().max_norm == 0.8
    assert ground.terms(StepMode(clip_factor=0.25)).max_norm == 0.2


def test_a_mode_that_is_careful_makes_smaller_steps() -> None:
    bold, careful = Ground(), Ground()
    before = weights(bold.engine)
    bold.update()
    careful.update(StepMode(lr_factor=0.5))
    for name, old in before.items():
        whole = weights(bold.engine)[name] - old
        half = weights(careful.engine)[name] - old
        assert torch.allclose(half, whole / 2, atol=1e-6), name


# -- ratios ------------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_steps_that_count() -> None:
    log_probs = torch.tensor([[0.0, -1.0, 5.0], [math.log(2.0), 0.0, 3.0]])
    behaviour = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.nan]])
    counted = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = ratios_of(log_probs, behaviour, counted)
    mean = (1.0 + math.exp(-1.0) + 2.0) / 3
    assert found.finite
    assert found.log_ratio_max == pytest.approx(math.log(2.0))
    assert found.mean_ratio == pytest.approx(mean)


def test_ratios_that_are_none_say_so() -> None:
    ones = torch.ones(2, 2)
    assert not ratios_of(torch.full((2, 2), math.nan), ones, ones).finite
    assert not ratios_of(torch.full((2, 2), -math.inf), ones, ones).finite


def test_where_nothing_counts_ratios_are_one() -> None:
    found = ratios_of(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    assert found == VtraceRatios(finite=True, log_ratio_max=0.0, mean_ratio=1.0)


def test_a_monstrous_ratio_is_seen_as_it_is_and_its_mean_stays_a_number() -> None:
    found = ratios_of(torch.full((1, 1), 500.0), torch.zeros(1, 1), torch.ones(1, 1))
    assert found.log_ratio_max == 500.0
    assert math.isfinite(found.mean_ratio)
