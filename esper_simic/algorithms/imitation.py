"""Behaviour cloning: the policy learns to do what was recorded.

    L = - mean_w( sum_h m_h log pi(a_h|x) )

over the heads h that were causally relevant (m) in the recorded action: the negative log-likelihood of whole actions.
Entropy is reported, not rewarded; a policy that copies has none to keep.

Source: Pomerleau, Efficient Training of Artificial Neural Networks for Autonomous Navigation (1991); Bain, Sammut, A
Framework for Behavioural Cloning (1995).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_masks, check_unrolls
from esper_simic.algorithms.weighted import weighted_mean


class ImitationHead(NamedTuple):
    """One head at every step, `[T, B]`.

    Attributes:
        log_probs: log pi(a_h|x) of the recorded choice; gradient flows.
        entropies: Of the head.
        relevance: Whether the head had a part in the recorded action, bool or 0 and 1.
        hits: Whether the most probable choice is the recorded one, bool or 0 and 1; None where nobody asked.
    """

    log_probs: Tensor
    entropies: Tensor
    relevance: Tensor
    hits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ImitationLoss:
    """The loss and what to watch; all scalars.

    `entropy` is the mean over steps of the sum over relevant heads; `head_nll` and `head_accuracy` are means over the
    steps at which the head was relevant, the latter for heads with `hits` alone.
    """

    total: Tensor
    entropy: Tensor
    head_nll: Mapping[str, Tensor]
    head_accuracy: Mapping[str, Tensor]

    def statistics(self) -> dict[str, Tensor]:
        """Every scalar by name, detached; those of heads as `head_nll.<head>` and `head_accuracy.<head>`."""
        found = {"total": self.total.detach(), "entropy": self.entropy.detach()}
        found |= {f"head_nll.{head}": tensor.detach() for head, tensor in self.head_nll.items()}
        return found | {
            f"head_accuracy.{head}": tensor.detach() for head, tensor in self.head_accuracy.items()
        }


def imitation_loss(heads: Mapping[str, ImitationHead], weights: Tensor) -> ImitationLoss:
    """Compute the loss of one batch of recorded actions.

    Args:
        heads: By name; at least one.
        weights: `[T, B]` >= 0; 0 where there was no choice.

    Returns:
        The loss and what to watch.

    Raises:
        ValueError: No head, or shapes or dtypes do not agree; the message names the argument.
    """
    if not heads:
        raise ValueError("heads must name at least one head")
    check_unrolls(weights=weights)
    nll, entropy = torch.zeros_like(weights), torch.zeros_like(weights)
    head_nll, head_accuracy = {}, {}
    for name, head in heads.items():
        check_unrolls(
            weights=weights,
            **{f"log_probs of {name}": head.log_probs, f"entropies of {name}": head.entropies},
        )
        check_masks(weights, **{f"relevance of {name}": head.relevance})
        relevant = head.relevance.bool()
        # where, not a product: an irrelevant choice may be one of probability 0.
        lost = torch.where(relevant, -head.log_probs, 0.0)
        counted = weights * relevant.to(weights.dtype)
        nll = nll + lost
        entropy = entropy + torch.where(relevant, head.entropies.detach(), 0.0)
        head_nll[name] = weighted_mean(lost.detach(), counted)
        if head.hits is not None:
            check_masks(weights, **{f"hits of {name}": head.hits})
            head_accuracy[name] = weighted_mean(head.hits.to(weights.dtype), counted)
    return ImitationLoss(
        weighted_mean(nll, weights), weighted_mean(entropy, weights), head_nll, head_accuracy
    )
