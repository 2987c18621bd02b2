"""The controller as a whole: acting and learning see the same policy, and only what they should see."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_simic.actions import OP
from esper_simic.config import TrainerConfig
from esper_simic.errors import InvariantViolation
from esper_simic.graphs import OBSERVATION_KEYS
from esper_simic.policies.graph_policy import GraphPolicy, observations_from_numpy
from tests.policies.synthetic import (
    CONFIG,
    SPEC,
    Observations,
    make_policy,
    observations,
    trajectory,
    uniforms,
)

LENGTH, LANES = 7, 6


@pytest.fixture(scope="module")
def policy() -> GraphPolicy:
    """Far from uniform, with statistics of its own."""
    made = make_policy(0, scale=100.0)
    made.normaliser.update(observations(np.random.default_rng(0), 50))
    return made


def row(seen: Observations, t: int) -> Observations:
    return {key: tensor[t] for key, tensor in seen.items()}


def test_evaluating_an_unroll_repeats_what_acting_said(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(1)
    seen = observations(rng, LENGTH, LANES)
    start = torch.from_numpy(rng.random((LENGTH, LANES)) < 0.3)
    initial = torch.from_numpy(rng.normal(size=(LANES, policy.state_size)).astype(np.float32))
    state, decisions = initial, []
    for t in range(LENGTH):
        decisions.append(policy.act(row(seen, t), start[t], state, uniforms(rng, LANES)))
        state = decisions[-1].state
    assert start[1:].any()
    found = policy.evaluate(seen, start, initial, torch.stack([decision.actions for decision in decisions]))
    for name in ("log_probs", "values"):
        acted = torch.stack([getattr(decision, name) for decision in decisions])
        assert torch.allclose(getattr(found, name), acted, rtol=0, atol=1e-5), name
    assert torch.allclose(found.state, state, rtol=0, atol=1e-5)
    assert found.entropy.shape == (LENGTH, LANES)


def test_equal_batch_shapes_give_equal_bits(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(2)
    seen = observations(rng, LANES)
    start = torch.from_numpy(rng.random(LANES) < 0.5)
    state = torch.from_numpy(rng.normal(size=(LANES, policy.state_size)).astype(np.float32))
    acted = policy.act(seen, start, state, uniforms(rng, LANES))
    unrolled = {key: tensor.unsqueeze(0) for key, tensor in seen.items()}
    found = policy.evaluate(unrolled, start.unsqueeze(0), state, acted.actions.unsqueeze(0))
    assert torch.equal(found.log_probs[0], acted.log_probs)
    assert torch.equal(found.values[0], acted.values)
    assert torch.equal(found.state, acted.state)


def evaluate(policy: GraphPolicy, seen: Observations, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Values and log-probabilities of always waiting and, in a second row of lanes, of whatever is first legal."""
    actions = torch.zeros(*start.shape, 8, dtype=torch.int64)
    with torch.no_grad():
        found = policy.evaluate(seen, start, state, actions)
    return found.values, found.log_probs


@pytest.mark.parametrize("what", ["initial_state", "earlier_observations"])
def test_nothing_before_an_episode_start_is_remembered(policy: GraphPolicy, what: str) -> None:
    rng = np.random.default_rng(3)
    seen, begin = observations(rng, LENGTH, LANES), 4
    start = torch.zeros(LENGTH, LANES, dtype=torch.bool)
    start[begin, :3] = True
    state = torch.from_numpy(rng.normal(size=(LANES, policy.state_size)).astype(np.float32))
    before = evaluate(policy, seen, start, state)
    if what == "initial_state":
        state = state + 1
    else:
        seen["globals"][:begin] += 1
    after = evaluate(policy, seen, start, state)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[begin:, :3], other[begin:, :3])
        assert (one[:begin] != other[:begin]).any(dim=0).all()
        assert (one[begin:, 3:] != other[begin:, 3:]).any()


def test_lanes_do_not_see_each_other(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(4)
    seen, other = observations(rng, LENGTH, LANES), observations(rng, LENGTH, LANES)
    start = torch.zeros(LENGTH, LANES, dtype=torch.bool)
    state = policy.initial_state(LANES)
    before = evaluate(policy, seen, start, state)
    for key in OBSERVATION_KEYS:
        seen[key][:, 1:] = other[key][:, 1:]
    after = evaluate(policy, seen, start, state)
    for one, two in zip(before, after, strict=True):
        assert torch.allclose(one[:, 0], two[:, 0], rtol=0, atol=1e-6)
        assert not torch.allclose(one[:, 1:], two[:, 1:])


def test_padding_influences_nothing(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(5)
    seen = observations(rng, 60)
    chance, start = uniforms(rng, 60), torch.zeros(60, dtype=torch.bool)
    before = policy.act(seen, start, policy.initial_state(60), chance)
    host, slot = seen["host_mask"].bool(), seen["slot_mask"].bool()
    assert not host.all()
    assert not slot.all()
    seen["host_nodes"] = torch.where(host.unsqueeze(-1), seen["host_nodes"], 7.0)
    seen["slot_nodes"] = torch.where(slot.unsqueeze(-1), seen["slot_nodes"], -7.0)
    seen["slot_host"] = torch.where(slot, seen["slot_host"], SPEC.host_nodes - 1)
    seen["slot_blueprint"] = torch.where(slot, seen["slot_blueprint"], 3)
    after = policy.act(seen, start, policy.initial_state(60), chance)
    for name in before._fields:
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_a_packed_batch_equals_graph_by_graph(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(6)
    seen = observations(rng, 20)
    features = policy.normaliser(seen)
    whole = policy.encoder(seen, features)
    for index in range(20):
        only = slice(index, index + 1)
        one = policy.encoder(
            {key: tensor[only] for key, tensor in seen.items()},
            {key: tensor[only] for key, tensor in features.items()},
        )
        assert torch.allclose(one.whole, whole.whole[only], rtol=0, atol=1e-6)
        mask = seen["slot_mask"][only].bool()
        assert torch.allclose(one.slots[mask], whole.slots[only][mask], rtol=0, atol=1e-6)


def test_the_encoder_passes_messages_along_edges(policy: GraphPolicy) -> None:
    seen = observations(np.random.default_rng(7), 1)
    for key in ("host_mask", "slot_mask"):
        seen[key].fill_(1)
    seen["slot_host"] = torch.tensor([[0, 0, 4]])
    before = policy.encoder(seen, policy.normaliser(seen)).slots
    seen["host_nodes"][0, 0] += 1
    after = policy.encoder(seen, policy.normaliser(seen)).slots
    # Two rounds reach from layer 0 to the slots behind it, and not to the slot four layers on.
    assert (before[0, :2] != after[0, :2]).any(dim=-1).all()
    assert torch.equal(before[0, 2], after[0, 2])


# -- parameters --------------------------------------------------------------------------------------------------------


def test_policy_and_value_parameters_are_all_parameters_each_once(policy: GraphPolicy) -> None:
    parts = [id(parameter) for parameter in policy.policy_parameters() + policy.value_parameters()]
    assert len(set(parts)) == len(parts)
    assert set(parts) == {id(parameter) for parameter in policy.parameters()}
    assert {id(parameter) for parameter in policy.value.parameters()} == {
        id(parameter) for parameter in policy.value_parameters()
    }


def test_every_parameter_learns() -> None:
    policy = make_policy(1, scale=10.0)
    seen = trajectory(policy, seed=1, length=LENGTH, lanes=32)
    found = policy.evaluate(
        {key: tensor[:-1] for key, tensor in seen.observations.items()},
        seen.episode_start[:-1],
        seen.initial_state,
        seen.actions,
    )
    (found.log_probs.sum() + found.entropy.sum() + found.values.square().sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def global_chance() -> tuple[bytes, bytes, int]:
    """The states of torch's and NumPy's global generators."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 - only looked at
    return torch.random.get_rng_state().numpy().tobytes(), state["key"].tobytes(), state["pos"]


def test_initial_weights_depend_on_the_generator_alone() -> None:
    before = global_chance()
    one, same, other = make_policy(3), make_policy(3), make_policy(4)
    assert global_chance() == before
    for (name, parameter), twin, stranger in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, twin), name
        if parameter.dim() > 1:
            assert not torch.equal(parameter, stranger), name


def test_nothing_draws_from_the_global_generator(policy: GraphPolicy) -> None:
    before = global_chance()
    trajectory(policy, seed=2, length=2, lanes=3)
    evaluate(
        policy,
        observations(np.random.default_rng(8), 2, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        policy.initial_state(3),
    )
    assert global_chance() == before


SMALL = {"heads.op.weight", "heads.slot_out.weight", "heads.choice_out.weight"}


def test_initial_matrices_are_orthogonal_with_their_gain() -> None:
    policy = make_policy(5)
    matrices = {name: parameter for name, parameter in policy.named_parameters() if parameter.dim() > 1}
    assert set(matrices) > SMALL
    for name, parameter in matrices.items():
        weight = parameter.detach().double().flatten(1)
        gain = 0.01 if name in SMALL else 1.0 if name == "value.3.weight" else math.sqrt(2)
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(
            gram, gain**2 * torch.eye(len(gram), dtype=torch.float64), atol=1e-6 * gain**2
        ), name


def test_initial_vectors_are_zero_but_for_norms_and_the_forget_gate() -> None:
    policy = make_policy(6)
    norms = {
        id(p) for module in policy.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()
    }
    hidden = CONFIG.hidden_size
    for name, parameter in policy.named_parameters():
        if parameter.dim() > 1:
            continue
        if id(parameter) in norms:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        elif name == "recurrent.bias_ih":
            expected = torch.zeros(4 * hidden)
            expected[hidden : 2 * hidden] = 1  # torch orders the gates input, forget, cell, output
            assert torch.equal(parameter, expected)
        else:
            assert not parameter.any(), name


def test_the_first_policy_is_nearly_uniform() -> None:
    policy = make_policy(7, TrainerConfig())
    seen = trajectory(policy, seed=3, length=3, lanes=64)
    found = policy.evaluate(
        {key: tensor[:-1] for key, tensor in seen.observations.items()},
        seen.episode_start[:-1],
        seen.initial_state,
        seen.actions,
    )
    for head, entropy in found.heads.head_entropies.items():
        assert ((entropy > 0.999) | (entropy == 0)).all(), head
    assert len(set(seen.actions[..., OP].flatten().tolist())) == 6


def test_the_forget_gate_starts_open() -> None:
    policy = make_policy(8)
    hidden = CONFIG.hidden_size
    zero = torch.zeros(1, hidden)
    with torch.no_grad():
        _, cell = policy.recurrent(zero, (zero, torch.ones(1, hidden)))
    assert cell.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-1))] * hidden)


# -- the edge to NumPy -------------------------------------------------------------------------------------------------


def test_tensors_share_memory_with_the_arrays_they_were_made_of() -> None:
    arrays = {key: tensor.numpy() for key, tensor in observations(np.random.default_rng(9), 4).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = observations_from_numpy(arrays)
    arrays["globals"][0, 0] = 42.0
    assert tuple(tensors) == OBSERVATION_KEYS
    assert tensors["globals"][0, 0] == 42.0


def test_the_initial_state_is_empty(policy: GraphPolicy) -> None:
    state = policy.initial_state(3)
    assert state.shape == (3, policy.state_size)
    assert not state.any()


# -- the door ----------------------------------------------------------------------------------------------------------


def test_tensors_of_another_shape_or_dtype_are_refused_by_name(policy: GraphPolicy) -> None:
    rng = np.random.default_rng(10)
    seen, start = observations(rng, LANES), torch.zeros(LANES, dtype=torch.bool)
    state, chance = policy.initial_state(LANES), uniforms(rng, LANES)
    for name, arguments in (
        ("observations.globals", (seen | {"globals": seen["globals"][:1]}, start, state, chance)),
        ("episode_start", (seen, start.float(), state, chance)),
        ("state", (seen, start, state[:1], chance)),
        ("uniforms", (seen, start, state, chance[:, :1])),
        ("uniforms", (seen, start, state, chance.float())),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            policy.act(*arguments)
    rows = {key: tensor.unsqueeze(0) for key, tensor in seen.items()}
    actions = torch.zeros(1, LANES, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="^actions must be "):
        policy.evaluate(rows, start.unsqueeze(0), state, actions[..., :1])
    del rows["globals"]
    with pytest.raises(ValueError, match="^observations lack globals"):
        policy.evaluate(rows, start.unsqueeze(0), state, actions)


@pytest.mark.parametrize("what", ["an observation", "a policy weight", "a value weight"])
def test_what_is_not_finite_does_not_become_an_action(what: str) -> None:
    policy, rng = make_policy(11), np.random.default_rng(11)
    seen = observations(rng, LANES)
    if what == "an observation":
        seen["globals"][0, 0] = math.nan
    else:
        name = "heads.op.weight" if what == "a policy weight" else "value.0.weight"
        with torch.no_grad():
            policy.get_parameter(name)[0, 0] = math.nan
    with pytest.raises(InvariantViolation, match="not finite"):
        policy.act(
            seen, torch.zeros(LANES, dtype=torch.bool), policy.initial_state(LANES), uniforms(rng, LANES)
        )


def test_free_is_what_the_masks_say(policy: GraphPolicy) -> None:
    seen = observations(np.random.default_rng(12), LENGTH, LANES)
    seen["action_mask"][2, 3, SPEC.mask_layout.op] = torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.int8)
    free = policy.free(seen)
    assert free.shape == (LENGTH, LANES)
    assert free[2, 3] == 0
    operations = seen["action_mask"][..., SPEC.mask_layout.op].sum(dim=-1)
    assert torch.equal(free > 0, operations > 1)


def test_parameters_that_do_not_learn_are_no_ones_parameters() -> None:
    policy = make_policy(13)
    before = len(policy.policy_parameters()), len(policy.value_parameters())
    policy.encoder.host_in.weight.requires_grad_(False)
    policy.value[0].weight.requires_grad_(False)
    assert (len(policy.policy_parameters()), len(policy.value_parameters())) == (before[0] - 1, before[1] - 1)


def test_unnormalised_numbers_pass_as_they_are() -> None:
    bare = GraphPolicy(SPEC, CONFIG, np.random.default_rng(14), normalise=False)
    seen = observations(np.random.default_rng(14), 5)
    bare.normaliser.update(seen)
    found = bare.normaliser(seen)
    assert {key: id(tensor) for key, tensor in found.items()} == {
        key: id(seen[key]) for key in ("host_nodes", "slot_nodes", "globals")
    }
    assert bare.normaliser.state_dict() == {}
    assert not [name for name in bare.state_dict() if "normaliser" in name]
