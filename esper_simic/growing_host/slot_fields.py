"""What is known of the slots of many hosts: the fields, their types and their empty values.

Only `slots.SlotTable` writes them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import BLUEPRINTS
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import AlphaMode
from esper_simic.lifecycle import Integers, SeedStage

NO_BLUEPRINT: Final = len(BLUEPRINTS)
"""Value of `blueprint` where a slot is empty."""

At = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Lanes and slots, `[n]` each, every pair at most once."""

STAGE_FIELDS: Final[dict[str, tuple[type, float]]] = {
    "stage": (np.int8, SeedStage.DORMANT),
    "epochs_in_stage": (np.int64, 0),
    "accuracy_at_stage": (np.float64, np.nan),
}
"""Type and empty value of what is known of a slot whether or not it holds a seed."""

SEED_FIELDS: Final[dict[str, tuple[type, float]]] = {
    "age": (np.int64, 0),
    "germinated_at": (np.int64, -1),
    "blueprint": (np.int64, NO_BLUEPRINT),
    "parameters": (np.int64, 0),
    "style": (np.int64, 0),
    "composition": (np.int64, 0),
    "tempo_epochs": (np.int64, 0),
    "alpha": (np.float64, 0),
    "alpha_before": (np.float64, 0),
    "alpha_ticked": (np.float64, 0),
    "alpha_mode": (np.int8, AlphaMode.HOLD),
    "alpha_start": (np.float64, 0),
    "alpha_target": (np.float64, 0),
    "alpha_curve": (np.int64, 0),
    "ramp_done": (np.int64, 0),
    "ramp_total": (np.int64, 0),
    "prune_scheduled": (np.bool_, False),
    "accuracy_at_germination": (np.float64, 0),
    "contribution": (np.float64, np.nan),
    "contribution_velocity": (np.float64, np.nan),
    "progress": (np.float64, np.nan),
    "solo": (np.float64, np.nan),
    "interaction": (np.float64, 0),
    "epochs_since_contribution": (np.int64, -1),
    "gradient_norm": (np.float64, 0),
    "gradient_ratio": (np.float64, np.nan),
    "gradient_health": (np.float64, np.nan),
    "gradient_health_before": (np.float64, np.nan),
    "vanishing": (np.bool_, False),
    "exploding": (np.bool_, False),
}
"""Type and empty value of what is known of a seed; all of it is forgotten when the seed is removed."""

FIELDS: Final = {**STAGE_FIELDS, **SEED_FIELDS}
"""Type and empty value of every field `[E, S]` of the slots."""


class SlotFields:
    """Everything known about the slots of E hosts.

    | field | meaning (`[E, S]` each) |
    |---|---|
    | `stage`, `epochs_in_stage` | `SeedStage`, ticks since it was entered |
    | `accuracy_at_stage` | accuracy of the host when the stage was entered, percent |
    | `age`, `germinated_at` | ticks since germination, epoch of the episode when it was (-1: empty) |
    | `blueprint`, `parameters` | index into `actions.BLUEPRINTS`, parameter count of the seed |
    | `style`, `composition` | `actions.Style` given last, `alpha.Composition` it stands for |
    | `tempo_epochs` | length of the first ramp |
    | `alpha`, `alpha_before` | weight of the seed now and one tick ago |
    | `alpha_ticked` | weight at the end of the last tick: a move may have changed `alpha` at once since |
    | `alpha_mode` | `alpha.AlphaMode`: whether alpha moves, and where to |
    | `alpha_start`, `alpha_target` | whence the ramp leads, and where to |
    | `alpha_curve` | its curve, index into `actions.ALPHA_CURVES` |
    | `ramp_done`, `ramp_total` | ticks of it done and in all (0: none, or at once) |
    | `prune_scheduled` | the seed goes when alpha has come down to 0 |
    | `accuracy_at_germination` | percent |
    | `contribution` | accuracy points, last measured; NaN: never |
    | `contribution_velocity` | its change between measurements, averaged (`contribution_velocity_ema`); NaN: none |
    | `progress` | accuracy points since germination, when `contribution` was measured |
    | `solo` | accuracy points with only this seed on, last measured; NaN: never |
    | `interaction` | sum over the seed's partners, accuracy points, last measured; 0 where there was none |
    | `epochs_since_contribution` | ticks since `contribution` was measured; -1: never |
    | `gradient_norm`, `gradient_health`, `gradient_health_before` | last epoch's, NaN where never measured |
    | `gradient_ratio` | RMS gradient of the seed over the host's, averaged (`gradient_ema`); NaN where never measured |
    | `vanishing`, `exploding` | what the last epoch's gradients did |

    From germination on `alpha_target` is the target that the seed was given, before its ramp has begun, too: what was
    chosen must be visible to the one who chooses next.

    `accuracy`, `[E]`, is what validation measured last, in percent; NaN before the first.
    """

    stage: NDArray[np.int8]
    epochs_in_stage: NDArray[np.int64]
    accuracy_at_stage: NDArray[np.float64]
    age: NDArray[np.int64]
    germinated_at: NDArray[np.int64]
    blueprint: NDArray[np.int64]
    parameters: NDArray[np.int64]
    style: NDArray[np.int64]
    composition: NDArray[np.int64]
    tempo_epochs: NDArray[np.int64]
    alpha: NDArray[np.float64]
    alpha_before: NDArray[np.float64]
    alpha_ticked: NDArray[np.float64]
    alpha_mode: NDArray[np.int8]
    alpha_start: NDArray[np.float64]
    alpha_target: NDArray[np.float64]
    alpha_curve: NDArray[np.int64]
    ramp_done: NDArray[np.int64]
    ramp_total: NDArray[np.int64]
    prune_scheduled: NDArray[np.bool_]
    accuracy_at_germination: NDArray[np.float64]
    contribution: NDArray[np.float64]
    contribution_velocity: NDArray[np.float64]
    progress: NDArray[np.float64]
    solo: NDArray[np.float64]
    interaction: NDArray[np.float64]
    epochs_since_contribution: NDArray[np.int64]
    gradient_norm: NDArray[np.float64]
    gradient_ratio: NDArray[np.float64]
    gradient_health: NDArray[np.float64]
    gradient_health_before: NDArray[np.float64]
    vanishing: NDArray[np.bool_]
    exploding: NDArray[np.bool_]

    def __init__(self, lanes: int, slots: int) -> None:
        for name, (kind, empty) in FIELDS.items():
            setattr(self, name, np.full((lanes, slots), empty, dtype=kind))
        self.accuracy = np.full(lanes, np.nan)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies of all fields, by name: the whole table."""
        return {name: getattr(self, name).copy() for name in (*FIELDS, "accuracy")}

    def load_state(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Take over what `state` gave; shapes must agree.

        Raises:
            InvariantViolation: A field is missing or has another shape.
        """
        for name in (*FIELDS, "accuracy"):
            mine = getattr(self, name)
            if name not in state or state[name].shape != mine.shape:
                raise InvariantViolation(f"field {name} of the slots is missing or not {list(mine.shape)}")
            np.copyto(mine, state[name])

    def forget(self, at: At) -> None:
        """Empty the fields of the seeds in some slots."""
        for name, (_, empty) in SEED_FIELDS.items():
            getattr(self, name)[at] = empty

    def reset(self, lanes: Integers) -> None:
        """Empty every slot of some lanes."""
        for name, (_, empty) in FIELDS.items():
            getattr(self, name)[lanes] = empty
        self.accuracy[lanes] = np.nan
