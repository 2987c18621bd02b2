"""Implicit Q-learning's update: critics learn, their slow copies follow, and the values come from the policy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from esper_simic.actions import HEADS, OP, RELEVANT_HEADS, Op
from esper_simic.algorithms.iql import iql_loss
from esper_simic.errors import ConfigError
from esper_simic.graphs import FlatGrowthSpec, ObservationSpec
from esper_simic.specs import Choices
from esper_simic.updates import iql as iql_module
from tests.policies.synthetic import legal_choices
from tests.updates.ground import LANES, SPECS, Ground, T, copied, weights


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def listening(**arguments: Any) -> Any:
        seen.append(arguments)
        return iql_loss(**arguments)

    monkeypatch.setattr(iql_module, "iql_loss", listening)
    return seen


def critics(ground: Ground, prefix: str = "critics.") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor.clone()
        for name, tensor in ground.engine.tensors().items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("spec", SPECS)
def test_policy_values_and_critics_all_learn(spec: str) -> None:
    ground = Ground("IQL", spec)
    before, fast = copied(weights(ground.engine)), critics(ground)
    updated = ground.update()
    after = copied(weights(ground.engine))
    for parameters in (ground.policy.policy_parameters(), ground.policy.value_parameters()):
        names = {
            name for name, weight in ground.policy.named_parameters() if any(weight is p for p in parameters)
        }
        assert any(before[name] != after[name] for name in names)
    assert any(not torch.equal(tensor, critics(ground)[name]) for name, tensor in fast.items())
    assert ground.engine.optimisers.rates.state_dict() == {"policy": 1, "value": 1, "critics": 1}
    assert updated.ratios is None
    assert (updated.loss, updated.policy_loss, updated.value_loss) == tuple(
        updated.metrics[name] for name in ("total", "policy_loss", "value_loss")
    )


def test_slow_copies_begin_alike_and_follow_by_their_rate() -> None:
    ground = Ground("IQL", iql_target_rate=0.1)
    assert copied(critics(ground)) == copied(critics(ground, "slow_critics."))
    slow = critics(ground, "slow_critics.")
    for _ in range(3):
        ground.update()
        fast = critics(ground)
        slow = {name: 0.9 * tensor + 0.1 * fast[name] for name, tensor in slow.items()}
        for name, tensor in critics(ground, "slow_critics.").items():
            assert torch.allclose(tensor, slow[name], atol=1e-7), name
    assert copied(critics(ground)) != copied(slow)


def test_copies_that_are_not_slow_are_the_critics() -> None:
    ground = Ground("IQL", iql_target_rate=1.0)
    ground.update()
    assert copied(critics(ground)) == copied(critics(ground, "slow_critics."))


def test_slow_copies_learn_by_following_alone() -> None:
    ground = Ground("IQL")
    assert ground.engine._iql is not None
    assert not any(parameter.requires_grad for parameter in ground.engine._iql.slow.parameters())
    ground.update()
    assert all(parameter.grad is None for parameter in ground.engine._iql.slow.parameters())


def test_the_loss_is_asked_of_whole_transitions(asked: list[dict[str, Any]]) -> None:
    ground = Ground("IQL", "one", iql_expectile=0.8, iql_beta=2.0, iql_weight_max=50.0)
    batch = ground.batch
    evaluation = batch.evaluate(ground.policy)
    slow = critics(ground, "slow_critics.")
    ground.update()
    ground.update()
    first, second = asked
    assert torch.equal(first["values"], evaluation.values[:T])
    assert torch.equal(first["next_values"], evaluation.values[1:]), "where an episode goes on"
    assert not first["next_values"].requires_grad
    assert torch.equal(first["rewards"], batch.rewards)
    assert torch.equal(first["discounts"], batch.discounts)
    assert torch.equal(first["weights"], torch.ones(T, LANES))
    for fast, target in zip(first["q_values"], first["target_q_values"], strict=True):
        assert torch.equal(fast, target), "of the beginning"
        assert fast.requires_grad
        assert not target.requires_grad
    assert not torch.equal(second["q_values"][0], second["target_q_values"][0])
    options = first["options"]
    assert (options.expectile, options.beta, options.weight_max, options.cql_alpha) == (0.8, 2.0, 50.0, 0.0)
    assert first["action_values"] == ()
    assert slow


def test_each_steps_q_is_that_of_its_own_state_and_action(asked: list[dict[str, Any]]) -> None:
    ground = Ground("IQL", "many")
    twin = Ground("IQL", "many")
    ground.update()
    assert twin.engine._iql is not None
    for t in range(T):
        for lane in range(LANES):
            row = {key: tensor[t, lane][None] for key, tensor in twin.trajectory.observations.items()}
            action = twin.trajectory.actions[t, lane][None]
            with torch.no_grad():
                found = twin.engine._iql.critics(row, twin.policy.normaliser(row), action)
            for critic, q in zip(asked[0]["q_values"], found, strict=True):
                assert float(critic[t, lane].detach()) == pytest.approx(float(q), abs=1e-5)


def actions_of(spec_name: str, observation: dict[str, torch.Tensor]) -> list[list[int]]:
    """Every distinct legal action in one state, listed the slow way."""
    spec = SPECS[spec_name]
    assert isinstance(spec.action, Choices)
    if not isinstance(spec, ObservationSpec | FlatGrowthSpec):
        legal, start = [], 0
        for size in spec.action.sizes:
            flags = observation["action_mask"][start : start + size] if spec_name == "masked" else [1] * size
            legal.append([choice for choice in range(size) if flags[choice]])
            start += size
        return [list(choices) for choices in itertools.product(*legal)]
    found = []
    mask, layout = observation["action_mask"], spec.mask_layout
    for op in Op:
        if not mask[layout.op][op]:
            continue
        choices = legal_choices(mask, op, layout) | {HEADS[OP]: [int(op)]}
        found += [
            list(action)
            for action in itertools.product(
                *(choices[head] if head in RELEVANT_HEADS[op] else [0] for head in HEADS)
            )
        ]
    return found


@pytest.mark.parametrize("spec", ["one", "many", "masked", "flat", "graph"])
def test_the_conservative_term_sums_over_every_legal_action(spec: str, asked: list[dict[str, Any]]) -> None:
    ground, twin = (Ground("IQL", spec, iql_cql_alpha=0.5) for _ in range(2))
    updated = ground.update()
    (arguments,) = asked
    assert twin.engine._iql is not None
    for t, lane in ((0, 0), (1, 3), (3, 5)):
        row = {key: tensor[t, lane] for key, tensor in twin.trajectory.observations.items()}
        actions = torch.tensor(actions_of(spec, row))
        rows = {key: tensor.expand(len(actions), *tensor.shape) for key, tensor in row.items()}
        with torch.no_grad():
            found = twin.engine._iql.critics(rows, twin.policy.normaliser(rows), actions)
        for every, q in zip(arguments["action_values"], found, strict=True):
            assert every.shape == (T, LANES, 1)
            assert float(every[t, lane].detach()) == pytest.approx(float(q.logsumexp(0)), abs=1e-4)
    assert updated.metrics["conservative_loss"] > 0, "one of them is what was done"
    assert all(bool(tensor.isfinite().all()) for tensor in critics(ground).values())


def test_a_conservative_term_without_choices_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"a conservative term needs discrete actions"):
        Ground("IQL", "numbers", iql_cql_alpha=0.5)


def test_values_come_nearer_to_what_was_earned() -> None:
    ground = Ground("IQL", "one", learning_rate=5e-3, max_grad_norm=10.0, iql_target_rate=0.2)
    losses = [ground.update().metrics["q_loss"] for _ in range(61)]
    assert losses[-1] < 0.5 * losses[0]
