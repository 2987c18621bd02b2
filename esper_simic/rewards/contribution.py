"""What a seed is credited with: its contribution, held against the progress of the host.

A contribution `c` is what the accuracy loses when the seed is switched off. It is a removal cost: a host that has come
to rely on a seed loses much without it, even where it would have done as well had the seed never been there. So `c` is
held against the progress `p` of the host since the germination, and against the clean improvement `d`, what all live
seeds together are worth.

Legend: `c` contribution, `p` progress, `d` total improvement, all in accuracy points (percent).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Op
from esper_simic.config_rewards import RewardConfig, ShapedRewardConfig
from esper_simic.lifecycle import BLENDED, LIVE, Bools, Floats, SeedStage
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import timing_discount


@dataclass(frozen=True, slots=True)
class Evidence:
    """What every seed is judged by in a step, `[E, S]` each.

    A seed that this step fossilised or pruned is judged by what was known when that was decided: afterwards it is no
    longer measured. Every other seed is judged by what the step's own validation measured.

    | field | meaning |
    |---|---|
    | `contribution`, `progress`, `improvement` | `c`, `p` and `d`; NaN where unknown |
    | `held` | live and blended after the step, and no prune was decided |
    | `pruned`, `fossilized` | decided in this step, and accepted |
    | `timing` | discount by the epoch of germination |
    """

    contribution: NDArray[np.float64]
    progress: NDArray[np.float64]
    improvement: NDArray[np.float64]
    held: Bools
    pruned: Bools
    fossilized: Bools
    timing: NDArray[np.float64]


def evidence(outcome: Outcome, weights: RewardConfig) -> Evidence:
    """Collect what seeds are judged by in a step."""
    pruned = outcome.happened(Op.PRUNE)
    fossilized = outcome.fossilized.astype(np.bool_)
    decided = pruned | fossilized
    epoch = outcome.epoch[:, None]
    germinated_at = np.where(decided, epoch - 1 - outcome.age_before, epoch - outcome.age)
    shape = outcome.stage.shape
    return Evidence(
        contribution=np.where(decided, outcome.contribution_before, outcome.contribution),
        progress=np.where(decided, outcome.progress_before, outcome.progress),
        improvement=np.where(
            decided,
            np.broadcast_to(outcome.improvement_before[:, None], shape),
            np.broadcast_to(outcome.improvement[:, None], shape),
        ),
        held=BLENDED[outcome.stage] & LIVE[outcome.stage] & ~pruned,
        pruned=pruned,
        fossilized=fossilized,
        timing=timing_discount(germinated_at, weights),
    )


def harmonic_mean(a: Floats, b: Floats) -> NDArray[np.float64]:
    """`2ab / (a + b)` where both are positive, else 0: near the smaller one, never more than twice it."""
    both = (a > 0) & (b > 0)
    return np.asarray(np.where(both, 2 * b * a / np.where(both, b + a, 1.0), 0.0))


def credited(contribution: Floats, progress: Floats, shaped: ShapedRewardConfig) -> NDArray[np.float64]:
    """Points a seed is credited with, before any discount.

    | case | credit |
    |---|---|
    | `c < 0` | `c` |
    | `p` unknown | `0.5 c` (`progress_unknown_share`) |
    | `p <= 0` | 0 |
    | `c >= p` | harmonic mean of both (or the smaller one) |
    | `c < p` | `c` |
    | `c` unknown | 0 |

    Args:
        contribution: `[...]`, NaN where unknown.
        progress: `[...]`, NaN where unknown.
        shaped: The form of the mean, and the share.
    """
    joined = harmonic_mean(contribution, progress)
    if shaped.attribution_formula == "minimum":
        joined = np.minimum(contribution, progress)
    gained = np.select(
        [np.isnan(progress), progress <= 0, contribution >= progress],
        [shaped.progress_unknown_share * contribution, np.zeros_like(joined), joined],
        default=contribution,
    )
    return np.nan_to_num(np.where(contribution < 0, contribution, gained), nan=0.0)


def regression_discount(improvement: Floats, shaped: ShapedRewardConfig) -> NDArray[np.float64]:
    """`1 / (1 + e^(-k d))` where `d < 0`, else 1; `k` is `discount_steepness`."""
    harm = np.minimum(np.nan_to_num(improvement, nan=0.0), 0.0)
    # Beyond e^700 a float64 overflows; the discount is 0 there all the same.
    discount = 1.0 / (1.0 + np.exp(np.minimum(-shaped.discount_steepness * harm, 700.0)))
    return np.asarray(np.where(harm < 0, discount, 1.0))


def attribution(found: Evidence, outcome: Outcome, shaped: ShapedRewardConfig) -> NDArray[np.float64]:
    """What SHAPED pays for every seed in a step, `[E, S]`.

    * Held seeds: `c < 0` costs `c`; else `credited(c, p)` times the discounts for regression and timing. While no
      contribution was measured, 0.3 of a positive improvement in the stage.
    * Fossilised in this step: the same once more, but 0 if `d < 0`. Fossils: 0.
    * Pruned in this step: the same with its sign changed; who prunes a good seed pays what it was worth.
    """
    known = np.isfinite(found.contribution)
    value = credited(found.contribution, found.progress, shaped)
    value = np.where(value > 0, value * regression_discount(found.improvement, shaped) * found.timing, value)
    guessed = shaped.stage_improvement_weight * np.maximum(
        np.nan_to_num(outcome.stage_improvement, nan=0.0), 0.0
    )
    value = np.where(known, value, np.where(found.held, guessed, 0.0))
    sign = np.where(found.pruned, -1.0, np.where(found.held, 1.0, 0.0))
    sign = np.where(found.fossilized, np.where(found.improvement < 0, 0.0, 1.0), sign)
    return np.asarray(shaped.attribution_weight * sign * value)


def ratio_penalty(found: Evidence, shaped: ShapedRewardConfig) -> NDArray[np.float64]:
    """Penalty of seeds that seem worth far more than all seeds together, `[E, S]`, at most 0.

    With `c > 1`: `-min(0.3, 0.1 (c / d - 5) / 5)` where `d > 0.1` and `c / d > 5`; `-0.3 min(1, c / 10)` where
    `d <= 0.1`. A seed that has made itself indispensable without making the host better holds it to ransom.
    """
    c, d = found.contribution, found.improvement
    suspect = (
        (found.held | found.pruned | found.fossilized) & (c > shaped.ratio_contribution_min) & np.isfinite(d)
    )
    sound = d > shaped.ratio_improvement_min
    excess = np.where(suspect & sound, c / np.where(sound, d, 1.0) - shaped.ratio_max, 0.0)
    by_ratio = np.minimum(
        shaped.ratio_cost_max, shaped.ratio_weight * np.maximum(excess, 0.0) / shaped.ratio_max
    )
    by_size = shaped.ratio_cost_max * np.minimum(1.0, c / shaped.ratio_contribution_full)
    return np.asarray(-np.where(suspect, np.where(sound, by_ratio, by_size), 0.0))


def indecision(
    found: Evidence, worth: Floats, outcome: Outcome, shaped: ShapedRewardConfig
) -> NDArray[np.float64]:
    """Cost of leaving worthy seeds in HOLDING, `[E]`, at most 0.

    From the second epoch of HOLDING `-min(0.1 + 0.05 (n - 2), 0.3)` a seed whose `worth` is positive. A lane that has
    fossilised or pruned in this step pays nothing: it can decide about one seed an epoch, and did.

    Args:
        found: Of this step.
        worth: `[E, S]` what the mode holds the seeds to be worth.
        outcome: Of this step.
        shaped: The weights.
    """
    epochs = outcome.epochs_in_stage - shaped.indecision_epochs_min
    cost = np.minimum(shaped.indecision + shaped.indecision_per_epoch * epochs, shaped.indecision_max)
    decided = np.any(found.pruned | found.fossilized, axis=-1, keepdims=True)
    waiting = (outcome.stage == SeedStage.HOLDING) & (epochs >= 0) & (worth > 0) & ~decided
    return np.asarray(-np.where(waiting, cost, 0.0).sum(axis=-1))
