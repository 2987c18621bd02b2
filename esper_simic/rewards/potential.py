"""The potential of a host's slots, and the shaping it gives.

`shaping = w (gamma phi(s') - phi(s))`, potential-based. `phi` of a terminal state is 0, so the discounted sum of an
episode's shaping is `-w phi(s_0)` = 0 whatever the controller does: it speeds learning up and cannot be farmed
(docs/decisions/0002-shaping-ends-at-zero.md). `gamma` is the learner's own; another one would break the sum. A
germination is thus paid at once, a pruned seed forfeits its potential, and what a seed that never was blended in has
been paid is taken back at the end, with interest.

Source: Ng, Harada & Russell, Policy invariance under reward transformations, ICML 1999 (theorem 1; terminal states of
an episodic task have potential 0).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import RewardConfig
from esper_simic.lifecycle import Bools, Floats, Integers, SeedStage
from esper_simic.rewards.outcome import Outcome


def _stage_potentials() -> NDArray[np.float64]:
    table = np.zeros(max(SeedStage) + 1)
    table[SeedStage.GERMINATED] = 1.0
    table[SeedStage.TRAINING] = 2.0
    table[SeedStage.BLENDING] = 3.5
    table[SeedStage.HOLDING] = 5.5
    table[SeedStage.FOSSILIZED] = 6.0
    table.setflags(write=False)
    return table


STAGE_POTENTIAL: Final = _stage_potentials()
"""Potential of a slot by its stage; stages that are missing count 0."""


def potential(stage: Integers, epochs_in_stage: Integers, weights: RewardConfig) -> NDArray[np.float64]:
    """Potential of a host: `sum over slots of base(stage) + min(b n, b_max)`, the latter where base > 0.

    Args:
        stage: `[E, S]` values of `SeedStage`.
        epochs_in_stage: `[E, S]`, the `n` of the formula.
        weights: `stage_bonus_per_epoch` is `b`, `stage_bonus_max` is `b_max`.

    Returns:
        `[E]` float64.
    """
    base = STAGE_POTENTIAL[stage]
    growth = np.minimum(weights.stage_bonus_per_epoch * epochs_in_stage, weights.stage_bonus_max)
    return np.asarray(np.where(base > 0, base + growth, 0.0).sum(axis=-1))


def shaping(outcome: Outcome, weights: RewardConfig, weight: float, gamma: float) -> NDArray[np.float64]:
    """`weight (gamma phi(s') - phi(s))`, `[E]`, with `phi(s')` = 0 at the horizon."""
    before = potential(outcome.stage_before, outcome.epochs_before, weights)
    after = potential(outcome.stage, outcome.epochs_in_stage, weights)
    return difference(before, after, outcome.terminated, weight, gamma)


def timed_shaping(
    outcome: Outcome, weights: RewardConfig, weight: float, gamma: float
) -> NDArray[np.float64]:
    """Shaping in which a seed that germinates early is worth less for as long as it lives, `[E]`.

    `phi(s)` loses `(1 - discount) base(GERMINATED)` for every seed: the germination is paid with its timing discount,
    and because the discount stays in the potential, so is what a prune forfeits and the end takes back. Lowered at the
    germination only, the sum of an episode would depend on when seeds germinate.
    """
    epoch = outcome.epoch[:, None]
    before = _timed_potential(
        outcome.stage_before, outcome.epochs_before, epoch - 1 - outcome.age_before, weights
    )
    after = _timed_potential(outcome.stage, outcome.epochs_in_stage, epoch - outcome.age, weights)
    return difference(before, after, outcome.terminated, weight, gamma)


def difference(
    before: Floats, after: Floats, terminated: Bools, weight: float, gamma: float
) -> NDArray[np.float64]:
    """`weight (gamma phi(s') - phi(s))`, `[E]`, with `phi(s')` = 0 where the episode terminated."""
    return np.asarray(weight * (gamma * np.where(terminated, 0.0, after) - before))


def timing_discount(germinated_at: Integers, weights: RewardConfig) -> NDArray[np.float64]:
    """Discount of seeds by the epoch in which they germinated: `min(1, m + (1 - m) g / n)`.

    The host learns fastest at the start; a seed that is planted then would be credited with it.

    Args:
        germinated_at: `[...]`, the `g` of the formula: epochs of the episode that had passed at the germination.
        weights: `shaped.timing_discount_min` is `m`, `shaped.timing_discount_epochs` is `n` (0: no discount).
    """
    shaped = weights.shaped
    if shaped.timing_discount_epochs == 0:
        return np.ones(np.shape(germinated_at))
    least = shaped.timing_discount_min
    share = np.clip(np.asarray(germinated_at) / shaped.timing_discount_epochs, 0.0, 1.0)
    return np.asarray(least + (1.0 - least) * share)


def _timed_potential(
    stage: Integers, epochs_in_stage: Integers, germinated_at: Integers, weights: RewardConfig
) -> NDArray[np.float64]:
    forgone = (1.0 - timing_discount(germinated_at, weights)) * STAGE_POTENTIAL[SeedStage.GERMINATED]
    early = np.where(STAGE_POTENTIAL[stage] > 0, forgone, 0.0)
    return np.asarray(potential(stage, epochs_in_stage, weights) - early.sum(axis=-1))
