"""What a scripted controller may look at: a frozen picture of many hosts in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

HISTORY_EPOCHS: Final = 10
"""Validations that are remembered, the newest last."""


@dataclass(frozen=True, slots=True)
class HostView:
    """E hosts with S slots after a step.

    | field | shape | meaning |
    |---|---|---|
    | `stage`, `epochs_in_stage`, `age` | `[E, S]` | `SeedStage`, epochs in it, epochs since germination |
    | `alpha` | `[E, S]` | weight of the seed, in [0, 1] |
    | `contribution` | `[E, S]` | accuracy points when last measured; NaN: never |
    | `blueprint` | `[E, S]` | index into `actions.BLUEPRINTS`; their number where empty |
    | `accuracy_at_germination`, `accuracy_at_stage` | `[E, S]` | percent then, and when the stage was entered |
    | `accuracy`, `loss` | `[E, HISTORY_EPOCHS]` | percent and nats, newest last; NaN where there was none |
    | `epoch` | `[E]` | epochs of the episode so far |
    | `mask` | `[E, M]` | packed mask of legal choices |
    """

    stage: NDArray[np.int8]
    epochs_in_stage: NDArray[np.int64]
    age: NDArray[np.int64]
    alpha: NDArray[np.float64]
    contribution: NDArray[np.float64]
    blueprint: NDArray[np.int64]
    accuracy_at_germination: NDArray[np.float64]
    accuracy_at_stage: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    epoch: NDArray[np.int64]
    mask: NDArray[np.int8]
