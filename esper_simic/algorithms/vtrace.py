"""V-trace: off-policy value targets and policy-gradient advantages.

    rho_s  = min(clip_rho, pi(a_s|x_s) / mu(a_s|x_s))        c_s = lambda * min(clip_c, pi(a_s|x_s) / mu(a_s|x_s))
    delta_s = rho_s (r_s + gamma_s V(x_{s+1}) - V(x_s))
    v_s    = V(x_s) + delta_s + gamma_s c_s (v_{s+1} - V(x_{s+1}))
    A_s    = min(clip_pg_rho, pi/mu) (r_s + gamma_s v_{s+1} - V(x_s))

with `gamma_s = 0` where the episode ends with step s, so that nothing crosses an episode's end.

Ratios pi/mu are taken within e^±`LOG_RHO_MAX`. The paper's formula has no such bound. With clips at or below
e^`LOG_RHO_MAX` the upper one changes nothing; a ratio that would be smaller than e^-`LOG_RHO_MAX` (2e-9) counts as
that. Without clips a product of ratios can still pass the largest float, as it can in the paper's formula: targets of
that episode are then infinite or NaN, those of the episodes before it are not (on a CPU; see `recursion`).

Source: Espeholt et al., IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures
(2018), equation 1 and remarks 1 and 2 (the recursion and lambda), section 4.2 (the advantage).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from esper_simic.algorithms.recursion import affine_scan, next_values
from esper_simic.algorithms.shapes import check_unrolls

LOG_RHO_MAX: Final = 20.0
"""Log-ratios are clamped to ± this before the exponential: e^20 times any reward in use is still finite in float32."""


class VTraceReturns(NamedTuple):
    """Value targets `vs` and policy-gradient advantages, both `[T, B]`, without gradient."""

    vs: Tensor
    pg_advantages: Tensor


@torch.no_grad()
def vtrace(
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    *,
    clip_rho: float | None = 1.0,
    clip_c: float | None = 1.0,
    clip_pg_rho: float | None = 1.0,
    lambda_: float = 1.0,
) -> VTraceReturns:
    """Compute V-trace targets and advantages.

    Args:
        log_rhos: `[T, B]`, `log pi(a|x) - log mu(a|x)`; clamped to ±`LOG_RHO_MAX`.
        discounts: `[T, B]`, gamma, or 0 where the episode ends with this step.
        rewards: `[T, B]`.
        values: `[T, B]`, V(x_t) of the learner's value function.
        bootstrap_value: `[B]`, V(x_T).
        clip_rho: Truncation of the importance weight in delta; None for none.
        clip_c: Truncation of the trace coefficient; None for none.
        clip_pg_rho: Truncation of the weight of the advantage; None for none.
        lambda_: Decay of the trace, in [0, 1].

    Returns:
        Targets and advantages; no gradient flows into either.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    check_unrolls(
        log_rhos=log_rhos,
        discounts=discounts,
        rewards=rewards,
        values=values,
        bootstrap_value=bootstrap_value,
    )
    rhos = importance_ratios(log_rhos)
    following = next_values(values, bootstrap_value, discounts)
    deltas = clipped(rhos, clip_rho) * (rewards + discounts * following - values)
    coefficients = lambda_ * clipped(rhos, clip_c)
    vs = values + affine_scan(discounts * coefficients, deltas)
    following_vs = next_values(vs, bootstrap_value, discounts)
    return VTraceReturns(vs, clipped(rhos, clip_pg_rho) * (rewards + discounts * following_vs - values))


def importance_ratios(log_rhos: Tensor) -> Tensor:
    """`exp(log_rhos)`, within e^±`LOG_RHO_MAX`."""
    return log_rhos.clamp(-LOG_RHO_MAX, LOG_RHO_MAX).exp()


def clipped(rhos: Tensor, clip: float | None) -> Tensor:
    """`min(clip, rhos)`; None for no clip."""
    return rhos if clip is None else rhos.clamp(max=clip)
