"""The loss family: what the validation loss does, is paid.

| part | what it pays |
|---|---|
| `loss` | `-5 clip(delta / std, -5, 5)`, half of it where the loss rises: worse is negative |
| `rent` | `-0.05 ln(1 + growth)`, growth of seeds of 3 epochs and more, relative to the host |
| `shaping` | potential-based, weight 0.1 |
| `terminal_loss` | at the horizon, `clip(1 - loss / ln(classes), 0, 1)`: the share of uniform guessing's loss gone |

`delta` is this step's change of the loss, `std` the deviation of the changes before it: an exponential average of their
squares that begins anew with every episode, at a configured value, so that an episode's rewards are a function of the
episode alone. A change counts there as it is paid, clipped, or one divergence would hush all that follows.

It is **indifferent to fossilising**: a seed kept in HOLDING lowers the loss as a fossil does. And because a rise of the
loss costs half of what a fall pays, a loss that zigzags is paid. No default, for both reasons.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config_rewards import LossRewardConfig, RewardConfig
from esper_simic.errors import ContractError
from esper_simic.lifecycle import OCCUPIED, Floats
from esper_simic.rewards.outcome import Outcome
from esper_simic.rewards.potential import shaping

LOSS_PARTS: Final = ("loss", "rent", "shaping", "terminal_loss")
"""Names of the parts of the loss family's reward; they sum to it."""

DEVIATION_MIN: Final = 1e-4
"""Below this a deviation of the loss is noise of float32."""


def gain(loss_change: Floats | float) -> NDArray[np.float64]:
    """What a change of the loss is worth: its fall. The one place that knows the sign."""
    return np.asarray(-np.asarray(loss_change, dtype=np.float64))


def loss(
    outcome: Outcome, deviation: NDArray[np.float64], weights: RewardConfig, *, gamma: float
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """The loss family's reward of one step.

    Args:
        outcome: What happened.
        deviation: `[E]` of the changes of the loss before this step.
        weights: Weight of each part.
        gamma: The learner's own discount.

    Returns:
        Name to `[E]` float64, in the order of `LOSS_PARTS`, and `deviation` for the next step.

    Raises:
        ContractError: The outcome does not give the loss of a uniform guess.
    """
    if not (outcome.loss_scale > 0).all():
        raise ContractError(
            "the loss family needs loss_scale, the loss of guessing uniformly, above 0 in every lane"
        )
    rules = weights.loss
    scaled = scaled_change(outcome.loss, outcome.loss_before, deviation, rules)
    share = np.where(scaled > 0, rules.worse_share, 1.0)
    left = np.nan_to_num(outcome.loss / outcome.loss_scale, nan=1.0, posinf=1.0)
    reached = rules.terminal_weight * np.clip(1.0 - left, 0.0, 1.0)
    parts = {
        "loss": rules.change_weight * share * gain(scaled),
        "rent": rent(outcome, rules),
        "shaping": shaping(outcome, weights, rules.potential_weight, gamma),
        "terminal_loss": np.where(outcome.terminated, reached, 0.0),
    }
    variance = deviation**2 * (rules.deviation_ema + (1.0 - rules.deviation_ema) * scaled**2)
    return parts, np.maximum(np.sqrt(variance), DEVIATION_MIN)


def scaled_change(
    after: Floats, before: Floats, deviation: Floats, rules: LossRewardConfig
) -> NDArray[np.float64]:
    """`clip((after - before) / deviation, -5, 5)`, `[E]`.

    A loss that is not a number counts as infinite; from one to the next of these is the worst change.
    """
    now, then = (np.nan_to_num(one, nan=np.inf, posinf=np.inf) for one in (after, before))
    with np.errstate(invalid="ignore"):
        change = (now - then) / deviation
    return np.nan_to_num(np.clip(change, -rules.change_max, rules.change_max), nan=rules.change_max)


def rent(outcome: Outcome, rules: LossRewardConfig) -> NDArray[np.float64]:
    """`-w ln(1 + parameters of seeds past their grace / host)`, `[E]`."""
    charged = OCCUPIED[outcome.stage] & (outcome.age >= rules.grace_epochs)
    grown = np.where(charged, outcome.seed_parameters, 0).sum(axis=-1) / outcome.host_parameters
    return np.asarray(-rules.rent_weight * np.log1p(grown))
