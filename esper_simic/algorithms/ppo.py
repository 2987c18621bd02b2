"""PPO and APPO: the clipped surrogate, head by head, around an anchor that need not be the policy that acted.

    r_h = pi(a_h|x) / anchor(a_h|x)
    L_policy = - sum_{t,h} w_t m_th rho_t min( r_h A_t, clip(r_h, 1 - eps, 1 + eps) A_t ) / sum_{t,h} w_t m_th
    L_value  = mean_u( (y_t - V_t)^2 / 2 ),  or with value clipping
               mean_u( max( (y_t - V_t)^2, (y_t - V'_t)^2 ) / 2 ),  V' = V_old + clip(V - V_old, -c, c)
    H        = mean_w( sum_h k_h m_h entropy_h )
    L = L_policy + value_coefficient L_value - entropy_coefficient H + entropy floors (`entropy_floor`)

Legend: m the causal relevance of head h at step t (0 or 1); w, u weights of steps in policy and value loss; A, y
advantages and value targets; rho = min(rho_bar, anchor(a|x) / mu(a|x)) over all relevant heads together, mu the policy
that acted; k multipliers of heads.

**Anchor and behaviour.** In the first paper both are one policy. It does two jobs: a correction for experience of
another policy, and a bound on how far one update goes. Here the anchor is the learner's own policy at the start of the
update, whatever the age of the experience; the age is corrected by rho, which is 1 on-policy. So stale experience
moves the centre of the trust region nowhere.

**PPO and APPO** differ only in A and y (`ppo_targets`): GAE, which takes experience as if it were the anchor's own, or
V-trace. At the anchor with V-trace the gradient of the joint surrogate is IMPALA's.

**Per head or joint.** Per head, each decision is clipped by its own ratio, so that one head which moved far does not
stop all others from learning. Joint, the ratio is the product over the relevant heads of a step.

Targets, anchors and rho are made once an update and hold for all its epochs; who walks through epochs and minibatches,
and stops when the divergence passes its limit, is the caller.

Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), equations 7 and 9; Hilton, Cobbe, Schulman,
Batch size-invariance for policy optimization (2022), the decoupled objective; Espeholt et al., IMPALA (2018), for the
bound of rho. Value clipping is no part of these; it is common practice, and off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic.algorithms.divergence import kl_k3
from esper_simic.algorithms.entropy_floor import EntropyFloor, entropy_floor_penalty
from esper_simic.algorithms.gae import gae
from esper_simic.algorithms.recursion import next_values
from esper_simic.algorithms.shapes import check_masks, check_unrolls
from esper_simic.algorithms.vtrace import LOG_RHO_MAX, clipped, importance_ratios, vtrace
from esper_simic.algorithms.weighted import explained_variance, weighted_mean

KL_STOP_FACTOR: Final = 1.5
"""An update ends before the minibatch at which `approx_kl` has passed the target times this."""


class PpoTargets(NamedTuple):
    """What an update holds fixed, `[T, B]` without gradient: advantages, value targets, and rho."""

    advantages: Tensor
    value_targets: Tensor
    importance: Tensor


class PpoHead(NamedTuple):
    """One head at every step, `[T, B]`.

    Attributes:
        log_probs: log pi(a_h|x); gradient flows. Of no account where the head is irrelevant, but not NaN.
        anchor_log_probs: log anchor(a_h|x).
        entropies: Normalised; gradient flows.
        relevance: Whether the head had a part in the action, bool or 0 and 1.
        availability: Whether it had more than one legal choice to act by; for the entropy floors alone.
    """

    log_probs: Tensor
    anchor_log_probs: Tensor
    entropies: Tensor
    relevance: Tensor
    availability: Tensor


@dataclass(frozen=True, slots=True)
class PpoOptions:
    """Numbers of the loss.

    Attributes:
        clip: eps of the surrogate, > 0.
        per_head: One ratio a head; else one a step.
        value_clip: c of the value loss; None for a plain one.
        value_coefficient: Weight of the value loss.
        entropy_coefficient: Weight of the entropy bonus.
        entropy_multipliers: k by head; 1 where none is given.
        entropy_floors: By head; those that the policy does not have are of no account.
        entropy_floor_scale: Factor of all floors' penalties.
    """

    clip: float = 0.2
    per_head: bool = True
    value_clip: float | None = None
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    entropy_multipliers: Mapping[str, float] = field(default_factory=dict)
    entropy_floors: Mapping[str, EntropyFloor] = field(default_factory=dict)
    entropy_floor_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class PpoLoss:
    """The total loss, its parts before their coefficients, and what to watch; all scalars.

    `approx_kl` estimates KL(anchor || pi) of whole actions, `mean_w( sum_h m_h k3_h )` by the chain rule; `head_kl` and
    `head_entropy` are means over the steps at which the head was relevant. `clip_fraction` is the share of relevant
    ratios beyond 1 ± clip.
    """

    total: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    entropy_floor_penalty: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    mean_ratio: Tensor
    mean_importance: Tensor
    explained_variance: Tensor
    mean_advantage: Tensor
    mean_value: Tensor
    head_kl: Mapping[str, Tensor]
    head_entropy: Mapping[str, Tensor]

    def statistics(self) -> dict[str, Tensor]:
        """Every scalar by name, detached; those of heads as `head_kl.<head>` and `head_entropy.<head>`."""
        found: dict[str, Tensor] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found[name] = value.detach()
            else:
                found |= {f"{name}.{head}": tensor.detach() for head, tensor in value.items()}
        return found


@torch.no_grad()
def ppo_targets(
    *,
    advantages: Literal["gae", "vtrace"],
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    lambda_: float,
    clip_rho: float | None = 1.0,
    clip_c: float | None = 1.0,
    clip_importance: float | None = 1.0,
) -> PpoTargets:
    """Compute what an update holds fixed, from the anchor's point of view.

    V-trace's advantages come without their weight min(clip_pg_rho, anchor/mu): the loss has it, as `importance`.

    Args:
        advantages: `gae` for PPO, `vtrace` for APPO.
        log_rhos: `[T, B]`, log anchor(a|x) - log mu(a|x) of whole actions.
        discounts: `[T, B]`, gamma, or 0 where the episode ends with this step.
        rewards: `[T, B]`.
        values: `[T, B]`, V(x_t) of the anchor.
        bootstrap_value: `[B]`, V(x_T) of the anchor.
        lambda_: Decay of GAE or of V-trace's trace, in [0, 1].
        clip_rho: V-trace's truncation in its targets; None for none.
        clip_c: V-trace's truncation of the trace; None for none.
        clip_importance: rho_bar of the loss; None for none.

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
    importance = clipped(importance_ratios(log_rhos), clip_importance)
    if advantages == "gae":
        estimated = gae(rewards, discounts, values, bootstrap_value, lambda_)
        return PpoTargets(estimated.advantages, estimated.returns, importance)
    traced = vtrace(
        log_rhos,
        discounts,
        rewards,
        values,
        bootstrap_value,
        clip_rho=clip_rho,
        clip_c=clip_c,
        lambda_=lambda_,
    )
    following = next_values(traced.vs, bootstrap_value, discounts)
    return PpoTargets(rewards + discounts * following - values, traced.vs, importance)


@torch.no_grad()
def normalise_advantages(
    advantages: Tensor, valid: Tensor | None = None, *, deviation_min: float = 0.1
) -> Tensor:
    """`(A - mean) / max(deviation_min, deviation)` over all valid steps of an update, forced ones included.

    Once an update, before it is cut into minibatches: a minibatch's own mean would take away from it what it has in
    common. The floor keeps advantages that are all but equal, and so all but noise, from being blown up.

    Args:
        advantages: `[T, B]`.
        valid: `[T, B]`, bool or 0 and 1; all of them if None. Others get 0.
        deviation_min: Floor of the population standard deviation, > 0.

    Returns:
        `[T, B]`.

    Raises:
        ValueError: Shapes do not agree; the message names the argument.
    """
    check_unrolls(advantages=advantages)
    counted = torch.ones_like(advantages) if valid is None else valid
    check_masks(advantages, valid=counted)
    weights = counted.to(advantages.dtype)
    known = advantages.masked_fill(weights == 0, 0.0)
    centred = known - weighted_mean(known, weights)
    deviation = weighted_mean(centred.square(), weights).sqrt()
    return (centred / deviation.clamp(min=deviation_min)).masked_fill(weights == 0, 0.0)


def minibatches(rows: int, count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], ...]:
    """Cut `rows` rows (whole sequences, where the policy remembers) into minibatches by one random permutation.

    Call it once an epoch: each call draws one permutation, and each row is in exactly one minibatch.

    Args:
        rows: How many, >= 1.
        count: Minibatches, in [1, rows]; their sizes differ by at most one.
        rng: Source of chance.

    Returns:
        `count` arrays of row numbers.

    Raises:
        ValueError: `count` is outside [1, rows].
    """
    if not 1 <= count <= rows:
        raise ValueError(f"{rows} rows cannot be cut into {count} minibatches; count must be in [1, {rows}]")
    return tuple(np.array_split(rng.permutation(rows), count))


def ppo_loss(
    *,
    heads: Mapping[str, PpoHead],
    advantages: Tensor,
    importance: Tensor,
    values: Tensor,
    anchor_values: Tensor,
    value_targets: Tensor,
    policy_weights: Tensor,
    value_weights: Tensor,
    options: PpoOptions,
) -> PpoLoss:
    """Compute the loss of one minibatch.

    Args:
        heads: By name; at least one.
        advantages: `[T, B]`, normalised or not, without gradient.
        importance: `[T, B]`, rho, without gradient; all ones on-policy.
        values: `[T, B]`, V(x_t); gradient flows.
        anchor_values: `[T, B]`, V(x_t) at the start of the update, for value clipping.
        value_targets: `[T, B]`, without gradient.
        policy_weights: `[T, B]` >= 0; 0 where there was no choice.
        value_weights: `[T, B]` >= 0.
        options: The numbers.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: No head, or shapes or dtypes do not agree; the message names the argument.
    """
    _check(
        heads,
        advantages=advantages,
        importance=importance,
        values=values,
        anchor_values=anchor_values,
        value_targets=value_targets,
        policy_weights=policy_weights,
        value_weights=value_weights,
    )
    relevant_HTB = torch.stack([head.relevance.bool() for head in heads.values()])
    weights_HTB = relevant_HTB.to(values.dtype) * policy_weights
    moved_HTB = torch.stack([head.log_probs - head.anchor_log_probs for head in heads.values()])
    # where, not a product: at an irrelevant head both may be -inf, and their difference is then NaN.
    log_ratios_HTB = torch.where(relevant_HTB, moved_HTB, 0.0)

    surrogate = _surrogate(log_ratios_HTB, weights_HTB, policy_weights, advantages, importance, options)
    value_loss = _value_loss(values, anchor_values, value_targets, value_weights, options.value_clip)
    entropies_HTB = torch.stack([head.entropies for head in heads.values()])
    multipliers = values.new_tensor([options.entropy_multipliers.get(name, 1.0) for name in heads])
    bonus_TB = (multipliers.view(-1, 1, 1) * relevant_HTB.to(values.dtype) * entropies_HTB).sum(0)
    entropy = weighted_mean(bonus_TB, policy_weights)
    floors = entropy_floor_penalty(
        {name: head.entropies for name, head in heads.items()},
        {name: head.availability for name, head in heads.items()},
        policy_weights,
        options.entropy_floors,
        options.entropy_floor_scale,
    )
    total = surrogate.loss + options.value_coefficient * value_loss
    total = total - options.entropy_coefficient * entropy + floors
    with torch.no_grad():
        k3_HTB = kl_k3(log_ratios_HTB.clamp(-LOG_RHO_MAX, LOG_RHO_MAX))
        named = list(zip(heads, weights_HTB, strict=True))
        return PpoLoss(
            total=total,
            policy_loss=surrogate.loss,
            value_loss=value_loss,
            entropy=entropy,
            entropy_floor_penalty=floors,
            approx_kl=weighted_mean(k3_HTB.sum(0), policy_weights),
            clip_fraction=surrogate.clip_fraction,
            mean_ratio=surrogate.mean_ratio,
            mean_importance=weighted_mean(importance, policy_weights),
            explained_variance=explained_variance(value_targets, values),
            mean_advantage=weighted_mean(advantages, policy_weights),
            mean_value=values.mean(),
            head_kl={name: weighted_mean(k3, w) for (name, w), k3 in zip(named, k3_HTB, strict=True)},
            head_entropy={
                name: weighted_mean(entropy_TB, w)
                for (name, w), entropy_TB in zip(named, entropies_HTB, strict=True)
            },
        )


class _Surrogate(NamedTuple):
    loss: Tensor
    clip_fraction: Tensor
    mean_ratio: Tensor


def _surrogate(
    log_ratios_HTB: Tensor,
    weights_HTB: Tensor,
    policy_weights: Tensor,
    advantages: Tensor,
    importance: Tensor,
    options: PpoOptions,
) -> _Surrogate:
    """Over heads and steps, or, for a joint ratio, over the steps at which any head was relevant."""
    if not options.per_head:
        log_ratios_HTB = log_ratios_HTB.sum(0, keepdim=True)
        weights_HTB = policy_weights * (weights_HTB > 0).any(0, keepdim=True)
    ratios = importance_ratios(log_ratios_HTB)
    bounded = ratios.clamp(1 - options.clip, 1 + options.clip)
    worth = importance * torch.minimum(ratios * advantages, bounded * advantages)
    with torch.no_grad():
        beyond = ((ratios - 1).abs() > options.clip).to(ratios.dtype)
        clip_fraction, mean_ratio = weighted_mean(beyond, weights_HTB), weighted_mean(ratios, weights_HTB)
    return _Surrogate(-weighted_mean(worth, weights_HTB), clip_fraction, mean_ratio)


def _value_loss(
    values: Tensor, anchor_values: Tensor, targets: Tensor, weights: Tensor, clip: float | None
) -> Tensor:
    errors = (targets - values).square()
    if clip is not None:
        near = anchor_values + (values - anchor_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (targets - near).square())
    return 0.5 * weighted_mean(errors, weights)


def _check(heads: Mapping[str, PpoHead], **tensors: Tensor) -> None:
    if not heads:
        raise ValueError("heads must name at least one head")
    by_name = {
        f"{part} of {name}": getattr(head, part)
        for name, head in heads.items()
        for part in ("log_probs", "anchor_log_probs", "entropies")
    }
    check_unrolls(**tensors, **by_name)
    for name, head in heads.items():
        masks = {f"{part} of {name}": getattr(head, part) for part in ("relevance", "availability")}
        check_masks(tensors["advantages"], **masks)
