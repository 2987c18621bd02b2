"""ESCROW: attribution that must be earned for good.

A seed has a credit: what it would be attributed now, held against an accuracy that is *stable* (the least of the last
three epochs'). A step pays how far the credit has risen and takes back how far it has fallen, at most 2 a step. A seed
that is fossilised keeps what it was paid; one that is pruned, or still live at the horizon, gives all of it back. So
the part `escrow` sums, over an episode, to the credits of the seeds that were fossilised, and never fossilising earns
nothing by it: **ESCROW does not pay for holding seeds for ever**.

All other parts are those of SHAPED but `attribution` and `ratio_penalty`, which the credit contains. Indecision costs
while a seed in HOLDING has a credit.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import RewardConfig
from esper_simic.lifecycle import LIVE
from esper_simic.rewards.contribution import Evidence, credited, ratio_penalty
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.shaped import DENSE_PARTS, dense

ESCROW_PARTS: Final = ("escrow", *DENSE_PARTS)
"""Names of the parts of the ESCROW reward; they sum to it."""


def escrow(
    outcome: Outcome,
    found: Evidence,
    hindsight: NDArray[np.float64],
    stable_accuracy: NDArray[np.float64],
    credit: NDArray[np.float64],
    weights: RewardConfig,
    *,
    gamma: float,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """The ESCROW reward of one step.

    Args:
        outcome: What happened.
        found: What seeds are judged by.
        hindsight: `[E]` credit for the partners of seeds fossilised in this step.
        stable_accuracy: `[E]` percent, the least of the last epochs', this one included.
        credit: `[E, S]` what each seed has been paid and not yet earned for good.
        weights: Weight of each part.
        gamma: The learner's own discount.

    Returns:
        Name to `[E]` float64, in the order of `ESCROW_PARTS`, and `credit` for the next step.
    """
    target = target_credit(outcome, found, stable_accuracy, weights)
    bound = weights.escrow.step_max
    kept = LIVE[outcome.stage] & ~found.pruned & ~outcome.terminated[:, None]
    change = np.where(kept, np.clip(target - credit, -bound, bound), np.where(found.fossilized, 0.0, -credit))
    held = np.where(kept, credit + change, 0.0)
    parts = {"escrow": change.sum(axis=-1)}
    return parts | dense(outcome, found, held, hindsight, weights, gamma=gamma), held


def target_credit(
    outcome: Outcome, found: Evidence, stable_accuracy: NDArray[np.float64], weights: RewardConfig
) -> NDArray[np.float64]:
    """Credit that seeds should have: `max(0, credited(c, p_stable) + ratio_penalty)`, `[E, S]`.

    `p_stable = p - (accuracy - stable accuracy)`: progress that did not last is not counted. A seed that harms has no
    credit; discounts for regression and timing do not apply.
    """
    unstable = (outcome.accuracy - stable_accuracy)[:, None]
    worth = credited(found.contribution, found.progress - unstable, weights.shaped)
    credit = weights.shaped.attribution_weight * worth + ratio_penalty(found, weights.shaped)
    return np.where(found.held, np.maximum(credit, 0.0), 0.0)
