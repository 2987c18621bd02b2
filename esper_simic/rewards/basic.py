"""BASIC, the default, and BASIC_PLUS, which holds a fossil to what it promised.

BASIC is the sum of five parts:

* `shaping`: potential-based, on the stages of the slots (`potential.py`); it cannot be farmed.
* `rent`: what blended parameters cost each epoch, relative to the host's own count.
* `fossil_bonus`: paid once, for making a seed permanent that contributes; bounded.
* `terminal_accuracy` and `terminal_parameters`: at the horizon, what was reached and how large the network grew.

BASIC_PLUS pays 30 % of the fossil bonus at once and the rest as a `drip`, an equal share each epoch that is left, as
long as the fossil is worth what it was: less where it is worth less, and a penalty where it harms. Its drip reads what
fossils contribute *now*: the environment must go on ablating them (`MODES_THAT_ABLATE_FOSSILS`).

Neither pays for never fossilising.

Legend: `c` contribution and `p` progress in accuracy points (percent).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import DripRewardConfig, RewardConfig, RewardMode
from esper_simic.lifecycle import BLENDED, Floats, SeedStage
from esper_simic.rewards.contribution import harmonic_mean
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import shaping

BASIC_PARTS: Final = ("shaping", "rent", "fossil_bonus", "terminal_accuracy", "terminal_parameters")
"""Names of the parts of the BASIC reward; they sum to it."""

BASIC_PLUS_PARTS: Final = (
    "shaping",
    "rent",
    "fossil_bonus",
    "drip",
    "terminal_accuracy",
    "terminal_parameters",
)
"""Names of the parts of the BASIC_PLUS reward."""

MODES_THAT_ABLATE_FOSSILS: Final[frozenset[RewardMode]] = frozenset({"basic_plus"})
"""Modes that read what fossils contribute; in every other one a fossil is never switched off."""


def fossil_bonus(contribution: Floats, progress: Floats, weights: RewardConfig) -> NDArray[np.float64]:
    """Worth of making a seed permanent: `min(base + k * harmonic, bound)`, 0 unless it contributes.

    `harmonic = 2 p c / (p + c)`: both the seed's own contribution `c` and the host's progress `p` since germination
    must be real. With `c > 0` and `p <= 0` only the base is paid; with `c <= 0` (or never measured) nothing is.

    Args:
        contribution: `[...]` points, NaN where never measured.
        progress: `[...]` points.
        weights: `fossil_bonus_base`, `fossil_bonus_per_point` (k) and `fossil_bonus_max` (bound).

    Returns:
        `[...]` float64, in [0, bound].
    """
    c = np.nan_to_num(contribution, nan=0.0)
    p = np.nan_to_num(progress, nan=0.0)
    bonus = np.minimum(
        weights.fossil_bonus_base + weights.fossil_bonus_per_point * harmonic_mean(c, p),
        weights.fossil_bonus_max,
    )
    return np.where(c > 0, bonus, 0.0)


def basic(outcome: Outcome, weights: RewardConfig, *, gamma: float) -> dict[str, NDArray[np.float64]]:
    """The BASIC reward of one step.

    Args:
        outcome: What happened.
        weights: Weight of each part.
        gamma: The learner's own discount; another one would let shaping change which policy is best.

    Returns:
        Name to `[E]` float64, in the order of `BASIC_PARTS`; the reward is their sum.
    """
    blended = np.where(BLENDED[outcome.stage], outcome.seed_parameters, 0)
    rented = (outcome.alpha * blended).sum(axis=-1) / outcome.host_parameters
    grown = blended.sum(axis=-1) / outcome.host_parameters
    bonuses = fossil_bonus(outcome.contribution, outcome.progress, weights)
    return {
        "shaping": shaping(outcome, weights, weights.potential_weight, gamma),
        "rent": -weights.rent_weight * rented,
        "fossil_bonus": np.where(outcome.fossilized, bonuses, 0.0).sum(axis=-1),
        "terminal_accuracy": terminal_accuracy(outcome, weights.terminal_accuracy_weight),
        "terminal_parameters": np.where(outcome.terminated, -weights.terminal_parameter_weight * grown, 0.0),
    }


def terminal_accuracy(outcome: Outcome, weight: float) -> NDArray[np.float64]:
    """`weight` times the accuracy in percent, at the horizon, `[E]`."""
    return np.where(outcome.terminated, weight * outcome.accuracy.astype(np.float64), 0.0)


def basic_plus(
    outcome: Outcome,
    weights: RewardConfig,
    share: NDArray[np.float64],
    promised: NDArray[np.float64],
    *,
    gamma: float,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64], NDArray[np.float64]]:
    """The BASIC_PLUS reward of one step.

    Args:
        outcome: What happened.
        weights: Weight of each part.
        share: `[E, S]` what each fossil is owed an epoch; 0 where there is none.
        promised: `[E, S]` points each of them was worth when it was fossilised.
        gamma: The learner's own discount.

    Returns:
        Name to `[E]` float64, in the order of `BASIC_PLUS_PARTS`; then `share` and `promised` for the next step.
    """
    rules = weights.drip
    parts = basic(outcome, weights, gamma=gamma)
    dripped = drip(outcome.contribution, share, promised, rules)
    parts["fossil_bonus"] = (1.0 - rules.share) * parts["fossil_bonus"]
    bonuses = fossil_bonus(outcome.contribution, outcome.progress, weights)
    epochs_left = np.maximum(outcome.horizon - outcome.epoch, rules.epochs_min)[:, None]
    share = np.where(outcome.fossilized, rules.share * bonuses / epochs_left, share)
    promised = np.where(outcome.fossilized, np.nan_to_num(outcome.contribution, nan=0.0), promised)
    standing = outcome.stage == SeedStage.FOSSILIZED
    parts["drip"] = np.where(standing, dripped, 0.0).sum(axis=-1)
    return (
        {name: parts[name] for name in BASIC_PLUS_PARTS},
        np.where(standing, share, 0.0),
        np.where(standing, promised, 0.0),
    )


def drip(
    contribution: Floats, share: Floats, promised: Floats, rules: DripRewardConfig
) -> NDArray[np.float64]:
    """What fossils are paid in an epoch: `clip(share * clip(c / promised, -1, 1), -m/2, m)`.

    `m` is `epoch_max`, the half `negative_share`. A fossil that is worth what it was, or more, is paid its whole share,
    so all drips together never exceed their share of the bonus; one that was not measured is paid nothing.

    Args:
        contribution: `[...]` points, NaN where not measured.
        share: `[...]` what each is owed an epoch.
        promised: `[...]` points it was worth when it was fossilised; nothing is paid where that is not positive.
        rules: The bounds.
    """
    kept = np.where(promised > 0, contribution / np.where(promised > 0, promised, 1.0), 0.0)
    owed = share * np.clip(np.nan_to_num(kept, nan=0.0), -1.0, 1.0)
    return np.asarray(np.clip(owed, -rules.negative_share * rules.epoch_max, rules.epoch_max))
