"""The IMPALA loss: V-trace policy gradient, value regression, entropy bonus.

    L = L_policy + value_coefficient * L_value - entropy_coefficient * H
    L_policy = - mean_w( A_t log pi(a_t|x_t) )          weights w: policy_weights
    L_value  = mean_u( (vs_t - V(x_t))^2 / 2 )          weights u: value_weights
    H        = mean_w( entropy_t )

where `mean_w(x) = sum(w x) / sum(w)`, 0 if every weight is 0, so the size of a loss does not depend on how many steps
were forced, nor on T and B.

Source: Espeholt et al., IMPALA (2018), section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_unrolls
from esper_simic.algorithms.vtrace import LOG_RHO_MAX, vtrace

TINY: Final = 1e-8


@dataclass(frozen=True, slots=True)
class ImpalaLoss:
    """The total loss, its parts before their coefficients, and what to watch; all scalars.

    `approx_kl` is the low-variance estimate `mean_w((r - 1) - log r)` of KL(mu || pi), with r = pi/mu;
    `clip_fraction` the share of importance weights above `clip_rho`; `explained_variance` is
    `1 - Var(vs - V) / Var(vs)`.
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
        clip_rho: Truncation of importance weights in target and advantage; None for none.
        clip_c: Truncation of trace coefficients; None for none.
        lambda_: Decay of the trace, in [0, 1].
        value_coefficient: Weight of the value loss.
        entropy_coefficient: Weight of the entropy bonus.

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
    targets = vtrace(
        log_rhos,
        discounts,
        rewards,
        values.detach(),
        bootstrap_value.detach(),
        clip_rho=clip_rho,
        clip_c=clip_c,
        clip_pg_rho=clip_rho,
        lambda_=lambda_,
    )
    policy_loss = -_mean(targets.pg_advantages * log_probs, policy_weights)
    value_loss = 0.5 * _mean((targets.vs - values).square(), value_weights)
    entropy = _mean(entropies, policy_weights)
    with torch.no_grad():
        clamped = log_rhos.clamp(-LOG_RHO_MAX, LOG_RHO_MAX)
        rhos = clamped.exp()
        clipped = (rhos > clip_rho).to(rhos.dtype) if clip_rho is not None else torch.zeros_like(rhos)
        spread = targets.vs.var(correction=0)
        explained = 1 - (targets.vs - values).var(correction=0) / (spread + TINY)
    return ImpalaLoss(
        total=policy_loss + value_coefficient * value_loss - entropy_coefficient * entropy,
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        mean_rho=_mean(rhos, policy_weights),
        clip_fraction=_mean(clipped, policy_weights),
        approx_kl=_mean(rhos - 1 - clamped, policy_weights),
        explained_variance=explained,
        mean_advantage=_mean(targets.pg_advantages, policy_weights),
        mean_value=values.detach().mean(),
    )


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights).sum() / weights.sum().clamp(min=TINY)
