"""PPO's and APPO's update: epochs of minibatches around one anchor, until the policy has moved far enough."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from esper_simic.algorithms.entropy_floor import EntropyFloor, entropy_floor_scale
from esper_simic.algorithms.ppo import KL_STOP_FACTOR, minibatches, ppo_loss, ppo_targets
from esper_simic.breaker import VtraceVerdict, judge_vtrace
from esper_simic.safety import StepMode
from esper_simic.updates import ppo as ppo_module
from tests.updates.ground import LANES, SPECS, Ground, T, copied, weights

NEVER_EARLY: dict[str, Any] = {"ppo_target_kl": None}


class Spy:
    """What was asked of the algorithm, and what it is to answer."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.approx_kl: list[float] = []
        self.total: list[float] = []

    def loss(self, **arguments: Any) -> Any:
        kept = arguments | {"values": arguments["values"].detach().clone()}
        self.losses.append(kept)
        found = ppo_loss(**arguments)
        self.total.append(float(found.total.detach()))
        if self.approx_kl:
            return dataclasses.replace(found, approx_kl=torch.tensor(self.approx_kl[len(self.losses) - 1]))
        return found

    def ask(self, **arguments: Any) -> Any:
        self.targets.append(arguments)
        return ppo_targets(**arguments)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    made = Spy()
    monkeypatch.setattr(ppo_module, "ppo_loss", made.loss)
    monkeypatch.setattr(ppo_module, "ppo_targets", made.ask)
    return made


def test_each_epoch_takes_every_lane_once_around_an_anchor_that_stays(spy: Spy) -> None:
    ground = Ground("PPO", "many", ppo_epochs=3, ppo_minibatches=4, normalise_advantages=False, **NEVER_EARLY)
    batch = ground.batch
    with torch.no_grad():
        anchor = batch.evaluate(ground.policy)
    updated = ground.update(chance=5)
    rng = np.random.default_rng(5)
    taken = [lanes for _ in range(3) for lanes in minibatches(LANES, 4, rng)]
    assert [len(lanes) for lanes in taken] == [2, 2, 1, 1] * 3
    assert len(spy.losses) == len(taken) == 12
    (asked,) = spy.targets
    targets = ppo_targets(**asked)
    moved = 0
    for arguments, lanes in zip(spy.losses, taken, strict=True):
        assert torch.equal(arguments["anchor_values"], anchor.values[:T, lanes])
        assert torch.equal(arguments["advantages"], targets.advantages[:, lanes])
        assert torch.equal(arguments["value_targets"], targets.value_targets[:, lanes])
        assert torch.equal(arguments["importance"], targets.importance[:, lanes])
        assert torch.equal(arguments["policy_weights"], batch.policy_weights[:, lanes])
        for head, found in arguments["heads"].items():
            assert torch.equal(found.anchor_log_probs, anchor.heads.head_log_probs[head][:T, lanes])
            assert not found.anchor_log_probs.requires_grad
        moved += not torch.allclose(arguments["values"], anchor.values[:T, lanes])
    assert moved == 11, "all but the first step start where others have been"
    assert (updated.metrics["ppo_steps"], updated.metrics["ppo_stopped_early"]) == (12.0, 0.0)
    assert ground.engine.optimisers.moves == 12
    assert updated.loss == pytest.approx(np.mean(spy.total), rel=1e-5)


@pytest.mark.parametrize("spec", ["graph", "many", "masked"])
def test_targets_and_loss_are_asked_of_the_batch_and_of_what_the_policy_thinks_of_it(
    spy: Spy, spec: str
) -> None:
    ground = Ground("APPO", spec, **NEVER_EARLY)
    ground.force(1, 2)
    batch = ground.batch
    with torch.no_grad():
        anchor = batch.evaluate(ground.policy)
    ground.update()
    (asked,), (of_loss,) = spy.targets, spy.losses
    expected = {
        "log_rhos": anchor.log_probs[:T] - ground.trajectory.behaviour_log_probs,
        "rewards": batch.rewards,
        "discounts": batch.discounts,
        "values": anchor.values[:T],
        "bootstrap_value": anchor.values[T],
    }
    assert {name: torch.equal(asked[name], tensor) for name, tensor in expected.items()} == dict.fromkeys(
        expected, True
    )
    (lanes,) = minibatches(LANES, 1, np.random.default_rng(0))
    evaluation = batch.of_lanes(torch.from_numpy(lanes)).evaluate(ground.policy)
    assert torch.equal(of_loss["policy_weights"], batch.policy_weights[:, lanes])
    assert torch.equal(of_loss["value_weights"], batch.value_weights[:, lanes])
    for head, found in of_loss["heads"].items():
        assert torch.equal(found.relevance, evaluation.heads.relevance[head][:T])
        assert torch.equal(found.availability, evaluation.heads.available[head][:T])
        assert found.entropies.shape == found.log_probs.shape == (T, LANES)
        assert torch.allclose(found.log_probs, found.anchor_log_probs, atol=1e-6), "nothing has moved yet"
        assert torch.allclose(found.entropies, anchor.heads.head_entropies[head][:T, lanes], atol=1e-6)
        assert found.log_probs.requires_grad


def test_a_schedule_counts_updates_however_many_steps_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """`warmup_epochs` and `lr_horizon_updates` are numbers of updates."""
    settings: dict[str, Any] = {"ppo_epochs": 2, "ppo_minibatches": 3, "warmup_epochs": 4, **NEVER_EARLY}
    ground = Ground("PPO", **settings)
    optimisers = ground.engine.optimisers
    rates: list[float] = []
    adam = optimisers._by_name["policy"]
    make = adam.step

    def step() -> None:
        rates.append(adam.param_groups[0]["lr"])
        make()

    monkeypatch.setattr(adam, "step", step)
    for _ in range(5):
        ground.update()
    assert optimisers.moves == len(rates) == 5 * 2 * 3
    expected = [rate for rate in (0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3) for _ in range(6)]
    assert rates == pytest.approx(expected)
    assert optimisers.rates.state_dict() == {"policy": 5, "value": 5}


def test_there_are_no_more_minibatches_than_lanes(spy: Spy) -> None:
    updated = Ground("PPO", ppo_minibatches=200, **NEVER_EARLY).update()
    assert updated.metrics["ppo_steps"] == LANES
    assert all(arguments["values"].shape == (T, 1) for arguments in spy.losses)


def test_the_gradient_norm_is_the_largest_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground("PPO", ppo_epochs=3, **NEVER_EARLY)
    norms = iter([2.0, 5.0, 3.0])
    monkeypatch.setattr(ground.engine.optimisers, "minimise", lambda loss, **_: next(norms))
    assert ground.update().grad_norm == 5.0


@pytest.mark.parametrize(
    ("approx_kl", "steps"),
    [
        ([0.0, 0.75, 0.75, 0.75], 4),
        ([0.0, 0.76, 0.0, 0.0], 1),
        ([0.0, 0.0, 9.0, 0.0], 2),
        ([9.0, 0.0, 0.0, 0.0], 4),
    ],
    ids=["at the limit", "beyond it", "in the second epoch", "before anything moved"],
)
def test_an_update_ends_where_the_policy_has_moved_far_enough(
    spy: Spy, approx_kl: list[float], steps: int
) -> None:
    assert KL_STOP_FACTOR * 0.5 == 0.75
    spy.approx_kl = approx_kl
    ground = Ground("PPO", ppo_epochs=2, ppo_minibatches=2, ppo_target_kl=0.5)
    updated = ground.update()
    assert updated.metrics["ppo_steps"] == steps
    assert updated.metrics["ppo_stopped_early"] == float(steps < 4)
    assert ground.engine.optimisers.moves == steps, "the one that showed it is not made"
    assert updated.metrics["approx_kl"] == pytest.approx(np.mean(approx_kl[:steps])), "of those made"


def test_a_divergence_that_is_real_ends_an_update_of_many_epochs() -> None:
    settings: dict[str, Any] = {"ppo_epochs": 50, "learning_rate": 1e-2, "max_grad_norm": 10.0}
    bound = Ground("PPO", ppo_target_kl=0.002, **settings)
    free = Ground("PPO", **settings, **NEVER_EARLY)
    stopped = bound.update().metrics
    assert stopped["ppo_stopped_early"] == 1.0
    assert 1 <= stopped["ppo_steps"] < 50
    assert free.update().metrics["ppo_steps"] == 50
    assert stopped["approx_kl"] <= KL_STOP_FACTOR * 0.002


def test_all_chance_is_in_the_generator() -> None:
    settings: dict[str, Any] = {"ppo_minibatches": 3, **NEVER_EARLY}
    one, same, other = (Ground("PPO", **settings) for _ in range(3))
    for ground, chance in ((one, 1), (same, 1), (other, 2)):
        ground.update(chance=chance)
    assert copied(weights(one.engine)) == copied(weights(same.engine)) != copied(weights(other.engine))


@pytest.mark.parametrize(
    ("algorithm", "mode", "offset", "expected"),
    [
        ("PPO", StepMode(), 0.0, "gae"),
        ("APPO", StepMode(), 0.0, "vtrace"),
        ("APPO", StepMode(targets="td"), 0.0, "gae"),
        ("APPO", StepMode(), 30.0, "gae"),
    ],
    ids=["PPO", "APPO", "given up", "ratios too large"],
)
def test_advantages_are_vtraces_in_appo_while_it_can_be_trusted(
    spy: Spy, algorithm: str, mode: StepMode, offset: float, expected: str
) -> None:
    ground = Ground(algorithm, gae_lambda=0.6, vtrace_lambda=0.7, rho_bar=2.0, c_bar=1.5, clip_pg_rho=1.2)
    ground.trajectory.behaviour_log_probs.sub_(offset)
    updated = ground.update(mode)
    (asked,) = spy.targets
    assert (asked["advantages"], asked["lambda_"]) == (expected, 0.7 if expected == "vtrace" else 0.6)
    assert (asked["clip_rho"], asked["clip_c"], asked["clip_importance"]) == (2.0, 1.5, 1.2)
    assert torch.allclose(asked["log_rhos"], torch.tensor(offset), atol=1e-4)
    assert (updated.ratios is not None) == (algorithm == "APPO"), "PPO has no breaker to open"


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_ratios_that_are_no_numbers_are_appos_failure_and_not_its_updates(spy: Spy, spoilt: float) -> None:
    ground = Ground("APPO")
    ground.trajectory.behaviour_log_probs[0, 0] = spoilt
    updated = ground.update()
    assert updated.ratios is not None
    assert judge_vtrace(updated.ratios, ground.trainer) is VtraceVerdict.NOT_FINITE
    (asked,) = spy.targets
    assert asked["advantages"] == "gae"
    assert bool((asked["log_rhos"] == 0).all()), "as TD(0) of IMPALA: nothing corrects this batch"
    assert all(math.isfinite(value) for value in updated.metrics.values())


def test_advantages_are_normalised_over_the_whole_batch_if_so_configured(spy: Spy) -> None:
    Ground("PPO", "one", ppo_minibatches=2, advantage_deviation_min=1e-6, **NEVER_EARLY).update()
    seen = torch.cat([arguments["advantages"] for arguments in spy.losses], dim=1)
    assert float(seen.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(seen.std(unbiased=False)) == pytest.approx(1.0, rel=1e-5)
    assert float(spy.losses[0]["advantages"].mean()) != pytest.approx(0.0, abs=1e-3)


def test_options_are_the_configurations(spy: Spy) -> None:
    Ground(
        "PPO",
        "many",
        ppo_clip=0.3,
        ppo_per_head=False,
        ppo_value_clip=0.7,
        value_coefficient=0.9,
        entropy_multipliers={"a": 2.0},
        entropy_floors={"a": 0.5, "c": 0.25},
        entropy_floor_coefficients={"a": 0.1, "b": 9.0, "c": 0.2},
    ).update(progress=0.7)
    options = spy.losses[0]["options"]
    assert (options.clip, options.per_head, options.value_clip, options.value_coefficient) == (
        0.3,
        False,
        0.7,
        0.9,
    )
    assert (options.entropy_coefficient, options.entropy_multipliers) == (0.01, {"a": 2.0})
    assert options.entropy_floors == {"a": EntropyFloor(0.5, 0.1), "c": EntropyFloor(0.25, 0.2)}
    assert options.entropy_floor_scale == entropy_floor_scale(0.7)


@pytest.mark.parametrize("algorithm", ["PPO", "APPO"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_action_can_be_learned(algorithm: str, spec: str) -> None:
    ground = Ground(algorithm, spec, ppo_epochs=2, ppo_minibatches=2, **NEVER_EARLY)
    before = copied(weights(ground.engine))
    updated = ground.update()
    assert copied(weights(ground.engine)) != before
    assert updated.metrics["ppo_steps"] == 4.0
    assert np.isfinite(list(updated.metrics.values())).all()
    assert all(type(value) is float for value in updated.metrics.values())


def test_what_was_good_becomes_more_likely_and_values_come_nearer() -> None:
    ground = Ground("PPO", "one", ppo_epochs=1, learning_rate=5e-3, **NEVER_EARLY)
    good = ground.trajectory.actions[..., 0] == 0
    ground.trajectory.rewards.copy_(good.float())
    ground.trajectory.ended.fill_(True)
    ground.trajectory.truncation_values.zero_()

    def chance_of_good() -> float:
        with torch.no_grad():
            log_probs = ground.batch.evaluate(ground.policy).log_probs[:T]
        return float(log_probs[good].exp().mean())

    before, first = chance_of_good(), ground.update().value_loss
    losses = [ground.update().value_loss for _ in range(30)]
    assert chance_of_good() > before + 0.1
    assert losses[-1] < first
