"""What holds a policy to old tasks: the Fisher information against enumeration, the penalty against its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.algorithms.ewc import Consolidation, estimate_fisher
from esper_simic.config import TrainerConfig
from esper_simic.policies.actor_critic import ActorCritic
from esper_simic.policies.policy import Policy
from esper_simic.reward_scale import RewardScale
from esper_simic.safety import StepMode
from esper_simic.specs import ExperienceSpec, VectorSpec
from esper_simic.trajectory import Trajectory
from esper_simic.updates.batch import Batch, prepare
from esper_simic.updates.engine import Engine
from esper_simic.updates.fisher import sampled_log_probs
from esper_simic.updates.update import Updated
from tests.policies.vectors import MASKED, NUMBERS, ONE, chance, make, observations

T, LANES = 3, 4
ALGORITHMS = ("IMPALA", "PPO", "APPO", "BC", "IQL")


def trainer(algorithm: str = "IMPALA", **settings: Any) -> TrainerConfig:
    """One gradient a step, not clipped."""
    keys: dict[str, Any] = {
        "algorithm": algorithm,
        "hidden_size": 16,
        "warmup_epochs": 0,
        "max_grad_norm": 1e6,
        "ppo_epochs": 1,
        "ppo_minibatches": 1,
    }
    return TrainerConfig(**keys | settings)


def played(policy: Policy, seed: int = 0, length: int = T, lanes: int = LANES) -> Trajectory:
    """What a policy does in random states."""
    rng, spec = np.random.default_rng(seed), policy.spec
    seen = observations(spec, rng, length + 1, lanes)
    start = torch.from_numpy(rng.random((length + 1, lanes)) < 0.3)
    initial = torch.zeros(lanes, policy.state_size)
    actions, log_probs, state = [], [], initial
    for t in range(length):
        row = {key: tensor[t] for key, tensor in seen.items()}
        decision = policy.act(row, start[t], state, chance(spec, rng, lanes))
        actions.append(decision.actions)
        log_probs.append(decision.log_probs)
        state = decision.state
    return Trajectory(
        observations=seen,
        episode_start=start,
        initial_state=initial,
        actions=torch.stack(actions),
        behaviour_log_probs=torch.stack(log_probs),
        rewards=torch.from_numpy(rng.normal(size=(length, lanes)).astype(np.float32)),
        ended=start[1:].clone(),
        truncation_values=torch.zeros(length, lanes),
    )


def batch_of(policy: Policy, trajectory: Trajectory) -> Batch:
    return prepare(trajectory, policy, RewardScale(0.99), trainer())


# -- the Fisher information --------------------------------------------------------------------------------------------


def enumerated(policy: ActorCritic, batch: Batch) -> dict[str, Tensor]:
    """Literal: for each decision the squared gradients of every action's log-probability, by its probability."""
    parameters = dict(policy.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    seen = {key: tensor[: batch.length] for key, tensor in batch.trajectory.observations.items()}
    start, state = batch.trajectory.episode_start[: batch.length], batch.trajectory.initial_state
    (arms,) = policy.spec.action.sizes  # type: ignore[union-attr]
    for action in range(arms):
        chosen = torch.full((batch.length, batch.lanes, 1), action)
        log_probs = policy.evaluate(seen, start, state, chosen).log_probs
        for log_prob in log_probs.flatten():
            found = torch.autograd.grad(
                log_prob, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += log_prob.detach().exp() * gradient.square()
    return {name: summed / (batch.length * batch.lanes) for name, summed in total.items()}


def test_sums_over_an_unroll_have_the_fisher_information_of_one_decision() -> None:
    policy = make(ONE, scale=30.0, hidden_size=8)
    batch, rng = batch_of(policy, played(policy)), np.random.default_rng(1)
    exact = enumerated(policy, batch)
    draws = 250
    estimate = estimate_fisher(
        lambda one: sampled_log_probs(policy, one, rng), [batch] * draws, dict(policy.named_parameters())
    )
    assert estimate.samples == draws * LANES
    for name, expected in exact.items():
        found = estimate.diagonal[name]
        if name.startswith("value"):
            assert not found.any(), "no action depends on what states are thought to be worth"
            continue
        assert float((found - expected).abs().max()) < 0.2 * float(expected.max()), name
        assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.1), name


def test_what_was_done_has_no_part_only_what_the_policy_would_do() -> None:
    policy = make(ONE, scale=30.0)
    trajectory = played(policy)
    other = Trajectory.from_tensors(
        trajectory.tensors() | {"actions": (trajectory.actions + 1) % 3, "rewards": -trajectory.rewards}
    )
    one, two = (
        sampled_log_probs(policy, batch_of(policy, each), np.random.default_rng(3))
        for each in (trajectory, other)
    )
    assert torch.equal(one, two)
    another = sampled_log_probs(policy, batch_of(policy, trajectory), np.random.default_rng(4))
    assert not torch.equal(one, another)


@pytest.mark.parametrize("spec", [ONE, MASKED, NUMBERS], ids=["one", "masked", "numbers"])
@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_log_probabilities_are_those_of_the_drawn_actions_over_the_root_of_t(
    spec: VectorSpec, network: str
) -> None:
    policy = make(spec, network=network, scale=10.0)
    batch = batch_of(policy, played(policy))
    found = sampled_log_probs(policy, batch, np.random.default_rng(2))
    rng, trajectory = np.random.default_rng(2), batch.trajectory
    state, total = trajectory.initial_state, torch.zeros(LANES)
    for t in range(T):
        row = {key: tensor[t] for key, tensor in trajectory.observations.items()}
        drawn = torch.from_numpy(rng.random((LANES, policy.chance)))
        decision = policy.act(row, trajectory.episode_start[t], state, drawn)
        total += decision.log_probs * batch.policy_weights[t]
        state = decision.state
    assert torch.allclose(found, total / T**0.5, atol=1e-5)
    assert found.requires_grad


# -- the penalty -------------------------------------------------------------------------------------------------------


def engine_of(algorithm: str, spec: ExperienceSpec = ONE, **settings: Any) -> Engine:
    return Engine(trainer(algorithm, **settings), spec)


def update(engine: Engine, trajectory: Trajectory, mode: StepMode | None = None) -> Updated:
    return engine.update(
        batch_of(engine.policy, trajectory),
        StepMode() if mode is None else mode,
        entropy_coefficient=0.01,
        progress=0.0,
        rng=np.random.default_rng(0),
    )


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in engine.policy.named_parameters()
    }


def held_away(engine: Engine, seed: int = 7) -> Consolidation:
    """A consolidation from whose anchors the engine's weights are some way off."""
    rng = np.random.default_rng(seed)
    parameters = {name: parameter.detach() for name, parameter in engine.policy.named_parameters()}
    return Consolidation(
        {n: p + torch.from_numpy(rng.normal(size=p.shape) * 0.1).float() for n, p in parameters.items()},
        {n: torch.from_numpy(rng.random(size=p.shape)).float() for n, p in parameters.items()},
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_penalty_is_in_the_loss_once_and_lambda_once_in_it(algorithm: str) -> None:
    strength = 3.0
    free, held = engine_of(algorithm, ewc_lambda=strength), engine_of(algorithm, ewc_lambda=strength)
    consolidation = held_away(held)
    before = {name: parameter.detach().clone() for name, parameter in held.policy.named_parameters()}
    held.consolidation = consolidation
    trajectory = played(held.policy)
    update(free, trajectory)
    updated = update(held, trajectory)
    without, with_it = gradients(free), gradients(held)
    for name, anchor in consolidation.anchors.items():
        pull = strength * consolidation.fisher[name] * (before[name] - anchor)
        assert torch.allclose(with_it[name] - without[name], pull, atol=1e-5), name
    now = dict(held.policy.named_parameters())
    squares = [
        (consolidation.fisher[n] * (now[n].detach() - anchor).square()).sum()
        for n, anchor in consolidation.anchors.items()
    ]
    assert updated.metrics["ewc_penalty"] == pytest.approx(strength * float(sum(squares)) / 2, rel=1e-5)


def test_every_step_of_several_is_held() -> None:
    """Where an update makes several, the penalty is a part of each of them: at a huge lambda they all go to it."""
    settings: dict[str, Any] = {"ppo_epochs": 4, "ppo_minibatches": 2, "ppo_target_kl": None}
    engine = engine_of("PPO", ewc_lambda=1e6, learning_rate=1e-3, **settings)
    engine.consolidation = consolidation = held_away(engine)
    before = {name: parameter.detach().clone() for name, parameter in engine.policy.named_parameters()}
    updated = update(engine, played(engine.policy))
    assert updated.metrics["ppo_steps"] == 8
    for name, parameter in engine.policy.named_parameters():
        anchor = consolidation.anchors[name]
        far = (before[name] - anchor).abs() > 0.02
        towards = (parameter.detach() - anchor).abs() < (before[name] - anchor).abs() - 7e-3
        assert bool(towards[far].all()), f"{name}: eight steps of 1e-3 towards its anchor"


def test_at_the_anchor_the_penalty_is_nothing() -> None:
    engine, free = engine_of("IMPALA", ewc_lambda=100.0), engine_of("IMPALA")
    trajectory = played(engine.policy)
    engine.consolidate([batch_of(engine.policy, trajectory)], np.random.default_rng(0))
    for each in (engine, free):
        update(each, trajectory)
    assert gradients(engine).keys() == gradients(free).keys()
    for name, gradient in gradients(engine).items():
        assert torch.equal(gradient, gradients(free)[name]), name


# -- consolidation in the engine ---------------------------------------------------------------------------------------


def test_what_is_held_is_where_the_weights_are_and_what_was_estimated() -> None:
    engine = engine_of("IMPALA")
    batches = [batch_of(engine.policy, played(engine.policy, seed)) for seed in (1, 2)]
    engine.consolidate(batches, np.random.default_rng(5))
    held, rng = engine.consolidation, np.random.default_rng(5)
    assert held is not None
    sums = {name: torch.zeros_like(parameter) for name, parameter in engine.policy.named_parameters()}
    for batch in batches:
        for lane in sampled_log_probs(engine.policy, batch, rng):
            engine.policy.zero_grad(set_to_none=True)
            lane.backward(retain_graph=True)
            for name, parameter in engine.policy.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.square()
    assert held.anchors.keys() == sums.keys()
    for name, parameter in engine.policy.named_parameters():
        assert torch.equal(held.anchors[name], parameter)
        assert torch.allclose(held.fisher[name], sums[name] / (2 * LANES), rtol=1e-5, atol=1e-9), name
    copies = {name: anchor.clone() for name, anchor in held.anchors.items()}
    update(engine, played(engine.policy))
    assert all(torch.equal(anchor, copies[name]) for name, anchor in held.anchors.items()), (
        "copies, not views"
    )


def test_whoever_waits_hears_of_the_beginning_and_of_each_batch_that_is_done_with() -> None:
    """Before the first one is asked for, and in between: an estimate from many samples takes minutes."""
    engine, heard = engine_of("IMPALA"), list[str]()
    engine.consolidating = lambda: heard.append("told")

    def batches() -> Iterator[Batch]:
        for seed in (1, 2, 3):
            heard.append("asked")
            yield batch_of(engine.policy, played(engine.policy, seed))

    engine.consolidate(batches(), np.random.default_rng(5))
    assert heard == ["told", *["asked", "told"] * 3]


def test_the_next_task_is_added_and_the_one_before_fades() -> None:
    engine = engine_of("IMPALA", ewc_decay=0.25)
    batch = batch_of(engine.policy, played(engine.policy))
    engine.consolidate([batch], np.random.default_rng(0))
    first = engine.consolidation
    update(engine, played(engine.policy))
    alone = engine_of("IMPALA")
    alone.policy.load_state_dict(engine.policy.state_dict())
    again = batch_of(engine.policy, played(engine.policy, 3))
    engine.consolidate([again], np.random.default_rng(1))
    alone.consolidate([again], np.random.default_rng(1))
    assert first is not None
    assert engine.consolidation is not None
    assert alone.consolidation is not None
    for name, fisher in engine.consolidation.fisher.items():
        assert torch.allclose(fisher, 0.25 * first.fisher[name] + alone.consolidation.fisher[name])
        assert torch.equal(engine.consolidation.anchors[name], engine.policy.get_parameter(name))


def test_a_share_of_the_parameters_is_held_where_a_share_is_asked_for() -> None:
    engine = engine_of("IMPALA", ewc_fraction=0.3)
    engine.consolidate([batch_of(engine.policy, played(engine.policy))], np.random.default_rng(0))
    parameters = dict(engine.policy.named_parameters())
    held = engine.consolidation
    assert held is not None
    count = sum(anchor.numel() for anchor in held.anchors.values())
    assert 0.3 * sum(map(Tensor.numel, parameters.values())) <= count
    assert 0 < len(held.anchors) < len(parameters)


def test_the_rate_falls_with_what_is_held_where_that_is_asked_for() -> None:
    engine = engine_of("IMPALA", ewc_adjusts_rate=True, ewc_lambda=1e4)
    trajectory = played(engine.policy)
    update(engine, trajectory)
    before = engine.optimisers.rates.rates()
    engine.consolidate([batch_of(engine.policy, trajectory)], np.random.default_rng(0))
    update(engine, trajectory)
    after = engine.optimisers.rates.rates()
    held = engine.consolidation
    assert held is not None
    mean = torch.cat([fisher.flatten() for fisher in held.fisher.values()]).mean()
    assert after["policy"] == pytest.approx(before["policy"] / (1 + 1e4 * float(mean)), rel=1e-4)
    assert after["value"] == before["value"]
