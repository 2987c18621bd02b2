"""SHAPED: the dense reward. **It can be farmed**: a seed kept in HOLDING is paid its attribution every epoch, for ever.

| part | what it pays |
|---|---|
| `attribution` | every held seed, each epoch, what it is credited with (`contribution.py`) |
| `ratio_penalty` | seeds that hold the host to ransom (`contribution.py`) |
| `shaping` | potential-based, early seeds discounted (`potential.timed_shaping`) |
| `blending_warning` | `-0.1 - min(0.05 n, 0.3)` a seed in its n-th epoch of BLENDING while `d < 0` |
| `indecision` | worthy seeds that are left in HOLDING (`contribution.py`) |
| `synergy` | `0.1 tanh(0.5 I)` a held seed whose interaction `I` with its partners is positive |
| `rent` | `-min(0.5 ln(1 + effective / max(host, 200)), 1.5)` |
| `alpha_shock` | `-min(0.1958 sum (delta alpha)^2 parameters / max(host, 200), 1)` |
| `occupancy` | -0.01 a slot occupied beyond the first, -0.002 a fossil |
| `action` | costs and bonuses of the operation (`operations.py`) |
| `terminal_accuracy` | 0.05 a point, at the horizon |
| `hindsight` | at a fossilisation, up to 0.2 for the partners that made the seed better |
| `auto_prune` | -0.2 a seed that the environment had to prune |

`effective` is the sum over slots in BLENDING, HOLDING and FOSSILIZED of `alpha parameters + 0.0039 host`. All terms of
seeds are summed over the slots of a host: WAIT names no slot, so its reward must not depend on one.

Numbers are the defaults of `environment.reward.shaped`. A return under SHAPED proves nothing; judge by accuracy and
parameters.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import RewardConfig, ShapedRewardConfig
from esper_simic.lifecycle import BLENDED, LIVE, OCCUPIED, Floats, SeedStage
from esper_simic.rewards.basic import terminal_accuracy
from esper_simic.rewards.contribution import Evidence, attribution, indecision, ratio_penalty
from esper_simic.rewards.operations import operation
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import timed_shaping

DENSE_PARTS: Final = (
    "shaping",
    "blending_warning",
    "indecision",
    "synergy",
    "rent",
    "alpha_shock",
    "occupancy",
    "action",
    "terminal_accuracy",
    "hindsight",
    "auto_prune",
)
"""Names of the parts that SHAPED and ESCROW share."""

SHAPED_PARTS: Final = ("attribution", "ratio_penalty", *DENSE_PARTS)
"""Names of the parts of the SHAPED reward; they sum to it."""


def shaped(
    outcome: Outcome, found: Evidence, hindsight: Floats, weights: RewardConfig, *, gamma: float
) -> dict[str, NDArray[np.float64]]:
    """The SHAPED reward of one step.

    Args:
        outcome: What happened.
        found: What seeds are judged by.
        hindsight: `[E]` credit for the partners of seeds fossilised in this step (`hindsight_credit`).
        weights: Weight of each part.
        gamma: The learner's own discount.

    Returns:
        Name to `[E]` float64, in the order of `SHAPED_PARTS`; the reward is their sum.
    """
    attributed = attribution(found, outcome, weights.shaped)
    return {
        "attribution": attributed.sum(axis=-1),
        "ratio_penalty": ratio_penalty(found, weights.shaped).sum(axis=-1),
    } | dense(outcome, found, attributed, hindsight, weights, gamma=gamma)


def dense(
    outcome: Outcome,
    found: Evidence,
    worth: Floats,
    hindsight: Floats,
    weights: RewardConfig,
    *,
    gamma: float,
) -> dict[str, NDArray[np.float64]]:
    """The parts that SHAPED and ESCROW share, in the order of `DENSE_PARTS`; arguments as in `shaped`.

    `worth`, `[E, S]`, is what the mode holds the seeds to be worth: where it is positive, waiting is indecision.
    """
    rules = weights.shaped
    return {
        "shaping": timed_shaping(outcome, weights, weights.potential_weight, gamma),
        "blending_warning": blending_warning(outcome, found, rules),
        "indecision": indecision(found, worth, outcome, rules),
        "synergy": synergy(outcome, found, rules),
        "rent": rent(outcome, rules),
        "alpha_shock": alpha_shock(outcome, rules),
        "occupancy": occupancy(outcome, rules),
        "action": operation(outcome, rules),
        "terminal_accuracy": terminal_accuracy(outcome, weights.terminal_accuracy_weight),
        "hindsight": np.asarray(hindsight, dtype=np.float64),
        "auto_prune": -rules.auto_prune_cost * outcome.auto_pruned.sum(axis=-1),
    }


def blending_warning(outcome: Outcome, found: Evidence, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """`-0.1 - min(0.05 n, 0.3)` for each seed in its n-th epoch of BLENDING while `d < 0`, `[E]`."""
    growth = np.minimum(
        rules.blending_warning_per_epoch * outcome.epochs_in_stage, rules.blending_warning_growth_max
    )
    warned = (outcome.stage == SeedStage.BLENDING) & (found.improvement < 0)
    return np.asarray(-np.where(warned, rules.blending_warning + growth, 0.0).sum(axis=-1))


def synergy(outcome: Outcome, found: Evidence, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """`0.1 tanh(0.5 I)` for each held seed with a positive interaction `I`, `[E]`."""
    together = np.maximum(np.nan_to_num(outcome.interaction, nan=0.0), 0.0)
    bonus = rules.synergy_weight * np.tanh(rules.synergy_slope * together)
    return np.asarray(np.where(found.held, bonus, 0.0).sum(axis=-1))


def rent(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """`-min(w ln(1 + effective / max(host, 200)), bound)`, `[E]`; see the module."""
    own = outcome.alpha * outcome.seed_parameters + rules.rent_host_share * outcome.host_parameters
    effective = np.where(BLENDED[outcome.stage], own, 0.0).sum(axis=-1)
    growth = np.log1p(effective / max(outcome.host_parameters, rules.host_parameters_min))
    return np.asarray(-np.minimum(rules.rent_weight * growth, rules.rent_max))


def alpha_shock(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """`-min(w sum (alpha - alpha_before)^2 parameters_before / max(host, 200), bound)`, `[E]`."""
    change = (outcome.alpha - outcome.alpha_before) ** 2 * outcome.parameters_before
    relative = change.sum(axis=-1) / max(outcome.host_parameters, rules.host_parameters_min)
    return np.asarray(-np.minimum(rules.alpha_shock_weight * relative, rules.alpha_shock_max))


def occupancy(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """-0.01 for each occupied slot beyond the free ones, -0.002 for each fossil, `[E]`."""
    occupied = OCCUPIED[outcome.stage].sum(axis=-1)
    fossils = (outcome.stage == SeedStage.FOSSILIZED).sum(axis=-1)
    excess = np.maximum(occupied - rules.slots_free, 0)
    return np.asarray(-rules.slot_cost * excess - rules.fossil_cost * fossils)


def hindsight_credit(
    found: Evidence,
    boost: NDArray[np.float64],
    delay_epochs: NDArray[np.int64],
    rules: ShapedRewardConfig,
    gamma: float,
) -> NDArray[np.float64]:
    """Credit for partners that made a seed better, when that seed is fossilised, `[E]` in [0, 0.2] each.

    `0.2 tanh(0.1 boost d) gamma^delay`, where `boost` is the last positive interaction of the fossilised seed with its
    partners and `delay` the epochs since it was measured: a partner that was pruned in between counts all the same.

    Args:
        found: What seeds are judged by.
        boost: `[E, S]` points, 0 where there never was one.
        delay_epochs: `[E, S]`.
        rules: `hindsight_max` and `hindsight_slope`.
        gamma: The learner's own discount.
    """
    gain = boost * np.maximum(np.nan_to_num(found.improvement, nan=0.0), 0.0)
    credit = rules.hindsight_max * np.tanh(rules.hindsight_slope * gain) * gamma**delay_epochs
    return np.asarray(np.where(found.fossilized, credit, 0.0).sum(axis=-1))


def followed_boost(
    outcome: Outcome, boost: NDArray[np.float64], delay_epochs: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`boost` and `delay_epochs` of `hindsight_credit` for the next step, `[E, S]` each."""
    live = LIVE[outcome.stage]
    measured = live & (np.nan_to_num(outcome.interaction, nan=0.0) > 0)
    boost = np.where(measured, outcome.interaction, np.where(live, boost, 0.0))
    return boost, np.where(measured | ~live, 0, delay_epochs + 1)
