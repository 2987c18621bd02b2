"""V-trace against the paper's sum of products, written out in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_simic.algorithms.vtrace import LOG_RHO_MAX, VTraceReturns, vtrace

CLIPS = (None, 0.3, 1.0, 1.7)


@dataclass
class Case:
    """Arguments of `vtrace`, `[T, B]`."""

    log_rhos: Tensor
    discounts: Tensor
    rewards: Tensor
    values: Tensor
    bootstrap_value: Tensor

    def run(self, **options: float | None) -> VTraceReturns:
        return vtrace(
            self.log_rhos,
            self.discounts,
            self.rewards,
            self.values,
            self.bootstrap_value,
            **options,  # type: ignore[arg-type]
        )


def random_case(length: int, lanes: int, seed: int, *, ends: float = 0.25, spread: float = 1.0) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    discounts = torch.from_numpy(np.where(rng.random((length, lanes)) < ends, 0.0, 0.97))
    return Case(
        spread * normal(length, lanes), discounts, normal(length, lanes), normal(length, lanes), normal(lanes)
    )


def cut(ratio: float, clip: float | None) -> float:
    return ratio if clip is None else min(clip, ratio)


def literal(
    case: Case, clip_rho: float | None, clip_c: float | None, clip_pg_rho: float | None, lambda_: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Equation 1 of Espeholt et al. (2018), with one discount a step in place of the powers of gamma:

    v_s = V(x_s) + sum_{t=s}^{T-1} (prod_{i=s}^{t-1} gamma_i c_i) rho_t (r_t + gamma_t V(x_{t+1}) - V(x_t))
    """
    length, lanes = case.rewards.shape
    discounts, rewards = case.discounts.tolist(), case.rewards.tolist()
    values = [*case.values.tolist(), case.bootstrap_value.tolist()]
    ratios = [[math.exp(x) for x in row] for row in case.log_rhos.tolist()]
    targets = [[0.0] * lanes for _ in range(length)] + [case.bootstrap_value.tolist()]
    for lane in range(lanes):
        for s in range(length):
            total = values[s][lane]
            for t in range(s, length):
                product = 1.0
                for i in range(s, t):
                    product *= discounts[i][lane] * lambda_ * cut(ratios[i][lane], clip_c)
                delta = rewards[t][lane] + discounts[t][lane] * values[t + 1][lane] - values[t][lane]
                total += product * cut(ratios[t][lane], clip_rho) * delta
            targets[s][lane] = total
    advantages = [
        [
            cut(ratios[s][lane], clip_pg_rho)
            * (rewards[s][lane] + discounts[s][lane] * targets[s + 1][lane] - values[s][lane])
            for lane in range(lanes)
        ]
        for s in range(length)
    ]
    return targets[:length], advantages


@given(
    length=st.integers(1, 9),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    clip_rho=st.sampled_from(CLIPS),
    clip_c=st.sampled_from(CLIPS),
    clip_pg_rho=st.sampled_from(CLIPS),
    lambda_=st.sampled_from((0.0, 0.5, 0.95, 1.0)),
)
def test_equals_the_sum_of_products(
    length: int,
    lanes: int,
    seed: int,
    clip_rho: float | None,
    clip_c: float | None,
    clip_pg_rho: float | None,
    lambda_: float,
) -> None:
    case = random_case(length, lanes, seed)
    found = case.run(clip_rho=clip_rho, clip_c=clip_c, clip_pg_rho=clip_pg_rho, lambda_=lambda_)
    vs, advantages = literal(case, clip_rho, clip_c, clip_pg_rho, lambda_)
    assert found.vs.numpy() == pytest.approx(np.array(vs), abs=1e-10, rel=1e-10)
    assert found.pg_advantages.numpy() == pytest.approx(np.array(advantages), abs=1e-10, rel=1e-10)


def test_the_defaults_clip_everything_at_one() -> None:
    case = random_case(8, 5, seed=0)
    vs, advantages = literal(case, 1.0, 1.0, 1.0, 1.0)
    assert case.run().vs.numpy() == pytest.approx(np.array(vs), abs=1e-12)
    assert case.run().pg_advantages.numpy() == pytest.approx(np.array(advantages), abs=1e-12)


def test_on_policy_without_clips_is_the_n_step_return() -> None:
    case = random_case(12, 6, seed=1)
    case.log_rhos.zero_()
    found = case.run(clip_rho=None, clip_c=None, clip_pg_rho=None)
    following = case.bootstrap_value
    for t in reversed(range(12)):
        following = case.rewards[t] + case.discounts[t] * following
        assert torch.allclose(found.vs[t], following, rtol=0, atol=1e-12)
        assert torch.allclose(found.pg_advantages[t], following - case.values[t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["log_rhos", "discounts", "rewards", "values"])
def test_nothing_crosses_an_episode_end(name: str) -> None:
    end = 4
    case = random_case(10, 3, seed=2, ends=0.0)
    case.discounts[end, 1] = 0.0
    before = case.run()
    changed = getattr(case, name)
    changed[end + 1 :] = changed[end + 1 :] * 1.5 + 7
    case.bootstrap_value += 100
    after = case.run()
    assert torch.equal(before.vs[: end + 1, 1], after.vs[: end + 1, 1])
    assert torch.equal(before.pg_advantages[: end + 1, 1], after.pg_advantages[: end + 1, 1])
    assert not torch.equal(before.vs[: end + 1, 0], after.vs[: end + 1, 0])


def test_no_gradient_flows() -> None:
    case = random_case(5, 2, seed=3)
    for tensor in (case.log_rhos, case.rewards, case.values, case.bootstrap_value):
        tensor.requires_grad_()
    found = case.run()
    assert not found.vs.requires_grad
    assert not found.pg_advantages.requires_grad


@given(
    length=st.integers(5, 50),
    lanes=st.integers(8, 64),
    rho_bar=st.floats(0.1, 10),
    clip_pg=st.floats(0.1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_weight_exceeds_its_bound(
    length: int, lanes: int, rho_bar: float, clip_pg: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_rhos = 5 * torch.randn((length, lanes), generator=generator, dtype=torch.float64)
    zeros, ones = torch.zeros_like(log_rhos), torch.ones_like(log_rhos)
    # Where nothing follows a step and nothing was expected of it, a reward of 1 leaves its weights alone.
    found = vtrace(log_rhos, zeros, ones, zeros, zeros[0], clip_rho=rho_bar, clip_pg_rho=clip_pg)
    for weights, bound in ((found.vs, rho_bar), (found.pg_advantages, clip_pg)):
        assert float(weights.max()) <= bound
        assert float(weights.min()) > 0
        assert torch.equal(weights < bound, log_rhos.exp() < bound)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_huge_log_ratios_stay_finite_in_single_precision(sign: int, clip: float | None) -> None:
    case = random_case(1, 3, seed=4, ends=0.0)
    singles = [getattr(case, name).float() for name in ("discounts", "rewards", "values", "bootstrap_value")]
    found = vtrace(torch.full((1, 3), sign * 1e30), *singles, clip_rho=clip, clip_c=clip, clip_pg_rho=clip)
    assert found.vs.isfinite().all()
    assert found.pg_advantages.isfinite().all()
    bounded = vtrace(
        torch.full((1, 3), sign * LOG_RHO_MAX), *singles, clip_rho=clip, clip_c=clip, clip_pg_rho=clip
    )
    assert torch.equal(found.vs, bounded.vs)


@pytest.mark.parametrize("clips", [{}, {"clip_rho": 0.5, "clip_c": 0.3, "clip_pg_rho": 2.0, "lambda_": 0.9}])
def test_the_bound_of_large_ratios_changes_nothing_under_clips(clips: dict[str, float]) -> None:
    case = random_case(8, 3, seed=10, spread=100.0)
    case.log_rhos.abs_()
    assert (case.log_rhos > LOG_RHO_MAX).sum() > 10
    options = {"clip_rho": 1.0, "clip_c": 1.0, "clip_pg_rho": 1.0, "lambda_": 1.0} | clips
    vs, advantages = literal(case, *options.values())
    assert case.run(**options).vs.numpy() == pytest.approx(np.array(vs), abs=1e-10, rel=1e-10)
    assert case.run(**options).pg_advantages.numpy() == pytest.approx(np.array(advantages), abs=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_ratios_beyond_the_bound_count_as_the_bound(sign: int) -> None:
    case = random_case(6, 3, seed=11)
    case.log_rhos = sign * (LOG_RHO_MAX + 1 + case.log_rhos.abs())
    beyond = case.run(clip_rho=None, clip_c=None, clip_pg_rho=None)
    case.log_rhos = torch.full_like(case.log_rhos, sign * LOG_RHO_MAX)
    vs, advantages = literal(case, None, None, None, 1.0)
    assert beyond.vs.numpy() == pytest.approx(np.array(vs), rel=1e-10)
    assert beyond.pg_advantages.numpy() == pytest.approx(np.array(advantages), rel=1e-10)


@pytest.mark.parametrize("clip_c", [None, 1e12])
@pytest.mark.parametrize("length", [16, 40])
def test_a_target_that_overflows_does_not_reach_the_episode_before_it(
    clip_c: float | None, length: int
) -> None:
    case = random_case(length, 2, seed=12, ends=0.0)
    case.log_rhos.fill_(LOG_RHO_MAX)
    case.rewards.abs_()
    case.discounts[3] = 0.0
    singles = Case(*(getattr(case, name).float() for name in Case.__dataclass_fields__))
    found = singles.run(clip_rho=None, clip_c=clip_c, clip_pg_rho=None)
    assert not found.vs[4].isfinite().any()
    bootstrap = case.values[4]
    first = Case(case.log_rhos[:4], case.discounts[:4], case.rewards[:4], case.values[:4], bootstrap)
    vs, advantages = literal(first, None, clip_c, None, 1.0)
    assert found.vs[:4].numpy() == pytest.approx(np.array(vs[:4]), rel=1e-4)
    assert found.pg_advantages[:4].numpy() == pytest.approx(np.array(advantages[:4]), rel=1e-4)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_poisoned_episode_does_not_reach_the_one_before_it(poison: float) -> None:
    case = random_case(12, 2, seed=13, ends=0.0)
    case.discounts[5] = 0.0
    clean = case.run()
    case.values[6:] = poison
    found = case.run()
    assert torch.equal(found.vs[:6], clean.vs[:6])
    assert torch.equal(found.pg_advantages[:6], clean.pg_advantages[:6])


@pytest.mark.parametrize(("length", "lanes"), [(1, 1), (80, 1), (80, 32), (200, 2)])
def test_long_unrolls_equal_the_recursion_of_remark_one(length: int, lanes: int) -> None:
    case = random_case(length, lanes, seed=14, ends=0.05)
    found = case.run(clip_rho=1.1, clip_c=0.9, clip_pg_rho=2.0, lambda_=0.97)
    discounts, rewards, values = (getattr(case, n).tolist() for n in ("discounts", "rewards", "values"))
    ratios, bootstrap = case.log_rhos.exp().tolist(), case.bootstrap_value.tolist()
    for lane in range(lanes):
        next_v, next_value = bootstrap[lane], bootstrap[lane]
        for t in reversed(range(length)):
            ratio, value, gamma = ratios[t][lane], values[t][lane], discounts[t][lane]
            advantage = min(2.0, ratio) * (rewards[t][lane] + gamma * next_v - value)
            delta = min(1.1, ratio) * (rewards[t][lane] + gamma * next_value - value)
            next_v = value + delta + gamma * 0.97 * min(0.9, ratio) * (next_v - next_value)
            next_value = value
            assert float(found.vs[t, lane]) == pytest.approx(next_v, abs=1e-11)
            assert float(found.pg_advantages[t, lane]) == pytest.approx(advantage, abs=1e-11)


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.sampled_from(CLIPS))
def test_targets_are_linear_in_rewards_and_values(seed: int, factor: float, clip: float | None) -> None:
    one, other = random_case(5, 3, seed), random_case(5, 3, seed + 1)
    names = ("rewards", "values", "bootstrap_value")
    both = Case(one.log_rhos, one.discounts, *(getattr(one, n) + factor * getattr(other, n) for n in names))
    other.log_rhos, other.discounts = one.log_rhos, one.discounts
    options = {"clip_rho": clip, "clip_c": clip, "clip_pg_rho": clip}
    for whole, first, second in zip(
        both.run(**options), one.run(**options), other.run(**options), strict=True
    ):
        size = 1 + float(first.abs().max() + second.abs().max())
        assert torch.allclose(whole, first + factor * second, rtol=0, atol=1e-9 * size)


def test_long_clipped_unrolls_with_huge_ratios_stay_finite() -> None:
    case = random_case(1000, 4, seed=5, spread=50.0)
    found = case.run()
    assert found.vs.isfinite().all()
    assert found.vs.abs().max() < 1000


def test_single_precision_is_close_to_double() -> None:
    case = random_case(80, 32, seed=6)
    singles = Case(*(getattr(case, name).float() for name in Case.__dataclass_fields__))
    assert torch.allclose(singles.run().vs.double(), case.run().vs, atol=1e-5)
    assert singles.run().vs.dtype == torch.float32


NAMES = ("discounts", "rewards", "values", "bootstrap_value")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    case = random_case(4, 3, seed=7)
    setattr(case, name, getattr(case, name)[..., :1])
    with pytest.raises(ValueError, match=f"^{name} must be"):
        case.run()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_dtype_is_refused_by_name(name: str) -> None:
    case = random_case(4, 3, seed=8)
    setattr(case, name, getattr(case, name).float())
    with pytest.raises(ValueError, match=f"^{name} must be .*float64 like log_rhos, it is .*float32"):
        case.run()


@pytest.mark.parametrize(
    "log_rhos", [torch.zeros(4), torch.zeros(0, 3), torch.zeros(4, 3, dtype=torch.int64)]
)
def test_wrong_log_rhos_are_refused_by_name(log_rhos: Tensor) -> None:
    case = random_case(4, 3, seed=9)
    case.log_rhos = log_rhos
    with pytest.raises(ValueError, match=r"^log_rhos must be \[T, B\] floating point"):
        case.run()
