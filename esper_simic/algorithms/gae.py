"""Generalised advantage estimation.

    delta_t = r_t + gamma_t V(x_{t+1}) - V(x_t)
    A_t     = delta_t + gamma_t lambda A_{t+1}

with `gamma_t = 0` where the episode ends with step t: whatever lies behind it, even an infinite value, has no part.

Source: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation (2016),
equation 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper_simic.algorithms.recursion import affine_scan, next_values
from esper_simic.algorithms.shapes import check_unrolls


class GAEReturns(NamedTuple):
    """Advantages, and returns = advantages + values, both `[T, B]`, without gradient."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor, discounts: Tensor, values: Tensor, bootstrap_value: Tensor, lambda_: float
) -> GAEReturns:
    """Compute generalised advantages.

    Args:
        rewards: `[T, B]`.
        discounts: `[T, B]`, gamma, or 0 where the episode ends with this step.
        values: `[T, B]`, V(x_t).
        bootstrap_value: `[B]`, V(x_T).
        lambda_: Decay, in [0, 1]: 0 is one-step TD, 1 the Monte Carlo return.

    Returns:
        Advantages and returns; no gradient flows into either.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    check_unrolls(rewards=rewards, discounts=discounts, values=values, bootstrap_value=bootstrap_value)
    deltas = rewards + discounts * next_values(values, bootstrap_value, discounts) - values
    advantages = affine_scan(discounts * lambda_, deltas)
    return GAEReturns(advantages, advantages + values)
