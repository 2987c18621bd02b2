"""Implicit Q-learning: a policy from recorded transitions, without ever asking for the value of an action not in them.

    u_t = min_i Q'_i(x_t, a_t) - V(x_t)                          Q' : slowly following copies of the critics
    L_V = mean_w( |tau - 1(u_t < 0)| u_t^2 )                     an upper expectile of Q over the actions taken
    L_Q = mean_i mean_w( (r_t + gamma_t V(x_{t+1}) - Q_i(x_t, a_t))^2 )
    L_pi = - mean_w( min(weight_max, exp(beta u_t)) log pi(a_t|x_t) )
    L_CQL = mean_i mean_w( log sum_a exp Q_i(x_t, a) - Q_i(x_t, a_t) )      over legal a; discrete actions only
    L = L_V + L_Q + L_pi + cql_alpha L_CQL

with `gamma_t = 0` where the episode ends with step t. Gradients are separate: L_V reaches V alone, L_Q and L_CQL the
critics, L_pi the policy; so one sum and one backward pass serve three optimisers.

Weights are divided by their sum as everywhere here, so the loss does not depend on how many steps count. The mean over
critics, where the paper has one critic and its code a sum of two, does the same for their number.

Source: Kostrikov, Nair, Levine, Offline Reinforcement Learning with Implicit Q-Learning (2021), equations 5 to 7 and
algorithm 1; the bound of 100 on the policy's weights is its code's. Kumar et al., Conservative Q-Learning for Offline
Reinforcement Learning (2020), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_unrolls
from esper_simic.algorithms.weighted import weighted_mean


@dataclass(frozen=True, slots=True)
class IqlOptions:
    """Numbers of the loss.

    Attributes:
        expectile: tau in (0, 1): 0.5 is the mean, near 1 the maximum over the actions in the data.
        beta: Inverse temperature of the policy's weights, >= 0: 0 is behaviour cloning.
        weight_max: Bound of those weights, > 0.
        cql_alpha: Weight of the conservative term, >= 0; more than 0 needs `action_values`.
    """

    expectile: float = 0.7
    beta: float = 3.0
    weight_max: float = 100.0
    cql_alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class IqlLoss:
    """The total loss, its parts before their coefficients, and what to watch; all scalars.

    `weight_clip_fraction` is the share of policy weights at their bound.
    """

    total: Tensor
    value_loss: Tensor
    q_loss: Tensor
    policy_loss: Tensor
    conservative_loss: Tensor
    mean_advantage: Tensor
    mean_policy_weight: Tensor
    weight_clip_fraction: Tensor
    mean_q: Tensor
    mean_value: Tensor

    def statistics(self) -> dict[str, Tensor]:
        """Every scalar by name, detached."""
        return {name: getattr(self, name).detach() for name in self.__slots__}


def iql_loss(
    *,
    log_probs: Tensor,
    q_values: Sequence[Tensor],
    target_q_values: Sequence[Tensor],
    values: Tensor,
    next_values: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    weights: Tensor,
    options: IqlOptions,
    action_values: Sequence[Tensor] = (),
    legal: Tensor | None = None,
) -> IqlLoss:
    """Compute the three losses of one batch of transitions.

    Actions may be discrete or continuous; all but the conservative term sees only what was done.

    Args:
        log_probs: `[T, B]`, log pi(a_t|x_t); gradient flows.
        q_values: Of each critic, `[T, B]`, Q_i(x_t, a_t); gradient flows. At least one.
        target_q_values: Of each critic's slow copy, `[T, B]`; no gradient flows.
        values: `[T, B]`, V(x_t); gradient flows.
        next_values: `[T, B]`, V(x_{t+1}); no gradient flows.
        rewards: `[T, B]`.
        discounts: `[T, B]`, gamma, or 0 where the episode ends with this step.
        weights: `[T, B]` >= 0.
        options: The numbers.
        action_values: Of each critic, `[T, B, A]`, Q_i(x_t, a) of every action; gradient flows. For the conservative
            term alone.
        legal: `[T, B, A]` bool; all if None.

    Returns:
        The losses and their parts.

    Raises:
        ValueError: No critic, a conservative term without `action_values`, or shapes or dtypes that do not agree; the
            message names the argument.
    """
    _check(q_values, target_q_values, action_values, options)
    by_number = {f"q_values[{i}]": q for i, q in enumerate(q_values)}
    by_number |= {f"target_q_values[{i}]": q for i, q in enumerate(target_q_values)}
    check_unrolls(
        log_probs=log_probs,
        values=values,
        next_values=next_values,
        rewards=rewards,
        discounts=discounts,
        weights=weights,
        **by_number,
    )
    with torch.no_grad():
        slow_q = torch.stack(tuple(target_q_values)).amin(0)
        # Where the episode ends, what lies behind it may be anything, even infinite.
        targets = rewards + discounts * next_values.masked_fill(discounts == 0, 0.0)
        advantages = slow_q - values
        raw = (options.beta * advantages).exp()
        policy_weights = raw.clamp(max=options.weight_max)
    q_losses = [weighted_mean((targets - q).square(), weights) for q in q_values]
    value_loss = weighted_mean(expectile_loss(slow_q - values, options.expectile), weights)
    q_loss = torch.stack(q_losses).mean()
    policy_loss = -weighted_mean(policy_weights * log_probs, weights)
    conservative = _conservative_loss(q_values, action_values, legal, weights)
    with torch.no_grad():
        at_bound = (raw > options.weight_max).to(values.dtype)
        mean_q = torch.stack([weighted_mean(q, weights) for q in q_values]).mean()
    return IqlLoss(
        total=value_loss + q_loss + policy_loss + options.cql_alpha * conservative,
        value_loss=value_loss,
        q_loss=q_loss,
        policy_loss=policy_loss,
        conservative_loss=conservative,
        mean_advantage=weighted_mean(advantages, weights),
        mean_policy_weight=weighted_mean(policy_weights, weights),
        weight_clip_fraction=weighted_mean(at_bound, weights),
        mean_q=mean_q,
        mean_value=weighted_mean(values.detach(), weights),
    )


def expectile_loss(differences: Tensor, expectile: float) -> Tensor:
    """`|expectile - 1(u < 0)| u^2` of each difference u; any shape."""
    sides = torch.where(differences < 0, 1 - expectile, expectile)
    return sides * differences.square()


@torch.no_grad()
def soft_update(targets: Sequence[Tensor], sources: Sequence[Tensor], rate: float) -> list[Tensor]:
    """`(1 - rate) target + rate source`, parameter by parameter: the next slow copy of a network.

    Args:
        targets: The slow copy's parameters; they are not changed.
        sources: The network's, in the same order.
        rate: In [0, 1]; at 1 the copy is exact.

    Returns:
        New tensors.

    Raises:
        ValueError: `rate` is outside [0, 1], or the lists do not agree in length and shapes.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], it is {rate}")
    if [tensor.shape for tensor in targets] != [tensor.shape for tensor in sources]:
        raise ValueError("targets and sources must be the same parameters, in number, order and shape")
    return [torch.lerp(target, source, rate) for target, source in zip(targets, sources, strict=True)]


def _conservative_loss(
    q_values: Sequence[Tensor], action_values: Sequence[Tensor], legal: Tensor | None, weights: Tensor
) -> Tensor:
    gaps = []
    for index, (q, every) in enumerate(zip(q_values, action_values, strict=False)):
        if every.dim() != 3 or every.shape[:2] != q.shape or every.dtype != q.dtype:
            raise ValueError(
                f"action_values[{index}] must be [{', '.join(map(str, q.shape))}, A] {q.dtype}, "
                f"it is {list(every.shape)} {every.dtype}"
            )
        if legal is not None and legal.shape != every.shape:
            raise ValueError(f"legal must be {list(every.shape)}, it is {list(legal.shape)}")
        open_to = every if legal is None else every.masked_fill(~legal, float("-inf"))
        gaps.append(weighted_mean(open_to.logsumexp(-1) - q, weights))
    return torch.stack(gaps).mean() if gaps else weights.new_zeros(())


def _check(
    q_values: Sequence[Tensor],
    target_q_values: Sequence[Tensor],
    action_values: Sequence[Tensor],
    options: IqlOptions,
) -> None:
    if not q_values or not target_q_values:
        raise ValueError("q_values and target_q_values must have at least one critic each")
    if len(action_values) not in {0, len(q_values)}:
        raise ValueError(f"action_values must be of the {len(q_values)} critics, not of {len(action_values)}")
    if options.cql_alpha > 0 and not action_values:
        raise ValueError("a conservative term (cql_alpha > 0) needs action_values, of discrete actions")
