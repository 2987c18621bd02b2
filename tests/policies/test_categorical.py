"""Independent choices, against torch.distributions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical

from esper_simic.policies.categorical import CategoricalHeads
from esper_simic.policies.parts import Latent
from esper_simic.specs import Choices
from tests.policies.vectors import masks

CORE = 6
ACTION = Choices(("a", "b", "c"), (3, 1, 5))


def make(action: Choices = ACTION, seed: int = 0) -> CategoricalHeads:
    """Heads in float64 that prefer some choices clearly over others."""
    made = CategoricalHeads(CORE, action).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    return made


def latent(seed: int, count: int, *, masked: bool = False, action: Choices = ACTION) -> Latent:
    rng = np.random.default_rng(seed)
    core = torch.from_numpy(rng.normal(size=(count, CORE)))
    mask = torch.from_numpy(masks(rng, action.sizes, count)) if masked else core[:, :0]
    return Latent(core, core[:, :0], mask)


def literal(heads: CategoricalHeads, row: Latent) -> dict[str, Categorical]:
    """The distribution of each head in one state, from the layer's own weights."""
    logits = heads.logits.weight.detach() @ row.core[0] + heads.logits.bias.detach()
    found, start = {}, 0
    for head, size in zip(ACTION.heads, ACTION.sizes, strict=True):
        piece = logits[start : start + size]
        if row.mask.shape[-1]:
            piece = torch.where(row.mask[0, start : start + size].bool(), piece, -torch.inf)
        found[head] = Categorical(logits=piece)
        start += size
    return found


def row_of(rows: Latent, index: int) -> Latent:
    return Latent(*(tensor[index : index + 1] for tensor in rows))


def uniforms(seed: int, count: int, action: Choices = ACTION) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, action.chance)))


@pytest.mark.parametrize("masked", [False, True])
def test_log_probabilities_and_entropies_are_those_of_torch(masked: bool) -> None:
    heads, rows = make(), latent(1, 60, masked=masked)
    actions, log_probs = heads.sample(rows, uniforms(1, 60))
    found = heads.evaluate(rows, actions)
    assert torch.equal(found.log_probs, log_probs)
    for index, action in enumerate(actions):
        parts = literal(heads, row_of(rows, index))
        total = entropy = 0.0
        for position, (head, distribution) in enumerate(parts.items()):
            expected = distribution.log_prob(action[position]).item()
            support = int((distribution.probs > 0).sum())
            spread = -sum(p * math.log(p) for p in distribution.probs.tolist() if p > 0)
            spread = spread / math.log(support) if support > 1 else 0.0
            assert found.head_log_probs[head][index].item() == pytest.approx(expected, abs=1e-12)
            assert found.head_entropies[head][index].item() == pytest.approx(spread, abs=1e-12)
            assert bool(found.available[head][index]) == (support > 1)
            assert bool(found.relevance[head][index])
            total, entropy = total + expected, entropy + spread
        assert found.log_probs[index].item() == pytest.approx(total, abs=1e-12)
        assert found.entropy[index].item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_frequencies_are_the_probabilities(masked: bool) -> None:
    count = 40_000
    heads, one = make(), latent(2, 1, masked=masked)
    rows = Latent(*(tensor.expand(count, -1) for tensor in one))
    actions, _ = heads.sample(rows, uniforms(2, count))
    for position, distribution in enumerate(literal(heads, one).values()):
        probabilities = distribution.probs.numpy()
        observed = np.bincount(actions[:, position].numpy(), minlength=len(probabilities))
        assert not observed[probabilities == 0].any()
        likely = probabilities > 0
        if likely.sum() > 1:
            assert stats.chisquare(observed[likely], count * probabilities[likely]).pvalue > 1e-3


def test_heads_are_drawn_independently() -> None:
    count = 20_000
    heads, one = make(), latent(3, 1)
    actions, _ = heads.sample(Latent(*(tensor.expand(count, -1) for tensor in one)), uniforms(3, count))
    table = np.zeros((3, 5))
    for a, _, c in actions.tolist():
        table[a, c] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_one_head_is_drawn_as_it_would_be_among_others() -> None:
    action = Choices(("a",), (3,))
    heads, single, rows, chance = make(), make(action), latent(4, 50), uniforms(4, 50)
    with torch.no_grad():
        single.logits.weight.copy_(heads.logits.weight[:3])
        single.logits.bias.copy_(heads.logits.bias[:3])
    many, _ = heads.sample(rows, chance)
    alone, log_probs = single.sample(rows, chance[:, :1])
    assert alone.shape == (50, 1)
    assert torch.equal(alone, many[:, :1])
    expected = heads.evaluate(rows, many).head_log_probs["a"]
    assert torch.allclose(log_probs, expected, rtol=0, atol=1e-12)


def test_an_illegal_choice_has_no_probability_and_no_gradient() -> None:
    heads, rows = make(), latent(5, 40, masked=True)
    actions, _ = heads.sample(rows, uniforms(5, 40))
    found = heads.evaluate(rows, actions)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    gradient = heads.logits.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    illegal = (rows.mask[0, :3] == 0).nonzero()
    assert len(illegal)
    wrong = actions[:1].clone()
    wrong[0, 0] = illegal[0]
    assert heads.evaluate(row_of(rows, 0), wrong).head_log_probs["a"].item() == -math.inf
    heads.zero_grad()
    found = heads.evaluate(row_of(rows, 0), actions[:1])
    (found.log_probs + found.entropy).sum().backward()
    gradient = heads.logits.weight.grad
    assert gradient is not None
    touched = gradient.any(dim=-1)
    assert not touched[rows.mask[0] == 0].any()
    assert touched[:3][rows.mask[0, :3] == 1].all() or int(rows.mask[0, :3].sum()) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_finite_differences(masked: bool) -> None:
    heads, rows = make(seed=6), latent(6, 4, masked=masked)
    actions, _ = heads.sample(rows, uniforms(6, 4))

    def outcome(weight: Tensor, bias: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.func.functional_call(
            _Evaluating(heads),
            {"heads.logits.weight": weight, "heads.logits.bias": bias},
            (rows, core, actions),
        )
        return found.log_probs, found.entropy

    arguments = (heads.logits.weight, heads.logits.bias, rows.core.clone().requires_grad_())
    assert torch.autograd.gradcheck(outcome, arguments)


class _Evaluating(torch.nn.Module):
    def __init__(self, heads: CategoricalHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, rows: Latent, core: Tensor, actions: Tensor) -> object:
        return self.heads.evaluate(rows._replace(core=core), actions)


def test_free_is_where_any_head_has_a_choice() -> None:
    heads = make()
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0, 0]], dtype=torch.int8)
    assert heads.free(mask).tolist() == [0, 1]
    assert heads.free(mask.reshape(1, 2, 9)).shape == (1, 2)
    unmasked = torch.empty(2, 3, 0)
    assert heads.free(unmasked).tolist() == [[1.0] * 3] * 2
    assert make(Choices(("a",), (1,))).free(unmasked).tolist() == [[0.0] * 3] * 2
