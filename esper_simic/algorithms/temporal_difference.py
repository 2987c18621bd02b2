"""TD(0): one-step targets without importance weights, what is left to learn by when V-trace cannot be trusted.

    v_t = r_t + gamma_t V(x_{t+1})        A_t = v_t - V(x_t)

with `gamma_t = 0` where the episode ends with step t. Nothing is multiplied over steps, so no ratio pi/mu, however
wild, can spoil it; for experience of an older policy it is biased, as V-trace is not.

Source: Sutton, Learning to Predict by the Methods of Temporal Differences (1988), equation 4 with lambda = 0, and
Sutton, Barto, Reinforcement Learning (2nd edition, 2018), equation 6.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esper_simic.algorithms.recursion import next_values
from esper_simic.algorithms.shapes import check_unrolls


class TDReturns(NamedTuple):
    """Value targets `vs` and advantages, both `[T, B]`, without gradient."""

    vs: Tensor
    pg_advantages: Tensor


@torch.no_grad()
def td_targets(discounts: Tensor, rewards: Tensor, values: Tensor, bootstrap_value: Tensor) -> TDReturns:
    """Compute one-step targets and advantages.

    Args:
        discounts: `[T, B]`, gamma, or 0 where the episode ends with this step.
        rewards: `[T, B]`.
        values: `[T, B]`, V(x_t).
        bootstrap_value: `[B]`, V(x_T).

    Returns:
        Targets and advantages; no gradient flows into either.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    check_unrolls(discounts=discounts, rewards=rewards, values=values, bootstrap_value=bootstrap_value)
    vs = rewards + discounts * next_values(values, bootstrap_value, discounts)
    return TDReturns(vs, vs - values)
