"""Low-rank adapters: exact to the bit where nothing was learned, refused where they do not fit."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_simic.errors import ContractError, InvariantViolation
from esper_simic.policies.actor_critic import ActorCritic
from esper_simic.policies.adapter_state import AdapterState
from esper_simic.policies.lora import (
    Adapters,
    adaptable,
    attach,
    base_weights,
    has_adapters,
    merged_weights,
)
from tests.policies import synthetic
from tests.policies.vectors import ONE, SPECS, make, observations

RANK, ALPHA = 4, 8.0
POLICIES = ("graph", *SPECS, "lstm")

every_policy = pytest.mark.parametrize("name", POLICIES)


def policy_of(name: str, seed: int = 0) -> ActorCritic:
    if name == "graph":
        return synthetic.make_policy(seed, scale=30.0)
    if name == "lstm":
        return make(ONE, seed, scale=30.0, network="lstm")
    return make(SPECS[name], seed, scale=30.0)


def outcome(policy: ActorCritic) -> tuple[Tensor, ...]:
    """What the policy says of some unroll."""
    rng = np.random.default_rng(9)
    spec = policy.spec
    graph = spec is synthetic.SPEC
    seen = synthetic.observations(rng, 3, 4) if graph else observations(spec, rng, 3, 4)
    start, state = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(4, policy.state_size)
    actions = torch.zeros(3, 4, *spec.action.shape, dtype=getattr(torch, spec.action.dtype))
    found = policy.evaluate(seen, start, state, actions)
    return found.log_probs.nan_to_num(), found.entropy, found.values, found.state


def attached(policy: nn.Module, seed: int = 1, *, rank: int = RANK, dropout: float = 0.0) -> Adapters:
    return attach(policy, np.random.default_rng(seed), rank=rank, alpha=ALPHA, dropout=dropout)


def shaken(adapters: Adapters, seed: int = 2) -> Adapters:
    """Adapters that have learned something."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.1))
    return adapters


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the formula -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))
def test_an_adapted_layer_is_base_plus_scaled_product(columns: int, rows: int, rank: int, seed: int) -> None:
    layer = nn.Linear(columns, rows).double()
    base, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    adapters = shaken(attached(layer, seed, rank=rank), seed)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, columns)))
    a, b = (parameter.detach() for parameter in adapters.parameters())
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    expected = x @ base.T + bias + (ALPHA / rank) * ((x @ a.T) @ b.T)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def test_a_is_uniform_from_the_generator_and_b_is_zero() -> None:
    layer = nn.Linear(50, 40)
    before = torch.random.get_rng_state()
    a, b = attached(layer, 3, rank=30).parameters()
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = np.random.default_rng(3).uniform(-1, 1, (30, 50)) / math.sqrt(50)
    assert a.detach().numpy() == pytest.approx(drawn, abs=1e-7)
    assert a.abs().max() > 0.95 / math.sqrt(50)
    assert not b.any()


def test_gradients_are_finite_differences() -> None:
    layer = nn.Linear(3, 2).double()
    adapters = shaken(attached(layer, rank=2))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3)))
    names = ["parametrizations.weight.0.a", "parametrizations.weight.0.b"]

    def forward(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,))
        return found

    assert torch.autograd.gradcheck(forward, tuple(adapters.parameters()))


# -- exactness ---------------------------------------------------------------------------------------------------------


@every_policy
def test_fresh_adapters_change_no_bit(name: str) -> None:
    policy = policy_of(name)
    expected, state = outcome(policy), copy.deepcopy(policy.state_dict())
    adapters = attached(policy)
    assert set(adapters.names) == set(adaptable(policy_of(name)))
    assert equal(outcome(policy), expected)
    assert same(adapters.merged_state_dict(), state)
    assert same(adapters.base_state_dict(), state)


@every_policy
def test_actors_without_adapters_compute_the_same_from_the_merged_state(name: str) -> None:
    policy = policy_of(name)
    before = outcome(policy)
    adapters = shaken(attached(policy))
    expected = outcome(policy)
    assert not equal(expected, before)
    actor = policy_of(name, seed=5)
    actor.load_state_dict(
        safetensors.torch.load(
            safetensors.torch.save(
                {key: tensor.contiguous() for key, tensor in adapters.merged_state_dict().items()}
            )
        )
    )
    assert equal(outcome(actor), expected)


@every_policy
def test_merging_and_taking_apart_leaves_every_bit(name: str) -> None:
    policy = policy_of(name)
    state = copy.deepcopy(policy.state_dict())
    adapters = shaken(attached(policy))
    whole, expected = copy.deepcopy(policy.state_dict()), outcome(policy)
    merged = []
    for _ in range(3):
        adapters.merge()
        merged.append(adapters.merged)
        assert equal(outcome(policy), expected)
        adapters.unmerge()
        merged.append(adapters.merged)
        assert same(policy.state_dict(), whole)
    assert merged == [True, False] * 3
    assert same(adapters.base_state_dict(), state)
    adapters.detach()
    assert same(dict(policy.state_dict()), state)
    assert adapters.names == ()


@every_policy
def test_folding_leaves_the_effective_weights_as_the_policys_own(name: str) -> None:
    policy = policy_of(name)
    adapters = shaken(attached(policy))
    expected, merged = outcome(policy), adapters.merged_state_dict()
    adapters.fold()
    assert equal(outcome(policy), expected)
    assert same(dict(policy.state_dict()), merged)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_what_was_merged_does_not_follow_later_learning_until_it_is_merged_again() -> None:
    policy = policy_of("one")
    adapters = shaken(attached(policy))
    adapters.merge()
    before = outcome(policy)
    shaken(adapters, seed=3)
    assert equal(outcome(policy), before)
    adapters.merge()
    assert not equal(outcome(policy), before)
    assert not any(tensor.requires_grad for tensor in adapters.merged_state_dict().values())


# -- learning ----------------------------------------------------------------------------------------------------------


@every_policy
def test_only_adapters_learn_where_the_base_is_frozen(name: str) -> None:
    policy = policy_of(name)
    state = copy.deepcopy(policy.state_dict())
    adapters = attached(policy)
    adapters.freeze_base()
    mine = {id(parameter) for parameter in adapters.parameters()}
    sides = policy.policy_parameters() + policy.value_parameters()
    assert {id(parameter) for parameter in sides} == mine
    assert len(sides) == len(mine)
    assert len(policy.value_parameters()) > 0
    optimizer = torch.optim.Adam(sides, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([part.sum() for part in outcome(policy)[:3]]).sum().backward()
        optimizer.step()
    assert same(adapters.base_state_dict(), state)
    assert not same(adapters.merged_state_dict(), state)
    adapters.unfreeze_base()
    assert all(parameter.requires_grad for parameter in policy.parameters())


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_the_named_stream_and_ends_with_its_block() -> None:
    policy = policy_of("one")
    adapters = shaken(attached(policy, dropout=0.5))
    whole = outcome(policy)

    def dropped(seed: int) -> tuple[Tensor, ...]:
        with adapters.dropping(np.random.default_rng(seed)):
            return outcome(policy)

    before = torch.random.get_rng_state()
    one, twin, other = dropped(1), dropped(1), dropped(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(one, twin)
    assert not equal(one, other)
    assert not equal(one, whole)
    assert equal(outcome(policy), whole)


def test_dropout_leaves_out_coordinates_of_the_rank_and_scales_up_the_others() -> None:
    layer = nn.Linear(5, 4).double()
    base = layer.weight.detach().clone()
    adapters = shaken(attach(layer, np.random.default_rng(1), rank=40, alpha=1.0, dropout=0.25))
    a, b = (parameter.detach() for parameter in adapters.parameters())
    with adapters.dropping(np.random.default_rng(7)):
        found = layer.weight.detach()
    kept = np.random.default_rng(7).random(40) >= 0.25
    assert 0 < kept.sum() < 40
    expected = base + sum(
        torch.outer(b[:, index], a[index]) / 0.75 / 40 for index in range(40) if kept[index]
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_mean_over_dropouts_is_the_whole_adapter() -> None:
    layer = nn.Linear(3, 2).double()
    adapters = shaken(attached(layer, dropout=0.3))
    whole = layer.weight.detach().clone()
    base = adapters.base_state_dict()["weight"]
    total = torch.zeros_like(whole)
    for seed in range(4000):
        with adapters.dropping(np.random.default_rng(seed)):
            total += layer.weight.detach()
    error = (total / 4000 - whole).abs().max() / (whole - base).abs().max()
    assert error < 0.05


def test_merged_adapters_do_not_drop() -> None:
    adapters = attached(policy_of("one"), dropout=0.5)
    adapters.merge()
    with (
        pytest.raises(InvariantViolation, match="unmerge"),
        adapters.dropping(np.random.default_rng(0)),
    ):
        pass


# -- saved alone -------------------------------------------------------------------------------------------------------


@every_policy
def test_adapters_are_saved_and_loaded_alone(name: str) -> None:
    policy, other = policy_of(name), policy_of(name)
    adapters, others = shaken(attached(policy)), attached(other, seed=7)
    state = adapters.adapter_state()
    buffers = {key for key in state.tensors if key.startswith("normaliser.")}
    assert buffers
    assert state.tensors.keys() - buffers == {
        f"{weight}.{part}" for weight in adapters.names for part in "ab"
    }
    assert state.matrices == len(adapters.names)
    kept = {key: tensor.clone() for key, tensor in state.tensors.items()}
    others.load_adapter_state(state)
    assert equal(outcome(other), outcome(policy))
    shaken(adapters, seed=8)
    assert same(state.tensors, kept)


def test_the_statistics_that_adapters_learned_with_come_along() -> None:
    policy, other = policy_of("one"), policy_of("one")
    adapters, others = shaken(attached(policy)), attached(other)
    policy.normaliser.update(observations(ONE, np.random.default_rng(0), 5))
    assert not equal(outcome(other), outcome(policy))
    others.load_adapter_state(adapters.adapter_state())
    assert equal(outcome(other), outcome(policy))


def test_loading_into_merged_adapters_merges_anew() -> None:
    policy, other = policy_of("one"), policy_of("one")
    adapters, others = shaken(attached(policy)), attached(other)
    others.merge()
    others.load_adapter_state(adapters.adapter_state())
    assert equal(outcome(other), outcome(policy))


@every_policy
def test_a_file_of_adapters_holds_all_of_them(name: str) -> None:
    policy, other = policy_of(name), policy_of(name)
    adapters, others = shaken(attached(policy)), attached(other, seed=7)
    state = AdapterState.from_bytes(adapters.adapter_state().to_bytes())
    assert (state.rank, state.alpha, state.base_digest) == (RANK, adapters.alpha, adapters.base_digest())
    others.load_adapter_state(state)
    assert equal(outcome(other), outcome(policy))


def test_what_is_no_file_of_adapters_says_so() -> None:
    state = attached(policy_of("one")).adapter_state()
    data = state.to_bytes()
    with pytest.raises(ContractError, match="no safetensors file"):
        AdapterState.from_bytes(data[:-1])
    with pytest.raises(ContractError, match="does not hold adapters"):
        AdapterState.from_bytes(safetensors.torch.save(state.tensors))
    with pytest.raises(ContractError, match="does not hold adapters"):
        AdapterState.from_bytes(data.replace(b'"rank":"4"', b'"rank":"x"'))
    with pytest.raises(ContractError, match="of format 'simic-adapters-9', known is 'simic-adapters-1'"):
        AdapterState.from_bytes(data.replace(b"simic-adapters-1", b"simic-adapters-9"))


def test_a_state_tells_its_base_and_what_it_comes_to() -> None:
    policy = policy_of("one")
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    assert not has_adapters(before)
    assert same(base_weights(before), before)
    adapters = shaken(attached(policy))
    state = policy.state_dict()
    assert has_adapters(state)
    assert same(base_weights(state), before)
    assert same(merged_weights(state, rank=RANK, alpha=adapters.alpha), adapters.merged_state_dict())


def refused(adapters: Adapters, state: object, says: str) -> None:
    before = {key: tensor.clone() for key, tensor in adapters.adapter_state().tensors.items()}
    with pytest.raises(ContractError, match=says):
        adapters.load_adapter_state(state)  # type: ignore[arg-type]
    assert same(adapters.adapter_state().tensors, before)


def test_whatever_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    adapters = shaken(attached(policy_of("one")))
    state = attached(policy_of("one"), seed=4).adapter_state()
    first, last = "encoder.trunk.0.weight.a", "value.4.weight.b"
    assert {first, last} <= set(state.tensors)
    lacking = {key: tensor for key, tensor in state.tensors.items() if key != last}
    refused(adapters, dataclasses.replace(state, tensors=lacking), f"lack {last}$")
    more = state.tensors | {"encoder.trunk.9.weight.a": torch.zeros(1)}
    refused(adapters, dataclasses.replace(state, tensors=more), "hold encoder.trunk.9.weight.a,")
    wider = state.tensors | {first: torch.zeros(RANK, 6)}
    refused(adapters, dataclasses.replace(state, tensors=wider), rf"{first} is \[4, 6\]")
    finer = state.tensors | {first: state.tensors[first].double()}
    refused(
        adapters, dataclasses.replace(state, tensors=finer), rf"{first} is .*float64, wanted is .*float32"
    )
    refused(adapters, attached(policy_of("one"), rank=2).adapter_state(), "rank 2 do not fit .* rank 4")
    refused(adapters, dataclasses.replace(state, alpha=9.0), "alpha 9.0 do not fit")
    refused(adapters, attached(policy_of("one", seed=1)).adapter_state(), "base digest")


def test_the_base_digest_follows_the_base_and_nothing_else() -> None:
    policy = policy_of("one")
    adapters = attached(policy)
    before = adapters.base_digest()
    shaken(adapters)
    policy.normaliser.update(observations(ONE, np.random.default_rng(0), 5))
    assert adapters.base_digest() == before
    with torch.no_grad():
        policy.get_parameter("value.0.bias")[0] += 1
    assert adapters.base_digest() != before


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_every_matrix_but_embeddings_can_be_adapted() -> None:
    policy = policy_of("graph")
    matrices = {name for name, parameter in policy.named_parameters() if parameter.dim() == 2}
    embeddings = {"encoder.blueprints.weight", "heads.op_embedding.weight"}
    assert set(adaptable(policy)) == matrices - embeddings
    assert {"recurrent.weight_ih", "recurrent.weight_hh", "encoder.convolutions.0.lin_l.weight"} < matrices


def test_chosen_weights_alone_are_adapted() -> None:
    policy = policy_of("one")
    rng = np.random.default_rng(0)
    adapters = attach(policy, rng, rank=2, alpha=1.0, names=["encoder.trunk.0.weight"])
    assert adapters.names == ("encoder.trunk.0.weight",)
    assert "encoder.trunk.0.weight" not in adaptable(policy)
    with pytest.raises(ValueError, match="heads.logits.bias is no weight that can be adapted"):
        attach(policy, rng, rank=2, alpha=1.0, names=["heads.logits.bias"])


@pytest.mark.parametrize(
    ("rank", "alpha", "dropout"), [(0, 1.0, 0.0), (1, 0.0, 0.0), (1, 1.0, 1.0), (1, 1.0, -0.1)]
)
def test_numbers_out_of_range_are_refused(rank: int, alpha: float, dropout: float) -> None:
    with pytest.raises(ValueError, match="are wanted"):
        attach(policy_of("one"), np.random.default_rng(0), rank=rank, alpha=alpha, dropout=dropout)
