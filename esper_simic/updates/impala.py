"""IMPALA: one gradient step on one batch, off-policy by V-trace; TD(0) where the ladder has fallen back to it."""

from __future__ import annotations

from esper_simic.algorithms.impala import impala_loss
from esper_simic.telemetry import Phase
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated, ratios_of


def impala_update(batch: Batch, terms: Terms) -> Updated:
    """Make one update; see `Update`."""
    trainer, length = terms.trainer, batch.length
    evaluation = terms.evaluate(batch)
    terms.observer.passed(Phase.FORWARD)
    log_probs, behaviour = evaluation.log_probs[:length], batch.trajectory.behaviour_log_probs
    ratios = ratios_of(log_probs, behaviour, batch.policy_weights)
    loss = terms.loss(
        impala_loss,
        log_probs=log_probs,
        behaviour_log_probs=behaviour,
        values=evaluation.values[:length],
        bootstrap_value=evaluation.values[length].detach(),
        rewards=batch.rewards,
        discounts=batch.discounts,
        entropies=evaluation.entropy[:length],
        policy_weights=batch.policy_weights,
        value_weights=batch.value_weights,
        clip_rho=trainer.rho_bar,
        clip_c=trainer.c_bar,
        clip_pg_rho=trainer.effective_clip_pg_rho,
        lambda_=trainer.vtrace_lambda,
        value_coefficient=trainer.value_coefficient,
        entropy_coefficient=terms.entropy_coefficient,
        targets=terms.targets(ratios),
    )
    terms.observer.passed(Phase.VTRACE)
    norm = terms.minimise(loss.total)
    metrics = {name: float(value) for name, value in loss.statistics().items()}
    metrics |= batch.head_entropies(evaluation)
    return Updated(
        loss=metrics["total"],
        policy_loss=metrics["policy_loss"],
        value_loss=metrics["value_loss"],
        grad_norm=norm,
        ratios=ratios,
        metrics=metrics,
    )
