"""Actions of real numbers, against torch.distributions and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal

from esper_simic.policies.gaussian import HEAD, LOG_DEVIATION_MAX, LOG_DEVIATION_MIN, GaussianHeads
from esper_simic.policies.parts import Latent
from esper_simic.specs import Continuous

CORE = 6
ACTION = Continuous((-1.0, -2.0, -math.inf), (1.0, 2.0, math.inf))


def make(seed: int = 0) -> GaussianHeads:
    made = GaussianHeads(CORE, ACTION).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    return made


def latent(seed: int, count: int) -> Latent:
    core = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, CORE)))
    return Latent(core, core[:, :0], core[:, :0])


def normal(heads: GaussianHeads, rows: Latent) -> Normal:
    mean = rows.core @ heads.mean.weight.detach().T + heads.mean.bias.detach()
    return Normal(mean, heads.log_deviation.detach().exp())


def uniforms(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, ACTION.chance)))


def test_actions_are_quantiles_of_the_uniforms() -> None:
    heads, rows, chance = make(), latent(1, 50), uniforms(1, 50)
    actions, _ = heads.sample(rows, chance)
    expected = normal(heads, rows)
    assert expected.cdf(actions).detach().numpy() == pytest.approx(chance.numpy(), abs=1e-9)


def test_log_probabilities_and_entropies_are_those_of_torch() -> None:
    heads, rows = make(), latent(2, 50)
    actions, log_probs = heads.sample(rows, uniforms(2, 50))
    found, expected = heads.evaluate(rows, actions), normal(heads, rows)
    assert torch.equal(found.log_probs, log_probs)
    assert torch.allclose(log_probs, expected.log_prob(actions).sum(dim=-1), rtol=0, atol=1e-12)
    assert torch.allclose(found.entropy, expected.entropy().sum(dim=-1), rtol=0, atol=1e-12)
    assert torch.equal(found.head_log_probs[HEAD], found.log_probs)
    assert torch.equal(found.head_entropies[HEAD], found.entropy)
    assert found.relevance[HEAD].all()
    assert found.available[HEAD].all()


def test_draws_are_normal_and_independent() -> None:
    heads, one, count = make(), latent(3, 1), 20_000
    rows = Latent(*(tensor.expand(count, -1) for tensor in one))
    actions, _ = heads.sample(rows, uniforms(3, count))
    standard = (actions - normal(heads, rows).mean) / heads.log_deviation.exp()
    values = standard.detach().numpy()
    for dimension in range(3):
        assert stats.kstest(values[:, dimension], "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 4 / math.sqrt(count)


def test_the_ends_of_the_unit_interval_give_finite_actions() -> None:
    heads = make().float()
    rows = latent(4, 2)
    rows = Latent(*(tensor.float() for tensor in rows))
    chance = torch.tensor([[0.0] * 3, [math.nextafter(1.0, 0.0)] * 3], dtype=torch.float64)
    actions, log_probs = heads.sample(rows, chance)
    assert actions.dtype == torch.float32
    assert actions.isfinite().all()
    assert log_probs.isfinite().all()
    assert (actions[0] < actions[1]).all()


@pytest.mark.parametrize("inside", [True, False])
def test_deviations_stay_in_their_range(inside: bool) -> None:
    heads, rows = make(), latent(5, 10)
    ends = torch.tensor([LOG_DEVIATION_MIN, 0.0, LOG_DEVIATION_MAX], dtype=torch.float64)
    with torch.no_grad():
        heads.log_deviation.copy_(ends if inside else ends + torch.tensor([-3.0, 0.0, 3.0]))
    entropy = heads.evaluate(rows, torch.zeros(10, 3, dtype=torch.float64)).entropy
    expected = sum(end + 0.5 * math.log(2 * math.pi * math.e) for end in ends.tolist())
    assert entropy.detach().numpy() == pytest.approx(np.full(10, expected))


@pytest.mark.parametrize(
    ("at", "sign", "comes_back"), [(-6.0, -1, True), (-6.0, 1, False), (3.0, 1, True), (3.0, -1, False)]
)
def test_a_deviation_outside_its_range_can_come_back_and_goes_no_further(
    at: float, sign: int, comes_back: bool
) -> None:
    heads, rows = make(), latent(6, 4)
    with torch.no_grad():
        heads.log_deviation.fill_(at)
    (sign * heads.evaluate(rows, torch.zeros(4, 3, dtype=torch.float64)).entropy.mean()).backward()
    gradient = heads.log_deviation.grad
    assert gradient is not None
    assert gradient.tolist() == [float(sign)] * 3 if comes_back else not gradient.any()


def test_gradients_are_finite_differences() -> None:
    heads, rows = make(seed=7), latent(7, 4)
    actions, _ = heads.sample(rows, uniforms(7, 4))
    actions = actions.detach()

    def outcome(weight: Tensor, bias: Tensor, log_deviation: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        named = {
            "heads.mean.weight": weight,
            "heads.mean.bias": bias,
            "heads.log_deviation": log_deviation,
        }
        found = torch.func.functional_call(_Evaluating(heads), named, (rows, core, actions))
        return found.log_probs, found.entropy

    core = rows.core.clone().requires_grad_()
    assert torch.autograd.gradcheck(outcome, (heads.mean.weight, heads.mean.bias, heads.log_deviation, core))


class _Evaluating(torch.nn.Module):
    def __init__(self, heads: GaussianHeads) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, rows: Latent, core: Tensor, actions: Tensor) -> object:
        return self.heads.evaluate(rows._replace(core=core), actions)


def test_there_always_is_a_choice() -> None:
    assert make().free(torch.empty(2, 3, 0)).tolist() == [[1.0] * 3] * 2
