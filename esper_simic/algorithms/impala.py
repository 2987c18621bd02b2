"""The IMPALA loss: V-trace policy gradient, value regression, entropy bonus.

    L = L_policy + value_coefficient * L_value - entropy_coefficient * H
    L_policy = - mean_w( A_t log pi(a_t|x_t) )          weights w: policy_weights
    L_value  = mean_u( (vs_t - V(x_t))^2 / 2 )          weights u: value_weights
    H        = mean_w( entropy_t )

where `mean_w(x) = sum(w x) / sum(w)`, 0 if every weight is 0, so the size of a loss does not depend on how many steps
were forced, nor on T and B.

A_t and vs_t are V-trace's; the failure ladder falls back to those of TD(0), which know no importance weight.

Source: Espeholt et al., IMPALA (2018), section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_unrolls
from esper_simic.algorithms.temporal_difference import TDReturns, td_targets
from esper_simic.algorithms.vtrace import LOG_RHO_MAX, VTraceReturns, vtrace
from esper_simic.algorithms.weighted import explained_variance, weighted_mean


@dataclass(frozen=True, slots=True)
class ImpalaLoss:
    """The total loss, its parts before their coefficients, and what to watch; all scalars.

    `approx_kl` is the low-variance estimate `mean_w((r - 1) - log r)` of KL(mu || pi), with r = pi/mu;
    `clip_fraction` the share of importance weights above `clip_rho`, 0 without a clip; both see weights as `vtrace`
    bounds them. `explained_variance` is that of the targets `vs` by the values, see `weighted`.
    """

    total: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    mean_rho: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    explained_variance: Tensor
    mean_advantage: Tensor
    mean_value: Tensor

    def statistics(self) -> dict[str, Tensor]:
        """Every scalar by name, detached."""
        return {name: getattr(self, name).detach() for name in self.__slots__}


def impala_loss(
    *,
    log_probs: Tensor,
    behaviour_log_probs: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    entropies: Tensor,
    policy_weights: Tensor,
    value_weights: Tensor,
    clip_rho: float | None,
    clip_c: float | None,
    lambda_: float,
    value_coefficient: float,
    entropy_coefficient: float,
    clip_pg_rho: float | None = 1.0,
    targets: Literal["vtrace", "td"] = "vtrace",
) -> ImpalaLoss:
    """Compute the loss of one batch of unrolls.

    Args:
        log_probs: `[T, B]`, log pi(a|x); gradient flows.
        behaviour_log_probs: `[T, B]`, log mu(a|x).
        values: `[T, B]`, V(x_t); gradient flows.
        bootstrap_value: `[B]`, V(x_T), without gradient.
        rewards: `[T, B]`, scaled; a cut episode's last value folded in.
        discounts: `[T, B]`, gamma, or 0 where the episode ends.
        entropies: `[T, B]`; gradient flows.
        policy_weights: `[T, B]` >= 0; 0 where there was no choice.
        value_weights: `[T, B]` >= 0.
        clip_rho: Truncation of importance weights in the target; None for none.
        clip_c: Truncation of trace coefficients; None for none.
        lambda_: Decay of the trace, in [0, 1].
        value_coefficient: Weight of the value loss.
        entropy_coefficient: Weight of the entropy bonus.
        clip_pg_rho: Truncation of importance weights in the advantage; None for none.
        targets: `vtrace`, or `td` for one-step targets and advantages without importance weights; clips and
            `lambda_` then count for the statistics alone.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    check_unrolls(
        log_probs=log_probs,
        behaviour_log_probs=behaviour_log_probs,
        values=values,
        bootstrap_value=bootstrap_value,
        rewards=rewards,
        discounts=discounts,
        entropies=entropies,
        policy_weights=policy_weights,
        value_weights=value_weights,
    )
    log_rhos = (log_probs - behaviour_log_probs).detach()
    found: VTraceReturns | TDReturns
    if targets == "td":
        found = td_targets(discounts, rewards, values.detach(), bootstrap_value.detach())
    else:
        found = vtrace(
            log_rhos,
            discounts,
            rewards,
            values.detach(),
            bootstrap_value.detach(),
            clip_rho=clip_rho,
            clip_c=clip_c,
            clip_pg_rho=clip_pg_rho,
            lambda_=lambda_,
        )
    policy_loss = -weighted_mean(found.pg_advantages * log_probs, policy_weights)
    value_loss = 0.5 * weighted_mean((found.vs - values).square(), value_weights)
    entropy = weighted_mean(entropies, policy_weights)
    with torch.no_grad():
        # Not `divergence.kl_k3` and `importance_ratios`: kept journals hold the bits of this very arithmetic.
        clamped = log_rhos.clamp(-LOG_RHO_MAX, LOG_RHO_MAX)
        rhos = clamped.exp()
        clipped = (rhos > clip_rho).to(rhos.dtype) if clip_rho is not None else torch.zeros_like(rhos)
        explained = explained_variance(found.vs, values)
    return ImpalaLoss(
        total=policy_loss + value_coefficient * value_loss - entropy_coefficient * entropy,
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        mean_rho=weighted_mean(rhos, policy_weights),
        clip_fraction=weighted_mean(clipped, policy_weights),
        approx_kl=weighted_mean(rhos - 1 - clamped, policy_weights),
        explained_variance=explained,
        mean_advantage=weighted_mean(found.pg_advantages, policy_weights),
        mean_value=values.detach().mean(),
    )
