"""Behaviour cloning: one gradient step towards doing what was recorded."""

from __future__ import annotations

from esper_simic.algorithms.imitation import ImitationHead, imitation_loss
from esper_simic.telemetry import Phase
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated, judged_likelihood


def imitation_update(batch: Batch, terms: Terms) -> Updated:
    """Make one update; see `Update`. The values learn nothing: the one who is copied had none."""
    evaluation, length = terms.evaluate(batch), batch.length
    terms.observer.passed(Phase.FORWARD)
    heads = evaluation.heads
    loss = terms.loss(
        imitation_loss,
        {
            head: ImitationHead(
                log_probs=log_probs[:length],
                entropies=heads.head_entropies[head][:length],
                relevance=heads.relevance[head][:length],
            )
            for head, log_probs in heads.head_log_probs.items()
        },
        batch.policy_weights,
    )
    norm = terms.minimise(loss.total)
    metrics = {name: float(value) for name, value in loss.statistics().items()}
    total = metrics["total"]
    metrics |= {"policy_loss": total, "value_loss": 0.0}
    return Updated(total, judged_likelihood(total), 0.0, norm, None, metrics)
