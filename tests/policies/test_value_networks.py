"""Q and V networks, against their own weights read one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic.actions import HEADS, OP, RELEVANT_HEADS, Op
from esper_simic.errors import ConfigError
from esper_simic.policies.normaliser import AsTheyAre
from esper_simic.policies.value_networks import ActionQ, ChoiceQ, TwinQ, VNetwork, q_network
from esper_simic.specs import Choices, ExperienceSpec
from tests.policies import synthetic
from tests.policies.vectors import FLAT, MANY, NUMBERS, ONE, SPECS, keys, observations

ALL: dict[str, ExperienceSpec] = SPECS | {"graph": synthetic.SPEC}
COUNT = 12


def seen_by(spec: ExperienceSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    seen = synthetic.observations(rng, COUNT) if spec is synthetic.SPEC else observations(spec, rng, COUNT)
    return seen, AsTheyAre(spec)(seen)


def actions_of(spec: ExperienceSpec) -> Tensor:
    rng = np.random.default_rng(1)
    if isinstance(spec.action, Choices):
        return torch.from_numpy(rng.integers(0, spec.action.sizes, size=(COUNT, len(spec.action.sizes))))
    return torch.from_numpy(rng.normal(size=(COUNT, *spec.action.shape)).astype(np.float32))


@pytest.mark.parametrize("name", ALL)
def test_v_and_q_give_one_number_a_row_and_every_parameter_learns(name: str) -> None:
    spec = ALL[name]
    seen, features = seen_by(spec)
    v = VNetwork(spec, keys(), np.random.default_rng(2))
    q = TwinQ(spec, keys(), np.random.default_rng(3))
    actions = actions_of(spec)
    first, second = q(seen, features, actions)
    values = v(seen, features)
    assert values.shape == first.shape == second.shape == (COUNT,)
    assert not torch.equal(first, second)
    assert torch.equal(q.lower(seen, features, actions), torch.minimum(first, second))
    (values.square().sum() + first.square().sum() + second.square().sum()).backward()
    for network in (v, q):
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name


def test_q_of_a_single_head_is_one_number_a_choice() -> None:
    seen, features = seen_by(ONE)
    q = ChoiceQ(ONE, keys(), np.random.default_rng(4))
    (every,) = q.every(seen, features)
    assert every.shape == (COUNT, 3)
    for choice in range(3):
        actions = torch.full((COUNT, 1), choice)
        assert torch.equal(q(seen, features, actions), every[:, choice])


def test_q_of_several_heads_is_the_sum_of_their_terms() -> None:
    seen, features = seen_by(MANY)
    q = ChoiceQ(MANY, keys(), np.random.default_rng(5))
    actions = actions_of(MANY)
    terms = q.every(seen, features)
    assert [part.shape[1] for part in terms] == [3, 1, 4]
    for row, action in enumerate(actions.tolist()):
        expected = sum(part[row, choice].item() for part, choice in zip(terms, action, strict=True))
        assert q(seen, features, actions)[row].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spec", [synthetic.SPEC, FLAT])
@pytest.mark.parametrize("op", Op)
def test_a_head_that_the_operation_does_not_use_adds_nothing(spec: ExperienceSpec, op: Op) -> None:
    seen, features = seen_by(spec)
    q = ChoiceQ(spec, keys(), np.random.default_rng(6))
    actions = actions_of(spec)
    actions[:, OP] = op
    before = q(seen, features, actions)
    for index, head in enumerate(HEADS):
        if head == "op":
            continue
        changed = actions.clone()
        changed[:, index] = (changed[:, index] + 1) % spec.action.sizes[index]  # type: ignore[union-attr]
        moved = bool((q(seen, features, changed) != before).all())
        assert moved == (head in RELEVANT_HEADS[op]), head


def test_q_of_numbers_reads_the_action() -> None:
    seen, features = seen_by(NUMBERS)
    q = q_network(NUMBERS, keys(), np.random.default_rng(7))
    assert isinstance(q, ActionQ)
    actions = actions_of(NUMBERS)
    assert (q(seen, features, actions) != q(seen, features, actions + 1)).all()


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="take ActionQ"):
        ChoiceQ(NUMBERS, keys(), np.random.default_rng(0))


def test_initial_weights_depend_on_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (TwinQ(ONE, keys(), np.random.default_rng(seed)) for seed in (8, 8, 9))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)
