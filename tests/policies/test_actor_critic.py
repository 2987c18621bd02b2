"""Policies over vectors, with and without memory, for every kind of action."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_simic.errors import ConfigError, InvariantViolation
from esper_simic.policies.actor_critic import ActorCritic, tensors_of
from esper_simic.policies.build import build_policy
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.policies.policy import Policy
from esper_simic.policies.value_networks import VNetwork, q_network
from esper_simic.specs import Choices, Continuous, VectorSpec
from tests.policies import synthetic
from tests.policies.vectors import (
    FLAT,
    MASKED,
    NUMBERS,
    ONE,
    SPECS,
    Observations,
    chance,
    keys,
    make,
    observations,
)

LENGTH, LANES = 6, 5

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp"},
    "shared": {"network": "mlp", "shared_trunk": True, "layer_norm": True},
    "relu": {"network": "mlp", "activation": "relu", "hidden_layers": 1, "normalise_observations": False},
    "lstm": {"network": "lstm"},
}

every_spec = pytest.mark.parametrize("spec", SPECS)
every_network = pytest.mark.parametrize("network", NETWORKS)


def made(spec: str, network: str, seed: int = 0) -> ActorCritic:
    policy = make(SPECS[spec], seed, scale=50.0, **NETWORKS[network])
    policy.normaliser.update(observations(SPECS[spec], np.random.default_rng(seed), 40))
    return policy


def row(seen: Observations, t: int) -> Observations:
    return {key: tensor[t] for key, tensor in seen.items()}


def starts(rng: np.random.Generator, *lead: int) -> Tensor:
    return torch.from_numpy(rng.random(lead) < 0.3)


def initial(policy: ActorCritic, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.normal(size=(LANES, policy.state_size)).astype(np.float32))


@every_network
@every_spec
def test_evaluating_an_unroll_repeats_what_acting_said(spec: str, network: str) -> None:
    policy, rng = made(spec, network), np.random.default_rng(1)
    seen, start = observations(policy.spec, rng, LENGTH, LANES), starts(rng, LENGTH, LANES)
    state = first = initial(policy, rng)
    decisions = []
    for t in range(LENGTH):
        decisions.append(policy.act(row(seen, t), start[t], state, chance(policy.spec, rng, LANES)))
        state = decisions[-1].state
    actions = torch.stack([decision.actions for decision in decisions])
    assert actions.shape == (LENGTH, LANES, *policy.spec.action.shape)
    assert str(actions.dtype) == f"torch.{policy.spec.action.dtype}"
    found = policy.evaluate(seen, start, first, actions)
    for name in ("log_probs", "values"):
        acted = torch.stack([getattr(decision, name) for decision in decisions])
        assert torch.allclose(getattr(found, name), acted, rtol=0, atol=1e-5), name
    assert torch.allclose(found.state, state, rtol=0, atol=1e-5)
    assert torch.equal(found.heads.log_probs, found.log_probs)
    for part in found.heads[2:]:
        assert isinstance(part, dict)
        assert {tuple(tensor.shape) for tensor in part.values()} == {(LENGTH, LANES)}


@every_network
@every_spec
def test_equal_batch_shapes_give_equal_bits(spec: str, network: str) -> None:
    policy, rng = made(spec, network), np.random.default_rng(2)
    seen, start, state = observations(policy.spec, rng, LANES), starts(rng, LANES), initial(policy, rng)
    acted = policy.act(seen, start, state, chance(policy.spec, rng, LANES))
    unrolled = {key: tensor.unsqueeze(0) for key, tensor in seen.items()}
    found = policy.evaluate(unrolled, start.unsqueeze(0), state, acted.actions.unsqueeze(0))
    assert torch.equal(found.log_probs[0], acted.log_probs)
    assert torch.equal(found.values[0], acted.values)
    assert torch.equal(found.state, acted.state)


@every_spec
def test_an_lstm_forgets_at_the_start_of_an_episode_and_only_there(spec: str) -> None:
    policy, rng = made(spec, "lstm"), np.random.default_rng(3)
    seen, begin = observations(policy.spec, rng, LENGTH, LANES), 4
    start = torch.zeros(LENGTH, LANES, dtype=torch.bool)
    start[begin, :2] = True
    one = policy.act(row(seen, 0), start[0], policy.initial_state(LANES), chance(policy.spec, rng, LANES))
    actions = one.actions.expand(LENGTH, *one.actions.shape)
    state = initial(policy, rng)
    before = policy.evaluate(seen, start, state, actions).values
    after = policy.evaluate(seen, start, state + 1, actions).values
    assert torch.equal(before[begin:, :2], after[begin:, :2])
    assert (before[:begin] != after[:begin]).all()
    assert (before[begin:, 2:] != after[begin:, 2:]).any()


def test_a_policy_without_memory_has_no_state_and_sees_rows_alone() -> None:
    policy, rng = made("one", "mlp"), np.random.default_rng(4)
    assert policy.state_size == 0
    assert policy.initial_state(3).shape == (3, 0)
    seen = observations(ONE, rng, LENGTH, LANES)
    actions = torch.zeros(LENGTH, LANES, 1, dtype=torch.int64)
    start = starts(rng, LENGTH, LANES)
    whole = policy.evaluate(seen, start, policy.initial_state(LANES), actions)
    none = policy.evaluate(seen, ~start, policy.initial_state(LANES), actions)
    assert torch.equal(whole.values, none.values)
    for t in range(LENGTH):
        only = {key: tensor[t : t + 1] for key, tensor in seen.items()}
        one = policy.evaluate(only, start[:1], policy.initial_state(LANES), actions[:1])
        assert torch.allclose(one.log_probs[0], whole.log_probs[t], rtol=0, atol=1e-6)
        assert torch.allclose(one.values[0], whole.values[t], rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(("many", "masked", "flat")))
def test_no_mask_is_ever_violated(seed: int, spec: str) -> None:
    rng = np.random.default_rng(seed)
    policy = made(spec, "mlp", seed % 7)
    seen = observations(policy.spec, rng, 64)
    uniforms = chance(policy.spec, rng, 64)
    uniforms[:8], uniforms[8:16] = 0.0, math.nextafter(1.0, 0.0)
    start = torch.zeros(64, dtype=torch.bool)
    decision = policy.act(seen, start, policy.initial_state(64), uniforms)
    action = policy.spec.action
    assert isinstance(action, Choices)
    assert ((decision.actions >= 0) & (decision.actions < torch.tensor(action.sizes))).all()
    if spec == "masked":
        offsets = torch.tensor(np.cumsum([0, *action.sizes[:-1]]))
        assert seen["action_mask"].gather(-1, decision.actions + offsets).all()
    if spec == "flat":
        for chosen, mask in zip(decision.actions.tolist(), seen["action_mask"], strict=True):
            legal = synthetic.legal_choices(mask, chosen[-1], FLAT.mask_layout)
            for head, choice in zip(action.heads, chosen, strict=True):
                assert choice in legal[head], head


def test_actions_depend_on_nothing_but_the_uniforms() -> None:
    policy, rng = made("numbers", "mlp"), np.random.default_rng(5)
    seen, start = observations(NUMBERS, rng, LANES), torch.zeros(LANES, dtype=torch.bool)
    state, uniforms = policy.initial_state(LANES), chance(NUMBERS, rng, LANES)
    before = torch.random.get_rng_state()
    one, same = (policy.act(seen, start, state, uniforms) for _ in range(2))
    other = policy.act(seen, start, state, chance(NUMBERS, rng, LANES))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.actions, same.actions)
    assert not torch.equal(one.actions, other.actions)


# -- parameters --------------------------------------------------------------------------------------------------------


@every_network
@every_spec
def test_every_parameter_learns_and_belongs_to_one_side(spec: str, network: str) -> None:
    policy, rng = made(spec, network), np.random.default_rng(6)
    seen, start = observations(policy.spec, rng, LENGTH, 32), starts(rng, LENGTH, 32)
    state = torch.ones(32, policy.state_size)
    rows = [policy.act(row(seen, t), start[t], state, chance(policy.spec, rng, 32)) for t in range(LENGTH)]
    found = policy.evaluate(seen, start, state, torch.stack([decision.actions for decision in rows]))
    (found.log_probs.sum() + found.entropy.sum() + found.values.square().sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    sides = [id(parameter) for parameter in policy.policy_parameters() + policy.value_parameters()]
    assert sorted(sides) == sorted(id(parameter) for parameter in policy.parameters())


@pytest.mark.parametrize(("shared", "reached"), [(True, True), (False, False)])
def test_the_value_loss_reaches_the_policys_trunk_only_where_it_is_shared(
    shared: bool, reached: bool
) -> None:
    policy = make(ONE, shared_trunk=shared)
    seen = observations(ONE, np.random.default_rng(7), 2, 3)
    start, actions = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, 1, dtype=torch.int64)
    policy.evaluate(seen, start, policy.initial_state(3), actions).values.sum().backward()
    touched = [parameter.grad is not None for parameter in policy.policy_parameters()]
    assert any(touched) == reached
    assert all(parameter.grad is not None for parameter in policy.value_parameters())


@every_network
@every_spec
def test_initial_matrices_are_orthogonal_with_their_gain(spec: str, network: str) -> None:
    policy = make(SPECS[spec], 8, **NETWORKS[network])
    small = {f"heads.{name}" for name in policy.heads.last_layers}
    last = f"value.{len(policy.value) - 1}.weight"
    assert small <= set(dict(policy.named_parameters()))
    for name, parameter in policy.named_parameters():
        if parameter.dim() < 2:
            continue
        weight = parameter.detach().double()
        gain = 0.01 if name in small else 1.0 if name == last else math.sqrt(2)
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        identity = torch.eye(len(gram), dtype=torch.float64)
        assert torch.allclose(gram, gain**2 * identity, atol=1e-6 * gain**2), name


def test_initial_vectors_are_zero_but_for_norms_and_the_forget_gate() -> None:
    for network in ("shared", "lstm"):
        policy = make(ONE, 9, **NETWORKS[network])
        ones = {
            f"{path}.weight" for path, module in policy.named_modules() if isinstance(module, nn.LayerNorm)
        }
        assert bool(ones) == (network == "shared")
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1:
                continue
            expected = torch.full_like(parameter, float(name in ones))
            if name == "recurrent.bias_ih":
                expected[16:32] = 1  # torch orders the gates input, forget, cell, output
            assert torch.equal(parameter, expected), name


@every_spec
def test_acting_records_no_gradients(spec: str) -> None:
    policy = make(SPECS[spec], 2)
    seen = observations(SPECS[spec], np.random.default_rng(2), 3)
    chance = torch.rand((3, policy.chance), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    decision = policy.act(seen, torch.ones(3, dtype=torch.bool), policy.initial_state(3), chance)
    for said in (decision.log_probs, decision.values, decision.state):
        assert said.grad_fn is None
        assert not said.requires_grad


def test_initial_weights_depend_on_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = make(ONE, 3), make(ONE, 3), make(ONE, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, parameter), twin, stranger in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, twin), name
        assert parameter.dim() < 2 or not torch.equal(parameter, stranger), name


@every_spec
def test_the_first_policy_is_nearly_uniform(spec: str) -> None:
    policy = make(SPECS[spec], 10)
    seen = observations(policy.spec, np.random.default_rng(10), 1, 64)
    start = torch.zeros(64, dtype=torch.bool)
    uniforms = chance(policy.spec, np.random.default_rng(10), 64)
    actions = policy.act(row(seen, 0), start, policy.initial_state(64), uniforms).actions
    found = policy.evaluate(seen, start.unsqueeze(0), policy.initial_state(64), actions.unsqueeze(0))
    if isinstance(policy.spec.action, Continuous):
        assert torch.allclose(actions, torch.special.ndtri(uniforms).float(), atol=0.1)
    else:
        for head, entropy in found.heads.head_entropies.items():
            assert ((entropy > 0.999) | (entropy == 0)).all(), head


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "shared", "lstm"])
@every_spec
def test_gradients_are_finite_differences(spec: str, network: str) -> None:
    settings = NETWORKS[network] | {"hidden_size": 8, "hidden_layers": 1}
    policy = make(SPECS[spec], 11, **settings).double()
    rng = np.random.default_rng(11)
    seen = observations(policy.spec, rng, 2, 2)
    seen["vector"] = seen["vector"].double()
    start, state = torch.tensor([[False, True], [False, False]]), torch.ones(2, policy.state_size).double()
    taken = [policy.act(row(seen, t), start[t], state, chance(policy.spec, rng, 2)).actions for t in range(2)]
    named = dict(policy.named_parameters())
    chosen = [
        name for name in named if "bias" in name or name in ("heads.logits.weight", "heads.log_deviation")
    ]

    def outcome(*tensors: Tensor) -> tuple[Tensor, ...]:
        replaced = {f"policy.{name}": tensor for name, tensor in zip(chosen, tensors, strict=True)}
        found = torch.func.functional_call(
            _Evaluating(policy), replaced, (seen, start, state, torch.stack(taken))
        )
        return found.log_probs, found.entropy, found.values

    inputs = tuple(named[name].detach().clone().requires_grad_() for name in chosen)
    assert torch.autograd.gradcheck(outcome, inputs, fast_mode=True)


class _Evaluating(nn.Module):
    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, *arguments: Any) -> object:
        return self.policy.evaluate(*arguments)


# -- free, and the door ------------------------------------------------------------------------------------------------


def test_free_is_one_wherever_nothing_is_masked() -> None:
    for spec in (ONE, NUMBERS):
        assert (
            make(spec).free(observations(spec, np.random.default_rng(12), 3, 4)).tolist() == [[1.0] * 4] * 3
        )
    only = VectorSpec(5, Choices(("a",), (1,)))
    assert make(only).free({"vector": torch.zeros(2, 3, 5)}).tolist() == [[0.0] * 3] * 2


def test_free_is_what_the_masks_say() -> None:
    seen = observations(MASKED, np.random.default_rng(13), 30, 4)
    free = make(MASKED).free(seen)
    mask = seen["action_mask"]
    expected = (mask[..., :3].sum(-1) > 1) | (mask[..., 4:].sum(-1) > 1)
    assert torch.equal(free > 0, expected)
    assert 0 < float(free.mean()) < 1


def test_a_state_without_a_legal_choice_breaks_an_invariant() -> None:
    seen = observations(MASKED, np.random.default_rng(14), 3)
    seen["action_mask"][1, :3] = 0
    policy = make(MASKED)
    start, uniforms = torch.zeros(3, dtype=torch.bool), chance(MASKED, np.random.default_rng(14), 3)
    with pytest.raises(InvariantViolation, match="no legal choice"):
        policy.act(seen, start, policy.initial_state(3), uniforms)


def test_tensors_of_another_shape_are_refused_by_name() -> None:
    policy = make(NUMBERS)
    seen, start = {"vector": torch.zeros(1, 3, 5)}, torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^actions must be \[1, 3, 2\], it is \[1, 3, 1\]$"):
        policy.evaluate(seen, start, policy.initial_state(3), torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match=r"^state must be \[3, 0\]"):
        policy.evaluate(seen, start, torch.zeros(3, 2), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match=r"^observations.vector must be \[1, 3, 5\]"):
        policy.evaluate(
            {"vector": torch.zeros(1, 3, 4)}, start, policy.initial_state(3), torch.zeros(1, 3, 2)
        )


def test_arrays_become_tensors_that_share_their_memory() -> None:
    arrays: dict[str, np.ndarray] = {"vector": np.zeros((2, 5), dtype=np.float32), "other": np.zeros(2)}
    tensors = tensors_of(ONE.shapes(), arrays)
    arrays["vector"][0, 0] = 7
    assert tuple(tensors) == ("vector",)
    assert tensors["vector"][0, 0] == 7


# -- from a configuration to a policy ----------------------------------------------------------------------------------


def test_graphs_get_the_graph_policy() -> None:
    rng = np.random.default_rng(15)
    policy: Policy = build_policy(synthetic.SPEC, keys(), rng)
    assert isinstance(policy, GraphPolicy)
    expected = GraphPolicy(synthetic.SPEC, keys(), np.random.default_rng(15))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_graphs_are_not_read_by_networks_of_vectors(network: str) -> None:
    with pytest.raises(ConfigError, match="^simic_trainer.network: .*reads vectors") as caught:
        build_policy(synthetic.SPEC, keys(network=network), np.random.default_rng(0))
    assert caught.value.key == "simic_trainer.network"


@every_spec
def test_vectors_are_not_read_by_the_graph_network(spec: str) -> None:
    with pytest.raises(ConfigError, match="reads graph observations"):
        build_policy(SPECS[spec], keys(network="graph"), np.random.default_rng(0))


class _Strange:
    """Observations that no policy was made for."""

    action = NUMBERS.action

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"vector": ((5,), "float32")}

    bounds = staticmethod(NUMBERS.bounds)
    present = staticmethod(NUMBERS.present)
    check = staticmethod(NUMBERS.check)


def test_observations_that_no_network_reads_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="no policy reads observations of _Strange"):
        build_policy(_Strange(), keys(), rng)
    with pytest.raises(ConfigError, match="no Q network reads _Strange"):
        q_network(_Strange(), keys(), rng)
    with pytest.raises(ConfigError, match="no value network reads observations of _Strange"):
        VNetwork(_Strange(), keys(), rng)


def test_a_vector_policy_has_the_layers_it_was_asked_for() -> None:
    policy = make(ONE, hidden_layers=3, layer_norm=True, activation="relu", shared_trunk=True)
    kinds = [type(module).__name__ for module in policy.encoder.trunk]  # type: ignore[attr-defined]
    assert kinds == ["Linear", "LayerNorm", "ReLU"] * 3
    assert [type(module).__name__ for module in policy.value] == ["Linear"]
    separate = make(ONE)
    assert [type(module).__name__ for module in separate.value] == ["Linear", "Tanh"] * 2 + ["Linear"]
    assert [parameter.shape[-1] for parameter in separate.value.parameters()] == [5, 16, 16, 16, 16, 1]
    flat = make(FLAT)
    assert flat.encoder.trunk[0].in_features == 9 + 3 * 4  # type: ignore[attr-defined]
