"""Estimates of the divergence against the divergence itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.algorithms.divergence import kl_k1, kl_k2, kl_k3


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, q = rows.log_softmax(-1)
    return p, q


@given(st.integers(0, 2**31))
def test_k1_and_k3_are_unbiased(seed: int) -> None:
    """The mean under p, taken over every outcome and not over samples, is KL(p || q)."""
    p, q = distributions(seed)
    truth = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for estimate in (kl_k1, kl_k3):
        assert float((p.exp() * estimate(q - p)).sum()) == pytest.approx(truth, abs=1e-12)


@given(st.floats(-20, 20))
def test_each_is_its_formula(log_ratio: float) -> None:
    x = torch.tensor(log_ratio, dtype=torch.float64)
    assert float(kl_k1(x)) == -log_ratio
    assert float(kl_k2(x)) == pytest.approx(log_ratio**2 / 2)
    assert float(kl_k3(x)) == pytest.approx(math.exp(log_ratio) - 1 - log_ratio, rel=1e-9, abs=1e-12)
    assert float(kl_k2(x)) >= 0
    assert float(kl_k3(x)) >= 0


def test_k2_and_k3_agree_for_policies_that_are_close_also_in_single_precision() -> None:
    x = torch.linspace(-3e-3, 3e-3, 101)
    assert torch.allclose(kl_k3(x), kl_k2(x), rtol=2e-3, atol=1e-9)
    p, q = distributions(1)
    near = p + 1e-3 * (q - p)
    near = near - near.logsumexp(-1)
    truth = float((p.exp() * (p - near)).sum())
    assert float((p.exp() * kl_k2(near - p)).sum()) == pytest.approx(truth, rel=1e-2)
