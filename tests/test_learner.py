"""The learner as a fold: the same admissions give the same bits, and a step does what its parts say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from esper_simic import seeding
from esper_simic.actions import HEADS, Op
from esper_simic.algorithms.impala import impala_loss
from esper_simic.config import Config, fresh_per_batch, parse
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished, ExperienceAdmitted, ExperienceRefused
from esper_simic.learner import Learner
from esper_simic.step_report import StepReport
from esper_simic.telemetry import StepObserver
from esper_simic.trajectory import Trajectory
from esper_simic.updates import impala as impala_module
from esper_simic.updates.batch import FORCED_VALUE_WEIGHT
from esper_simic.updates.optimisers import ADAM_EPSILON
from tests.policies.synthetic import SPEC, make_policy, trajectory

T, LANES = 3, 4
SETTINGS = """
simic_trainer: {batch_size: 8, unroll_length: 3, hidden_size: 16, warmup_epochs: 2, digest_every_steps: 2}
experience_buffer: {capacity: 40, min_experiences: 8, replay_ratio: 0.25}
environment: {environments_per_actor: 4}
"""


def make_config(*assignments: str) -> Config:
    return parse(SETTINGS, assignments=assignments)


def make_unroll(seed: int, length: int = T) -> Trajectory:
    return trajectory(make_policy(0), seed, length, LANES)


def make_event(
    number: int, *, episodes: Sequence[EpisodeFinished] = (), version: int = 0
) -> ExperienceAdmitted:
    return ExperienceAdmitted(
        actor=number % 2,
        incarnation=0,
        sequence=number // 2,
        policy_version=version,
        length=T,
        lanes=LANES,
        episode_numbers=[0] * LANES,
        episodes=list(episodes),
    )


def make_refusal(steps: int, *, actor: int = 0, incarnation: int = 0, sequence: int = 1) -> ExperienceRefused:
    return ExperienceRefused(
        actor=actor,
        incarnation=incarnation,
        sequence=sequence,
        policy_version=0,
        steps=steps,
        reason="too_old",
    )


def admit(learner: Learner, number: int, seed: int | None = None) -> tuple[int, ...]:
    """Admit an unroll at position 10 * number."""
    return learner.admit(10 * number, make_event(number), make_unroll(number if seed is None else seed))


def learn(learner: Learner, seeds: Sequence[int]) -> list[StepReport]:
    """Admit unrolls in this order, and step whenever there is enough."""
    reports = []
    for number, seed in enumerate(seeds):
        admit(learner, number, seed)
        while learner.can_step():
            reports.append(learner.step())
    return reports


def ready(*assignments: str) -> Learner:
    """A learner that can make one step."""
    learner = Learner(make_config(*assignments), SPEC)
    for number in range(4):
        admit(learner, number)
    assert learner.can_step()
    return learner


# -- one journal, one history ------------------------------------------------------------------------------------------

ORDER = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)


def history(reports: Sequence[StepReport]) -> list[list[Any]]:
    return [[report.step, report.digest, report.state_digest, report.metrics] for report in reports]


def test_the_same_admissions_give_the_same_bits_step_for_step() -> None:
    one, two = Learner(make_config(), SPEC), Learner(make_config(), SPEC)
    first, second = learn(one, ORDER), learn(two, ORDER)
    assert len(first) == 5  # 40 admitted, 8 of them before the first step; 6 fresh a batch
    assert history(first) == history(second)
    assert [report.step for report in first] == [1, 2, 3, 4, 5]
    assert [report.state_digest is not None for report in first] == [False, True, False, True, False]
    assert one.state().digest == two.state().digest
    assert len({report.digest for report in first}) == 5


SCRIPT = """
import json
from tests.test_learner import ORDER, SPEC, Learner, history, learn, make_config
learner = Learner(make_config(), SPEC)
print(json.dumps([history(learn(learner, ORDER)), learner.state().digest]))
"""


def test_a_fresh_process_comes_to_the_same_bits() -> None:
    learner = Learner(make_config(), SPEC)
    expected = [history(learn(learner, ORDER)), learner.state().digest]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def test_another_order_gives_other_bits() -> None:
    one = learn(Learner(make_config(), SPEC), ORDER)
    two = learn(Learner(make_config(), SPEC), (1, 0, *ORDER[2:]))
    assert one[0].digest != two[0].digest


def test_another_seed_and_another_rank_give_other_bits() -> None:
    one = learn(Learner(make_config(), SPEC), ORDER)
    for other in (
        Learner(make_config("simic_trainer.seed=1"), SPEC),
        Learner(make_config(), SPEC, rank=1),
    ):
        assert learn(other, ORDER)[0].digest != one[0].digest


def test_the_global_generators_have_no_part() -> None:
    one = learn(Learner(make_config(), SPEC), ORDER[:5])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        two = learn(Learner(make_config(), SPEC), ORDER[:5])
    assert history(one) == history(two)


# -- what may be stepped on --------------------------------------------------------------------------------------------


def test_nothing_is_fresh_until_the_minimum_is_admitted() -> None:
    learner = Learner(make_config(), SPEC)
    assert admit(learner, 0) == (0,)
    assert (learner.buffer.inserted, learner.buffer.fresh, learner.can_step()) == (4, 0, False)
    assert admit(learner, 1) == (10,)
    assert (learner.buffer.inserted, learner.buffer.fresh, learner.can_step()) == (8, 0, False)
    assert admit(learner, 2) == ()
    assert (learner.buffer.fresh, learner.can_step()) == (4, False)
    assert admit(learner, 3) == ()
    assert (learner.buffer.fresh, learner.can_step()) == (8, True)


def test_enough_fresh_experience_waits_for_the_minimum() -> None:
    learner = Learner(make_config("experience_buffer.min_experiences=10"), SPEC)
    for number in range(2):
        assert admit(learner, number) == (10 * number,)
    assert not learner.can_step()
    admit(learner, 2)  # 12 admitted: the third unroll crosses the minimum and stays fresh
    assert (learner.buffer.fresh, learner.can_step()) == (4, False)


def test_a_step_without_enough_experience_breaks_an_invariant() -> None:
    learner = Learner(make_config(), SPEC)
    with pytest.raises(InvariantViolation, match="can_step"):
        learner.step()
    assert learner.steps_done == 0


def test_every_unroll_is_reported_consumed_once_and_in_order() -> None:
    learner = Learner(make_config(), SPEC)
    taken: list[int] = []
    for number in range(12):
        taken.extend(admit(learner, number))
        while learner.can_step():
            taken.extend(learner.step().unrolls_consumed)
    assert taken == [10 * number for number in range(len(taken))]
    consumed_whole = learner.buffer.consumed // LANES
    assert len(taken) == consumed_whole >= 10


def test_an_unroll_of_another_length_breaks_an_invariant() -> None:
    learner = Learner(make_config(), SPEC)
    with pytest.raises(InvariantViolation, match="an admitted unroll has 2 steps"):
        learner.admit(0, make_event(0), make_unroll(0, length=2))


def test_steps_are_counted_whether_admitted_or_refused() -> None:
    learner = Learner(make_config(), SPEC)
    admit(learner, 0)
    learner.refuse(make_refusal(100))
    assert learner.environment_steps == T * LANES + 100


def test_lag_counts_updates() -> None:
    learner = ready()
    assert learner.lag(0) == 0
    learner.step()
    assert (learner.lag(0), learner.lag(1)) == (1, 0)


def test_a_new_incarnation_begins_episodes_that_nobody_has_seen() -> None:
    learner = Learner(make_config(), SPEC)
    assert learner.ledger.next_episodes(0) == [0, 0, 0, 0]
    ended = msgspec.structs.replace(make_episode(1.0), lane=2, number=7)
    event = msgspec.structs.replace(make_event(0, episodes=[ended]), episode_numbers=[3, 4, 7, 5])
    before = learner.state().numbers
    learner.admit(0, event, make_unroll(0))
    # Whether an actor names the episodes before or after the unroll, number 8 of lane 2 may have begun.
    assert learner.ledger.next_episodes(0) == [4, 5, 9, 6]
    assert learner.ledger.next_episodes(1) == [0, 0, 0, 0]
    learner.ledger.next_episodes(0)[0] = 99
    assert learner.ledger.next_episodes(0)[0] == 4
    after = learner.state().numbers
    assert (before["next_episodes"], after["next_episodes"]) == ({}, {"0": [4, 5, 9, 6]})


# -- what goes into the loss -------------------------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every loss computed."""
    seen: list[dict[str, Any]] = []

    def listening(**arguments: Any) -> Any:
        seen.append(arguments)
        return impala_loss(**arguments)

    monkeypatch.setattr(impala_module, "impala_loss", listening)
    return seen


def batch_of(learner: Learner) -> Trajectory:
    """The batch of the learner's next step (fresh ones first), without taking it."""
    trainer = learner._config.simic_trainer
    rng = seeding.generator(trainer.seed, "learner", 0, learner.steps_done)
    serials = learner.buffer.choose(trainer.batch_size, fresh_per_batch(learner._config), rng=rng)
    return learner.buffer.gather(serials)


def test_rewards_are_scaled_clipped_and_get_the_value_of_what_was_cut(losses: list[dict[str, Any]]) -> None:
    learner = ready("simic_trainer.reward_clip=0.5", "simic_trainer.gamma=0.9")
    batch = batch_of(learner)
    learner.step()
    deviation, found = learner.reward_scale.deviation, losses[0]
    cut, ended = batch.truncation_values != 0, batch.ended
    assert (ended & cut).any()
    assert (ended & ~cut).any()
    for t in range(T):
        for lane in range(8):
            expected = min(max(float(batch.rewards[t, lane]) / deviation, -0.5), 0.5)
            if cut[t, lane]:
                expected += 0.9 * float(batch.truncation_values[t, lane])
            assert float(found["rewards"][t, lane]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert float(found["discounts"][t, lane]) == pytest.approx(0.0 if ended[t, lane] else 0.9)


def test_the_loss_sees_the_policy_that_acts(losses: list[dict[str, Any]]) -> None:
    learner = ready()
    batch = batch_of(learner)
    with torch.no_grad():
        wait = torch.zeros(1, 8, len(HEADS), dtype=torch.int64)
        found = learner.policy.evaluate(
            batch.observations, batch.episode_start, batch.initial_state, torch.cat([batch.actions, wait])
        )
    learner.step()
    assert torch.equal(losses[0]["log_probs"], found.log_probs[:T])
    assert torch.equal(losses[0]["entropies"], found.entropy[:T])
    assert torch.equal(losses[0]["values"], found.values[:T])
    assert torch.equal(losses[0]["bootstrap_value"], found.values[T])
    assert not losses[0]["bootstrap_value"].requires_grad
    assert torch.equal(losses[0]["behaviour_log_probs"], batch.behaviour_log_probs)


def test_forced_steps_teach_only_a_little_value(losses: list[dict[str, Any]]) -> None:
    learner, layout = Learner(make_config(), SPEC), SPEC.mask_layout
    forced = torch.zeros(T + 1, LANES, dtype=torch.bool)
    forced[1:, :2] = True
    for number in range(4):
        unroll = make_unroll(number)
        operations = unroll.observations["action_mask"][..., layout.op]
        operations[forced] = torch.eye(len(Op), dtype=torch.int8)[Op.WAIT]
        operations[~forced] = 1
        unroll.observations["action_mask"][..., layout.op] = operations
        unroll.actions[forced[:-1]] = 0
        learner.admit(number, make_event(number), unroll)
    batch = batch_of(learner)
    learner.step()
    legal = batch.observations["action_mask"][:-1, :, layout.op].sum(dim=-1)
    expected = (legal > 1).float()
    assert 0 < expected.mean() < 1
    assert torch.equal(losses[0]["policy_weights"], expected)
    assert torch.equal(losses[0]["value_weights"], torch.where(legal > 1, 1.0, FORCED_VALUE_WEIGHT))
    assert FORCED_VALUE_WEIGHT == 0.2


@pytest.mark.parametrize(("steps", "expected"), [(0, 0.02), (500, 0.012), (1000, 0.004), (5000, 0.004)])
def test_the_entropy_weight_falls_linearly(losses: list[dict[str, Any]], steps: int, expected: float) -> None:
    learner = ready("simic_trainer.entropy_anneal_steps=1000")
    learner.ledger.environment_steps = steps
    report = learner.step()
    assert losses[0]["entropy_coefficient"] == pytest.approx(expected)
    assert report.metrics["entropy_coefficient"] == pytest.approx(expected)


def test_statistics_of_observations_count_every_step_once() -> None:
    learner = Learner(make_config(), SPEC)
    for number in range(3):
        admit(learner, number)
    # The last row of an unroll is the first of the next one.
    assert learner.policy.normaliser.state_dict()["globals_count"] == 3 * T * LANES


# -- one update --------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends an update after its backward pass."""


def backward_alone(learner: Learner) -> None:
    """The backward pass of the learner's next update, without its step."""

    def minimise(loss: torch.Tensor, *, max_norm: float, observer: StepObserver) -> float:
        loss.backward()
        raise Enough

    learner.engine.optimisers.minimise = minimise  # type: ignore[method-assign, assignment]
    with pytest.raises(Enough):
        learner.step()


def test_the_first_step_is_one_step_of_adam_on_the_clipped_gradient() -> None:
    learner, twin = ready("simic_trainer.max_grad_norm=0.01"), ready("simic_trainer.max_grad_norm=0.01")
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    backward_alone(twin)
    gradients = [parameter.grad for parameter in twin.policy.parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    report = learner.step()
    assert norm > 0.01
    assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    rate = 3e-4 / 2  # the first of two steps of warm-up
    for old, new, gradient in zip(before, learner.policy.parameters(), gradients, strict=True):
        assert gradient is not None
        clipped = gradient * (0.01 / norm)
        expected = old - rate * clipped / (clipped.abs() + ADAM_EPSILON)
        assert torch.allclose(new, expected, rtol=0, atol=2e-6)


def test_value_and_policy_have_rates_of_their_own() -> None:
    learner = ready("simic_trainer.value_lr=0.002", "simic_trainer.warmup_epochs=0")
    metrics = learner.step().metrics
    assert (metrics["learning_rate.policy"], metrics["learning_rate.value"]) == (3e-4, 2e-3)


METRICS = {
    "total",
    "policy_loss",
    "value_loss",
    "entropy",
    "mean_rho",
    "clip_fraction",
    "approx_kl",
    "explained_variance",
    "mean_advantage",
    "mean_value",
    "learning_rate.policy",
    "learning_rate.value",
    "grad_norm",
    "entropy_coefficient",
    "reward_deviation",
    "policy_lag",
    "policy_lag_max",
    "replay_age",
    "buffer_size",
    "batch_size",
    "conservative_mode",
    "conservative_entries",
    *(f"head_entropy.{head}" for head in HEADS),
}
EPISODE_METRICS = {"episodic_return", "episodic_length", "episodic_accuracy", "episodic_parameters"}


def make_episode(episode_return: float, *, truncated: bool = False) -> EpisodeFinished:
    return EpisodeFinished(
        lane=0,
        number=0,
        episode_return=episode_return,
        length=60,
        accuracy=80.0,
        parameters_added=100,
        fossils=1,
        truncated=truncated,
    )


def test_metrics_have_their_names_and_are_finite() -> None:
    for report in learn(Learner(make_config(), SPEC), ORDER):
        assert set(report.metrics) == METRICS
        assert all(math.isfinite(value) for value in report.metrics.values())
        assert all(type(value) is float for value in report.metrics.values())


def test_what_the_world_says_of_cuts_decides_whatever_it_calls_a_success() -> None:
    """A time limit is the world's own rule; who was staggered or rolled back says little, success or not."""
    learner = Learner(make_config(), SPEC)
    told = make_episode(1.0, truncated=True)
    at_the_limit = msgspec.structs.replace(told, cut=False, success=True)
    staggered = msgspec.structs.replace(told, episode_return=99.0, cut=True, success=False)
    learner.admit(0, make_event(0, episodes=[at_the_limit, staggered]), make_unroll(0))
    assert learner.score == 1.0
    assert learner.state().numbers["returns_since"] == [1.0]


def test_outcomes_of_whole_episodes_are_metrics_and_those_of_cut_ones_are_not() -> None:
    learner = ready()
    episodes = [make_episode(1.0), make_episode(2.0), make_episode(99.0, truncated=True)]
    learner.admit(99, make_event(6, episodes=episodes), make_unroll(6))
    metrics = learner.step().metrics
    assert set(metrics) == METRICS | EPISODE_METRICS
    assert metrics["episodic_return"] == 1.5
    assert (metrics["episodic_length"], metrics["episodic_accuracy"]) == (60.0, 80.0)
    assert metrics["episodic_parameters"] == 100.0


def test_lag_is_measured_against_the_policy_that_was_updated() -> None:
    learner = Learner(make_config(), SPEC)
    for number in range(8):
        learner.admit(number, make_event(number), make_unroll(number))
    first, second = learner.step().metrics, learner.step().metrics
    assert (first["policy_lag"], second["policy_lag"], second["policy_lag_max"]) == (0, 1, 1)
    assert first["buffer_size"] == 32


def test_a_batch_whose_ratios_are_not_finite_is_learned_from_without_them(
    losses: list[dict[str, Any]],
) -> None:
    learner = ready()
    learner.buffer._rows["behaviour_log_probs"][8:16] = math.nan
    learner.step()
    assert losses[0]["targets"] == "td"
    learner = ready()
    learner.step()
    assert losses[1]["targets"] == "vtrace"


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    learner = ready()
    tensors = learner.buffer._rows["rewards"]
    tensors[8:16] = math.nan  # decoding refuses this; here it stands for any other cause
    before = {name: value.clone() for name, value in learner.state().tensors.items()}
    with pytest.raises(InvariantViolation, match=r"step 1: not finite: loss nan"):
        learner.step()
    after = learner.state().tensors
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert learner.steps_done == 0


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_weights_make_the_same_policy_elsewhere() -> None:
    learner = ready()
    learner.step()
    other = make_policy(99, learner._config.simic_trainer)
    other.load_state_dict(safetensors.torch.load(learner.weights()))
    unroll = make_unroll(50)
    row = {key: tensor[0] for key, tensor in unroll.observations.items()}
    chance = torch.from_numpy(np.random.default_rng(0).random((LANES, len(HEADS))))
    one, two = (
        policy.act(row, unroll.episode_start[0], unroll.initial_state, chance)
        for policy in (learner.policy, other)
    )
    for name in one._fields:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_version_is_the_same_bytes_whatever_was_admitted_since() -> None:
    learner = ready()
    learner.step()
    version, before = learner.weights(), learner.policy.normaliser.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    admit(learner, 9)
    assert any(
        not torch.equal(tensor, before[name])
        for name, tensor in learner.policy.normaliser.state_dict().items()
    )
    assert learner.weights() == version


def test_weights_are_the_same_bytes_every_time() -> None:
    learner = ready()
    assert learner.weights() == learner.weights()
    before = learner.weights()
    learner.step()
    assert learner.weights() != before


def test_state_digest_covers_every_tensor() -> None:
    learner = Learner(make_config(), SPEC)
    learn(learner, ORDER[:6])
    names = list(learner.state().tensors)
    assert any(name.startswith("policy.normaliser") for name in names)
    assert {name.rpartition(".")[2] for name in names if name.startswith("optimizer")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    before = learner.state().digest
    for name in names:
        tensor = learner.state().tensors[name].view(-1)
        held = tensor[0].clone()
        tensor[0] += 1
        assert learner.state().digest != before, name
        tensor[0] = held
        assert learner.state().digest == before, name


def test_state_digest_covers_every_number() -> None:
    learner = Learner(make_config(), SPEC)
    learn(learner, ORDER[:6])
    before = learner.state().digest
    learner.refuse(make_refusal(1))
    seen = {before, learner.state().digest}
    learner.ledger.environment_steps -= 1
    assert learner.state().digest == before
    learner.buffer.consume_all()
    seen.add(learner.state().digest)
    begins = torch.zeros(LANES, dtype=torch.bool)
    learner.reward_scale.update(7, begins, torch.ones(T, LANES), torch.zeros(T, LANES, dtype=torch.bool))
    seen.add(learner.state().digest)
    learner.steps_done += 1
    seen.add(learner.state().digest)
    learner.buffer.insert(make_unroll(0), 0, 12345)
    seen.add(learner.state().digest)
    rates = learner.learning_rates.state_dict()
    learner.learning_rates.load_state_dict({name: steps + 1 for name, steps in rates.items()})
    seen.add(learner.state().digest)
    assert len(seen) == 7


def test_state_numbers_are_json() -> None:
    learner = Learner(make_config(), SPEC)
    learn(learner, ORDER[:6])
    numbers = learner.state().numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert repr(json.loads(json.dumps(numbers))) == repr(numbers), "what the digest covers survives a file"
    addresses = learner.state().addresses
    assert json.loads(json.dumps(addresses)) == addresses
    assert addresses["buffer"]["positions"] == [10 * number for number in range(6)]
