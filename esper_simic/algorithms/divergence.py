"""Estimates of the Kullback-Leibler divergence of a policy from the one that acted, from the actions it took.

With a ~ p (the policy that acted, or the anchor of an update), r = q(a) / p(a) and KL(p || q) = E_p[-log r]:

    k1 = -log r                unbiased, of high variance, negative for about half of the samples
    k2 = (log r)^2 / 2         biased, of low variance, never negative
    k3 = (r - 1) - log r       unbiased, of low variance, never negative

k3 is k1 plus the control variate r - 1, whose mean under p is 0.

Source: Schulman, Approximating KL Divergence (2020), joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(log_ratios: Tensor) -> Tensor:
    """`-log r` of each sample; any shape."""
    return -log_ratios


def kl_k2(log_ratios: Tensor) -> Tensor:
    """`(log r)^2 / 2` of each sample; any shape."""
    return 0.5 * log_ratios.square()


def kl_k3(log_ratios: Tensor) -> Tensor:
    """`(r - 1) - log r` of each sample; any shape. Log-ratios must be small enough for their exponential."""
    # expm1: for policies that are close, exp(x) - 1 - x would be nothing but rounding error.
    return torch.expm1(log_ratios) - log_ratios
