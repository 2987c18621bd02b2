"""The factored action: masks, causality, sampling, entropies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from esper_simic.actions import CHOICE_HEADS, CHOICES, HEADS, OP, RELEVANT_HEADS, SLOT, Op
from esper_simic.algorithms.entropy_floor import EntropyFloor, entropy_floor_penalty
from esper_simic.errors import InvariantViolation
from esper_simic.policies.heads import MASKED_LOGIT, FactoredHeads, FlatGrowthHeads
from esper_simic.policies.parts import HeadEvaluation, Latent
from esper_simic.policies.sampling import invert
from tests.policies.synthetic import SPEC, is_in_range, legal_choices, observations, packed_masks, uniforms

CORE, NODE = 12, 6
LAYOUT = SPEC.mask_layout


@pytest.fixture(scope="module")
def heads() -> FactoredHeads:
    """Heads that prefer some choices clearly over others."""
    made = FactoredHeads(CORE, NODE, LAYOUT)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.4))
    return made


def inputs(seed: int, count: int) -> Latent:
    rng = np.random.default_rng(seed)
    core = torch.from_numpy(rng.normal(size=(count, CORE)).astype(np.float32))
    slots = torch.from_numpy(rng.normal(size=(count, LAYOUT.slots, NODE)).astype(np.float32))
    mask = packed_masks(rng, np.ones((count, LAYOUT.slots), dtype=bool), LAYOUT)
    return Latent(core, slots, torch.from_numpy(mask))


def repeated(arguments: Latent, count: int) -> Latent:
    return Latent(*(tensor.expand(count, *tensor.shape[1:]) for tensor in arguments))


# -- the distribution function -----------------------------------------------------------------------------------------


def literal_choice(logits: list[float], legal: list[bool], uniform: float) -> int:
    weights = [math.exp(x) if is_legal else 0.0 for x, is_legal in zip(logits, legal, strict=True)]
    remaining = uniform * sum(weights)
    for choice, weight in enumerate(weights):
        if remaining < weight:
            return choice
        remaining -= weight
    raise AssertionError("uniform is below 1")


@given(st.integers(0, 2**32 - 1), st.integers(1, 13), st.floats(0, 0.999))
def test_inversion_equals_a_walk_along_the_choices(seed: int, size: int, uniform: float) -> None:
    rng = np.random.default_rng(seed)
    logits, legal = rng.normal(size=size), rng.random(size) < 0.6
    legal[rng.integers(size)] = True
    masked = torch.from_numpy(np.where(legal, logits, MASKED_LOGIT).astype(np.float32))
    found = invert(
        masked.unsqueeze(0),
        torch.from_numpy(legal).unsqueeze(0),
        torch.tensor([uniform], dtype=torch.float64),
    )
    expected = literal_choice(masked.tolist(), legal.tolist(), uniform)
    if int(found) != expected:  # only where the uniform lies on the border between them
        weights = masked.double().softmax(0).cumsum(0)
        assert abs(float(weights[min(int(found), expected)]) - uniform) < 1e-12
    assert legal[int(found)]


@pytest.mark.parametrize("legal", [row for row in itertools.product((False, True), repeat=5) if any(row)])
def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_legal_choice(
    legal: tuple[bool, ...],
) -> None:
    logits = torch.where(torch.tensor(legal), torch.tensor([0.3, -2.0, 5.0, 0.0, -7.0]), MASKED_LOGIT)
    first, last = legal.index(True), 4 - legal[::-1].index(True)
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert invert(logits.expand(2, 5), torch.tensor(legal).expand(2, 5), ends).tolist() == [first, last]


def test_a_choice_too_unlikely_to_change_the_sum_is_never_drawn_at_the_end() -> None:
    logits = torch.tensor([[0.0, -80.0]])
    end = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert invert(logits, torch.ones(1, 2, dtype=torch.bool), end).item() == 0


@pytest.mark.parametrize(("uniform", "choice"), [(0.0, 1), (0.4, 1), (0.5, 3), (math.nextafter(1.0, 0.0), 3)])
def test_a_mask_holds_although_every_legal_logit_fell_below_the_masked_ones(
    uniform: float, choice: int
) -> None:
    logits = torch.tensor([[MASKED_LOGIT, -3e4, MASKED_LOGIT, -3e4, MASKED_LOGIT]])
    found = invert(logits, logits < MASKED_LOGIT, torch.tensor([uniform], dtype=torch.float64))
    assert found.item() == choice


# -- masks -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), edge=st.sampled_from((None, 0.0, math.nextafter(1.0, 0.0))))
def test_no_mask_is_ever_violated(heads: FactoredHeads, seed: int, edge: float | None) -> None:
    arguments = inputs(seed, 64)
    chance = uniforms(np.random.default_rng(seed), 64)
    if edge is not None:
        chance = torch.full_like(chance, edge)
    actions, log_probs = heads.sample(arguments, chance)
    assert is_in_range(actions)
    for row, mask in zip(actions, arguments[2], strict=True):
        legal = legal_choices(mask, int(row[OP]))
        for head, choice in zip(HEADS, row.tolist(), strict=True):
            assert choice in legal[head], head
    assert (log_probs > -50).all()


def test_a_state_without_a_legal_operation_breaks_an_invariant(heads: FactoredHeads) -> None:
    core, slots, mask = inputs(0, 3)
    mask[1, LAYOUT.op] = 0
    with pytest.raises(InvariantViolation, match="no legal operation"):
        heads.sample(Latent(core, slots, mask), uniforms(np.random.default_rng(0), 3))
    with pytest.raises(InvariantViolation, match="no legal operation"):
        heads.evaluate(Latent(core, slots, mask), torch.zeros(3, len(HEADS), dtype=torch.int64))


def test_a_masked_choice_has_no_probability(heads: FactoredHeads) -> None:
    core, slots, mask = inputs(1, 1)
    mask[0, LAYOUT.op] = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.int8)
    actions = torch.zeros(1, len(HEADS), dtype=torch.int64)
    actions[0, OP] = Op.GERMINATE
    assert heads.evaluate(Latent(core, slots, mask), actions).head_log_probs["op"].exp() == 0


# -- one distribution --------------------------------------------------------------------------------------------------


def every_action(mask: Tensor) -> Tensor:
    """All actions of a state that differ in a relevant head; others hold 0."""
    rows: list[tuple[int, ...]] = []
    for op in legal_choices(mask, Op.WAIT)["op"]:
        legal = legal_choices(mask, op)
        relevant = RELEVANT_HEADS[Op(op)]
        options = [[op] if head == "op" else legal[head] if head in relevant else [0] for head in HEADS]
        rows.extend(itertools.product(*options))
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", range(6))
def test_probabilities_of_all_actions_sum_to_one(heads: FactoredHeads, seed: int) -> None:
    arguments = inputs(seed, 1)
    actions = every_action(arguments[2][0])
    found = heads.evaluate(repeated(arguments, len(actions)), actions)
    assert found.log_probs.detach().double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_frequencies_are_the_probabilities(heads: FactoredHeads) -> None:
    count = 40_000
    arguments = inputs(5, 1)
    arguments[2][0] = 1
    sampled, _ = heads.sample(repeated(arguments, count), uniforms(np.random.default_rng(8), count))
    actions = every_action(arguments[2][0])
    found = heads.evaluate(repeated(arguments, len(actions)), actions)
    probabilities = found.log_probs.detach().double().exp().numpy()
    for head in (*CHOICE_HEADS, "slot"):
        index = HEADS.index(head)
        cells = {
            (int(op), slot, choice): 0.0
            for op in Op
            if head in RELEVANT_HEADS[op]
            for slot in range(LAYOUT.slots)
            for choice in range(LAYOUT.slots if head == "slot" else CHOICES[head])
        }
        seen = dict.fromkeys(cells, 0)
        for row, probability in zip(actions.tolist(), probabilities, strict=True):
            if (cell := (row[OP], row[SLOT], row[index])) in cells:
                cells[cell] += probability
        for row in sampled.tolist():
            if (cell := (row[OP], row[SLOT], row[index])) in seen:
                seen[cell] += 1
        likely = [cell for cell, probability in cells.items() if probability * count > 10]
        observed = np.array([*(seen[cell] for cell in likely), 0.0])
        expected = count * np.array([*(cells[cell] for cell in likely), 0.0])
        observed[-1], expected[-1] = count - observed.sum(), count - expected.sum()
        assert len(likely) > 3
        assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3, head


def test_sampling_and_evaluating_agree(heads: FactoredHeads) -> None:
    arguments = inputs(9, 200)
    actions, sampled = heads.sample(arguments, uniforms(np.random.default_rng(9), 200))
    evaluated = heads.evaluate(arguments, actions)
    assert set(actions[:, OP].tolist()) == {int(op) for op in Op}
    assert torch.equal(sampled, evaluated.log_probs)


# -- causality ---------------------------------------------------------------------------------------------------------


def with_op(op: Op, seed: int) -> tuple[Latent, Tensor]:
    """One state in which all is legal, and an action of this operation."""
    arguments = inputs(seed, 1)
    arguments[2][0] = 1
    actions = torch.zeros(1, len(HEADS), dtype=torch.int64)
    actions[0, OP] = op
    return arguments, actions


@pytest.mark.parametrize("op", Op)
def test_log_probability_and_entropy_are_sums_over_relevant_heads(heads: FactoredHeads, op: Op) -> None:
    arguments, actions = with_op(op, seed=10)
    found = heads.evaluate(arguments, actions)
    for total, parts in ((found.log_probs, found.head_log_probs), (found.entropy, found.head_entropies)):
        expected = sum(part.item() for head, part in parts.items() if head in RELEVANT_HEADS[op])
        assert total.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("op", Op)
def test_the_choice_of_an_irrelevant_head_changes_nothing(heads: FactoredHeads, op: Op) -> None:
    arguments, actions = with_op(op, seed=11)
    before = heads.evaluate(arguments, actions)
    for head in set(HEADS) - {"op"}:
        changed = actions.clone()
        changed[0, HEADS.index(head)] = 1
        after = heads.evaluate(arguments, changed)
        assert torch.equal(before.log_probs, after.log_probs) == (head not in RELEVANT_HEADS[op]), head


@pytest.mark.parametrize("op", Op)
def test_an_irrelevant_head_gets_exactly_no_gradient(heads: FactoredHeads, op: Op) -> None:
    arguments, actions = with_op(op, seed=12)
    heads.zero_grad()
    found: HeadEvaluation = heads.evaluate(arguments, actions)
    (found.log_probs + found.entropy).sum().backward()
    rows = heads.choice_out.weight.grad
    slot = heads.slot_out.weight.grad
    assert rows is not None
    assert slot is not None
    start = 0
    for head in CHOICE_HEADS:
        touched = bool(rows[start : start + CHOICES[head]].any())
        assert touched == (head in RELEVANT_HEADS[op]), head
        start += CHOICES[head]
    assert bool(slot.any()) == ("slot" in RELEVANT_HEADS[op])


def test_an_irrelevant_head_returns_its_first_legal_choice(heads: FactoredHeads) -> None:
    arguments = inputs(13, 300)
    actions, _ = heads.sample(arguments, uniforms(np.random.default_rng(13), 300))
    for row, mask in zip(actions.tolist(), arguments[2], strict=True):
        legal = legal_choices(mask, row[OP])
        for head in set(HEADS) - RELEVANT_HEADS[Op(row[OP])]:
            assert row[HEADS.index(head)] == legal[head][0], head


# -- entropies ---------------------------------------------------------------------------------------------------------


def test_entropies_are_shares_of_the_largest_possible_one(heads: FactoredHeads) -> None:
    arguments = inputs(14, 300)
    actions, _ = heads.sample(arguments, uniforms(np.random.default_rng(14), 300))
    found = heads.evaluate(arguments, actions)
    for head, entropy in found.head_entropies.items():
        assert (entropy >= 0).all(), head
        assert (entropy <= 1 + 1e-6).all(), head
        counts = [
            len(legal_choices(mask, int(row[OP]))[head])
            for row, mask in zip(actions, arguments[2], strict=True)
        ]
        single = torch.tensor(counts) == 1
        assert not entropy[single].any(), head
        assert (entropy[~single] > 0).all(), head


def test_uniform_choices_have_entropy_one() -> None:
    flat = FactoredHeads(CORE, NODE, LAYOUT)
    with torch.no_grad():
        for layer in (flat.op, flat.slot_out, flat.choice_out):
            layer.weight.zero_()
            layer.bias.zero_()
    arguments = inputs(15, 100)
    actions, _ = flat.sample(arguments, uniforms(np.random.default_rng(15), 100))
    found = flat.evaluate(arguments, actions)
    for row, (action, mask) in enumerate(zip(actions, arguments[2], strict=True)):
        for head, legal in legal_choices(mask, int(action[OP])).items():
            expected = 0.0 if len(legal) == 1 else 1.0
            assert found.head_entropies[head][row].item() == pytest.approx(expected, abs=1e-6), head


def test_a_head_entropy_equals_its_formula(heads: FactoredHeads) -> None:
    arguments, actions = with_op(Op.GERMINATE, seed=16)
    entropy = heads.evaluate(arguments, actions).head_entropies["blueprint"].item()
    total, size = 0.0, CHOICES["blueprint"]
    for choice in range(size):
        actions[0, HEADS.index("blueprint")] = choice
        log_prob = heads.evaluate(arguments, actions).head_log_probs["blueprint"].item()
        total -= math.exp(log_prob) * log_prob
    assert entropy == pytest.approx(total / math.log(size), abs=1e-6)


def test_synthetic_observations_offer_every_operation() -> None:
    mask = observations(np.random.default_rng(17), 200)["action_mask"]
    assert mask[:, LAYOUT.op].any(dim=0).all()
    assert mask[:, Op.WAIT].all()


# -- what else is said of a choice -------------------------------------------------------------------------------------


def test_relevance_and_availability_are_those_of_the_operation_and_its_masks(heads: FactoredHeads) -> None:
    arguments = inputs(18, 200)
    actions, _ = heads.sample(arguments, uniforms(np.random.default_rng(18), 200))
    found = heads.evaluate(arguments, actions)
    for row, (action, mask) in enumerate(zip(actions.tolist(), arguments.mask, strict=True)):
        legal = legal_choices(mask, action[OP])
        for head in HEADS:
            assert bool(found.relevance[head][row]) == (head in RELEVANT_HEADS[Op(action[OP])]), head
            acts = head in RELEVANT_HEADS[Op(action[OP])]
            assert bool(found.available[head][row]) == (acts and len(legal[head]) > 1), head


def test_a_head_that_is_closed_where_it_acts_is_below_its_floor_however_open_it_is_elsewhere() -> None:
    """What a blueprint would be chosen by after WAIT, nobody acts by: it must not stand for what is chosen by."""
    made = FactoredHeads(CORE, NODE, LAYOUT)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.op_embedding.weight[Op.GERMINATE, 0] = 1.0
        made.choice_in.weight[0, CORE + NODE] = 1.0
        made.choice_out.weight[0, 0] = 50.0
    count = 10
    latent = inputs(20, count)._replace(mask=torch.ones(count, LAYOUT.size, dtype=torch.int8))
    actions = torch.zeros(count, len(HEADS), dtype=torch.int64)
    actions[-1, OP] = Op.GERMINATE
    found = made.evaluate(latent, actions).reshaped((count, 1))
    entropies = found.head_entropies["blueprint"].detach()
    assert float(entropies[-1]) < 1e-6
    assert float(entropies[:-1].min()) > 0.99
    floors = {"blueprint": EntropyFloor(0.2, 0.3)}
    penalty = entropy_floor_penalty(found.head_entropies, found.available, torch.ones(count, 1), floors)
    assert float(penalty.detach()) == pytest.approx(0.3 * 0.2**2, rel=1e-4)


def test_a_state_is_free_where_something_else_than_waiting_is_legal(heads: FactoredHeads) -> None:
    mask = inputs(19, 300).mask
    mask[::3, LAYOUT.op] = torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.int8)
    free = heads.free(mask.reshape(10, 30, -1))
    expected = [float(len(legal_choices(row, Op.WAIT)["op"]) > 1) for row in mask]
    assert free.dtype == torch.float32
    assert free.flatten().tolist() == expected
    assert 0 in expected
    assert 1 in expected


def test_slots_may_be_made_of_the_core() -> None:
    made = FlatGrowthHeads(CORE, NODE, LAYOUT)
    rng = np.random.default_rng(20)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.4))
    arguments = inputs(20, 200)
    bare = arguments._replace(slots=arguments.core[:, :0])
    slots = torch.relu(arguments.core @ made.slots.weight.T + made.slots.bias).reshape(
        200, LAYOUT.slots, NODE
    )
    chance = uniforms(np.random.default_rng(20), 200)
    actions, log_probs = made.sample(bare, chance)
    expected_actions, expected = FactoredHeads.sample(made, arguments._replace(slots=slots), chance)
    assert torch.equal(actions, expected_actions)
    assert torch.allclose(log_probs, expected, atol=1e-5)
    found = made.evaluate(bare, actions)
    assert torch.equal(found.log_probs, log_probs)
    found.log_probs.sum().backward()
    assert made.slots.weight.grad is not None
    assert made.slots.weight.grad.any()
