"""What SHAPED and ESCROW charge and pay for the operation itself.

Friction is charged for the attempt, whether it happened or not. A refused operation never earns anything: what is paid
for a fossil or a prune is paid where it really happened.

| operation | charge | further |
|---|---|---|
| WAIT | 0 | |
| GERMINATE | -0.15 | -0.3 where the slot already holds a seed |
| SET_ALPHA_TARGET | -0.005 | |
| ADVANCE | -0.1 out of TRAINING, else 0 | |
| PRUNE | -0.005 | see `_prune` |
| FOSSILIZE | -0.01 | see `_fossilize` |

Legend: `c` contribution of the target and `d` total improvement, as known when the action was taken; points.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Op
from esper_simic.config_rewards import ShapedRewardConfig
from esper_simic.lifecycle import LIVE, OCCUPIED, SeedStage
from esper_simic.rewards.outcome import Outcome


def operation(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """Charge or reward of each lane's operation, `[E]`."""
    op, stage = outcome.op, outcome.at_target(outcome.stage_before)
    germinate = rules.germinate_cost + np.where(OCCUPIED[stage], rules.germinate_occupied_cost, 0.0)
    advance = np.where(stage == SeedStage.TRAINING, rules.advance_cost, 0.0)
    value = np.select(
        [op == Op.GERMINATE, op == Op.SET_ALPHA_TARGET, op == Op.ADVANCE, op == Op.PRUNE, op == Op.FOSSILIZE],
        [
            -germinate,
            np.full(len(op), -rules.set_alpha_cost),
            -advance,
            _prune(outcome, rules) - rules.prune_cost,
            _fossilize(outcome, rules) - rules.fossilize_cost,
        ],
        default=0.0,
    )
    return np.asarray(value, dtype=np.float64)


def _prune(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """What is paid for a PRUNE, `[E]`; the first row that applies.

    | case | paid |
    |---|---|
    | a fossil (always refused) | -1 |
    | a live seed younger than 5 epochs, refused or not | -0.3 an epoch it is too young |
    | refused | 0 |
    | `c` never measured | 0 |
    | `c < -0.5`, age at least 3 | 0.15 |
    | `c < 0` | 0.1 |
    | else | `-min(0.3 + 0.05 c, 0.9)` |
    """
    stage = outcome.at_target(outcome.stage_before)
    age = outcome.at_target(outcome.age_before)
    c = outcome.at_target(outcome.contribution_before)
    done = outcome.succeeded.astype(np.bool_)
    good = np.minimum(rules.prune_good_cost + rules.prune_good_cost_per_point * c, rules.prune_good_cost_max)
    hurting = (c < rules.prune_hurting_contribution) & (age >= rules.prune_hurting_age_min)
    young = LIVE[stage] & (age < rules.prune_young_age)
    cases = [stage == SeedStage.FOSSILIZED, young, ~done | np.isnan(c), hurting, c < 0]
    paid = [
        np.full(len(c), -rules.prune_fossil_cost),
        -rules.prune_young_cost * (rules.prune_young_age - age),
        np.zeros(len(c)),
        np.full(len(c), rules.prune_hurting_bonus),
        np.full(len(c), rules.prune_negative_bonus),
    ]
    return np.asarray(np.select(cases, paid, default=-good))


def _fossilize(outcome: Outcome, rules: ShapedRewardConfig) -> NDArray[np.float64]:
    """What is paid for a FOSSILIZE, `[E]`; the first row that applies.

    | case | paid |
    |---|---|
    | refused | -1 |
    | `d < 0` | `-0.5 - min(0.2 abs(d), 1)`, and -0.3 for a ransom: `c > 0.1` while `d < -0.2` |
    | `c >= 1` | `(0.5 + 0.1 c + 3 tanh(1/3)) min(1, n / 5)`, after n epochs of HOLDING |
    | else | -0.2 |
    """
    c = outcome.at_target(outcome.contribution_before)
    d = outcome.improvement_before
    held_epochs = outcome.at_target(outcome.epochs_before)
    ransom = (c > rules.ransom_contribution_min) & (d < rules.ransom_improvement_max)
    harm = rules.fossilize_harm_cost + np.minimum(
        rules.fossilize_harm_cost_per_point * np.abs(d), rules.fossilize_harm_growth_max
    )
    count_bonus = rules.fossilize_count_bonus * math.tanh(1.0 / rules.fossilize_count_scale)
    patience = np.minimum(1.0, held_epochs / rules.fossilize_holding_epochs)
    bonus = (rules.fossilize_bonus + rules.fossilize_bonus_per_point * c + count_bonus) * patience
    cases = [~outcome.succeeded.astype(np.bool_), d < 0, c >= rules.fossilize_contribution_min]
    paid = [
        np.full(len(c), -rules.fossilize_refused_cost),
        -harm - np.where(ransom, rules.ransom_cost, 0.0),
        bonus,
    ]
    return np.asarray(np.select(cases, paid, default=-rules.fossilize_idle_cost))
