"""From what happened in an environment step to its reward, in named parts.

The reward is computed after the action, from outcomes: an action that was refused changes no stage and earns nothing.
BASIC is the sum of five parts:

* `shaping`: `w (gamma phi(s') - phi(s))`, potential-based shaping on the stages of the slots. `phi` of a terminal
  state is 0, so the discounted sum of an episode's shaping is `-w phi(s_0)` = 0 whatever the controller does: it
  speeds learning up and cannot be farmed (docs/decisions/0002-shaping-ends-at-zero.md).
* `rent`: what blended parameters cost each epoch, relative to the host's own count.
* `fossil_bonus`: paid once, for making a seed permanent that contributes; bounded.
* `terminal_accuracy` and `terminal_parameters`: at the horizon, what was reached and how large the network grew.

Legend: `phi` potential, `c` contribution and `p` progress in accuracy points (percent), `w` a configured weight.

Source: Ng, Harada & Russell, Policy invariance under reward transformations, ICML 1999 (theorem 1; terminal states
of an episodic task have potential 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config import RewardConfig
from esper_simic.lifecycle import BLENDED, Bools, Floats, Integers, SeedStage

BASIC_PARTS: Final = ("shaping", "rent", "fossil_bonus", "terminal_accuracy", "terminal_parameters")
"""Names of the parts of the BASIC reward; they sum to it."""


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one environment step changed, for E hosts with S slots.

    | field | shape | meaning |
    |---|---|---|
    | `stage_before`, `stage` | `[E, S]` | stages before the action and after the step |
    | `epochs_before`, `epochs_in_stage` | `[E, S]` | epochs in those stages |
    | `alpha` | `[E, S]` | blending weight after the step, in [0, 1] |
    | `seed_parameters` | `[E, S]` | parameters of the seed in the slot, 0 where empty |
    | `host_parameters` | scalar | parameters of the host alone, at least 1 |
    | `fossilized` | `[E, S]` | true where a FOSSILIZE really happened in this step |
    | `contribution` | `[E, S]` | points the seed was last measured to be worth; NaN where never |
    | `progress` | `[E, S]` | accuracy points gained since germination, measured together with it |
    | `accuracy` | `[E]` | validation accuracy after the step, in percent |
    | `terminated` | `[E]` | true where the episode reached its horizon |
    """

    stage_before: Integers
    epochs_before: Integers
    stage: Integers
    epochs_in_stage: Integers
    alpha: Floats
    seed_parameters: Integers
    host_parameters: int
    fossilized: Bools
    contribution: Floats
    progress: Floats
    accuracy: Floats
    terminated: Bools


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
    both = (c > 0) & (p > 0)
    harmonic = np.where(both, 2 * p * c / np.where(both, p + c, 1.0), 0.0)
    bonus = np.minimum(
        weights.fossil_bonus_base + weights.fossil_bonus_per_point * harmonic, weights.fossil_bonus_max
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

    Source: Ng, Harada & Russell 1999, theorem 1, for `shaping`.
    """
    before = potential(outcome.stage_before, outcome.epochs_before, weights)
    after = np.where(outcome.terminated, 0.0, potential(outcome.stage, outcome.epochs_in_stage, weights))
    blended = np.where(BLENDED[outcome.stage], outcome.seed_parameters, 0)
    rented = (outcome.alpha * blended).sum(axis=-1) / outcome.host_parameters
    grown = blended.sum(axis=-1) / outcome.host_parameters
    bonuses = fossil_bonus(outcome.contribution, outcome.progress, weights)
    return {
        "shaping": weights.potential_weight * (gamma * after - before),
        "rent": -weights.rent_weight * rented,
        "fossil_bonus": np.where(outcome.fossilized, bonuses, 0.0).sum(axis=-1),
        "terminal_accuracy": np.where(
            outcome.terminated, weights.terminal_accuracy_weight * outcome.accuracy.astype(np.float64), 0.0
        ),
        "terminal_parameters": np.where(outcome.terminated, -weights.terminal_parameter_weight * grown, 0.0),
    }
