"""V-trace: off-policy value targets and policy-gradient advantages.

    rho_s  = min(clip_rho, pi(a_s|x_s) / mu(a_s|x_s))        c_s = lambda * min(clip_c, pi(a_s|x_s) / mu(a_s|x_s))
    delta_s = rho_s (r_s + gamma_s V(x_{s+1}) - V(x_s))
    v_s    = V(x_s) + delta_s + gamma_s c_s (v_{s+1} - V(x_{s+1}))
    A_s    = min(clip_pg_rho, pi/mu) (r_s + gamma_s v_{s+1} - V(x_s))

with `gamma_s = 0` where the episode ends with step s, so that nothing crosses an episode's end.

Source: Espeholt et al., IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures
(2018), equation 1 and remarks 1 and 2 (the recursion and lambda), section 4.2 (the advantage).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

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
    rhos = torch.exp(log_rhos.clamp(-LOG_RHO_MAX, LOG_RHO_MAX))
    clipped_rhos = rhos if clip_rho is None else rhos.clamp(max=clip_rho)
    coefficients = lambda_ * (rhos if clip_c is None else rhos.clamp(max=clip_c))
    next_values = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
    deltas = clipped_rhos * (rewards + discounts * next_values - values)

    decays = (discounts * coefficients).unbind(0)
    corrections = list(deltas.unbind(0))
    for t in range(len(corrections) - 2, -1, -1):
        corrections[t] = torch.addcmul(corrections[t], decays[t], corrections[t + 1])
    vs = values + torch.stack(corrections)

    next_vs = torch.cat([vs[1:], bootstrap_value.unsqueeze(0)])
    pg_rhos = rhos if clip_pg_rho is None else rhos.clamp(max=clip_pg_rho)
    return VTraceReturns(vs, pg_rhos * (rewards + discounts * next_vs - values))
