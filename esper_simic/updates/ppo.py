"""PPO and APPO: several epochs of minibatches around one anchor, ended early when the policy has moved far enough.

A minibatch is some lanes of the batch with all their steps, since the policy may remember.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esper_simic.algorithms.entropy_floor import EntropyFloor, entropy_floor_scale
from esper_simic.algorithms.ppo import (
    KL_STOP_FACTOR,
    PpoHead,
    PpoLoss,
    PpoOptions,
    PpoTargets,
    minibatches,
    normalise_advantages,
    ppo_loss,
    ppo_targets,
)
from esper_simic.policies.policy import Evaluation
from esper_simic.telemetry import Phase
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated, ratios_of


def ppo_update(batch: Batch, terms: Terms) -> Updated:
    """Make one update; see `Update`."""
    trainer, length = terms.trainer, batch.length
    with torch.no_grad():
        anchor = terms.evaluate(batch)
    log_rhos = anchor.log_probs[:length] - batch.trajectory.behaviour_log_probs
    ratios = ratios_of(anchor.log_probs[:length], batch.trajectory.behaviour_log_probs, batch.policy_weights)
    if trainer.algorithm == "APPO" and not ratios.finite:
        # As with TD(0), no weight corrects such a batch; that they are no numbers is V-trace's failure alone.
        log_rhos = torch.zeros_like(log_rhos)
    uses_vtrace = trainer.algorithm == "APPO" and terms.targets(ratios) == "vtrace"
    targets = _targets(batch, anchor, log_rhos, terms, uses_vtrace=uses_vtrace)
    options = _options(terms)
    losses: list[PpoLoss] = []
    norms: list[float] = []
    is_far = False
    for _ in range(trainer.ppo_epochs):
        for lanes in minibatches(batch.lanes, min(trainer.ppo_minibatches, batch.lanes), terms.rng):
            loss = _minibatch_loss(batch, anchor, targets, torch.from_numpy(lanes), terms, options)
            limit = trainer.ppo_target_kl
            # Before the first step nothing has moved: what adapters drop is the same in all of an update.
            is_far = bool(losses) and limit is not None and float(loss.approx_kl) > KL_STOP_FACTOR * limit
            if is_far:
                break
            norms.append(terms.minimise(loss.total))
            losses.append(loss)
        if is_far:
            break
    metrics = _means(losses) | {
        "ppo_steps": float(len(losses)),
        "ppo_stopped_early": float(is_far),
    }
    return Updated(
        loss=metrics["total"],
        policy_loss=metrics["policy_loss"],
        value_loss=metrics["value_loss"],
        grad_norm=max(norms),
        ratios=ratios if trainer.algorithm == "APPO" else None,
        metrics=metrics,
    )


def _targets(
    batch: Batch, anchor: Evaluation, log_rhos: Tensor, terms: Terms, *, uses_vtrace: bool
) -> PpoTargets:
    trainer, length = terms.trainer, batch.length
    targets = ppo_targets(
        advantages="vtrace" if uses_vtrace else "gae",
        log_rhos=log_rhos,
        discounts=batch.discounts,
        rewards=batch.rewards,
        values=anchor.values[:length],
        bootstrap_value=anchor.values[length],
        lambda_=trainer.vtrace_lambda if uses_vtrace else trainer.gae_lambda,
        clip_rho=trainer.rho_bar,
        clip_c=trainer.c_bar,
        clip_importance=trainer.effective_clip_pg_rho,
    )
    if not trainer.normalise_advantages:
        return targets
    normalised = normalise_advantages(targets.advantages, deviation_min=trainer.advantage_deviation_min)
    return targets._replace(advantages=normalised)


def _options(terms: Terms) -> PpoOptions:
    trainer = terms.trainer
    floors = {
        head: EntropyFloor(level, trainer.entropy_floor_coefficients[head])
        for head, level in trainer.entropy_floors.items()
    }
    return PpoOptions(
        clip=trainer.ppo_clip,
        per_head=trainer.ppo_per_head,
        value_clip=trainer.ppo_value_clip,
        value_coefficient=trainer.value_coefficient,
        entropy_coefficient=terms.entropy_coefficient,
        entropy_multipliers=trainer.entropy_multipliers,
        entropy_floors=floors,
        entropy_floor_scale=entropy_floor_scale(terms.progress),
    )


def _minibatch_loss(
    batch: Batch, anchor: Evaluation, targets: PpoTargets, lanes: Tensor, terms: Terms, options: PpoOptions
) -> PpoLoss:
    part = batch.of_lanes(lanes)
    length = part.length
    evaluation = terms.evaluate(part)
    terms.observer.passed(Phase.FORWARD)
    new, old = evaluation.heads, anchor.heads
    return terms.loss(
        ppo_loss,
        heads={
            head: PpoHead(
                log_probs=new.head_log_probs[head][:length],
                anchor_log_probs=old.head_log_probs[head][:length, lanes],
                entropies=new.head_entropies[head][:length],
                relevance=new.relevance[head][:length],
                availability=new.available[head][:length],
            )
            for head in new.head_log_probs
        },
        advantages=targets.advantages[:, lanes],
        importance=targets.importance[:, lanes],
        values=evaluation.values[:length],
        anchor_values=anchor.values[:length, lanes],
        value_targets=targets.value_targets[:, lanes],
        policy_weights=part.policy_weights,
        value_weights=part.value_weights,
        options=options,
    )


def _means(losses: list[PpoLoss]) -> dict[str, float]:
    """Means over the steps that were made; the first minibatch is always one, at the anchor nothing has moved."""
    each = [{name: float(value) for name, value in loss.statistics().items()} for loss in losses]
    return {name: float(np.mean([found[name] for found in each])) for name in each[0]}
