r"""The life of a seed: stages, legal moves, dwell times and gates.

A slot is empty (DORMANT) until a seed germinates in it. The seed is then moved by a controller, one gate at a time,
until it is fossilised (part of the network for good) or pruned; a pruned slot stays closed for a while before it is
empty again. `TRANSITIONS` holds every legal move and nothing else decides what is legal; gates decide whether a
legal move may happen now. Everything here works on whole arrays of slots and imports no tensor library.

```
DORMANT -> GERMINATED -> TRAINING -> BLENDING -> HOLDING -> FOSSILIZED
                \            \          \          \
                 +-----------+----------+----------+--> PRUNED -> EMBARGOED -> RESETTING -> DORMANT
```
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Integers = NDArray[np.integer]
Floats = NDArray[np.floating]


class SeedStage(IntEnum):
    """Stage of a slot; the numbers are those of the wire contract (5 is retired and never used)."""

    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    HOLDING = 6
    FOSSILIZED = 7
    PRUNED = 8
    EMBARGOED = 9
    RESETTING = 10


class Event(IntEnum):
    """What can move a slot: four decisions of a controller, and the passing of a dwell time."""

    GERMINATE = 0
    ADVANCE = 1
    FOSSILIZE = 2
    PRUNE = 3
    EXPIRE = 4


TRANSITIONS: Final[dict[tuple[SeedStage, Event], SeedStage]] = {
    (SeedStage.DORMANT, Event.GERMINATE): SeedStage.GERMINATED,
    (SeedStage.GERMINATED, Event.ADVANCE): SeedStage.TRAINING,
    (SeedStage.TRAINING, Event.ADVANCE): SeedStage.BLENDING,
    (SeedStage.BLENDING, Event.ADVANCE): SeedStage.HOLDING,
    (SeedStage.HOLDING, Event.FOSSILIZE): SeedStage.FOSSILIZED,
    (SeedStage.GERMINATED, Event.PRUNE): SeedStage.PRUNED,
    (SeedStage.TRAINING, Event.PRUNE): SeedStage.PRUNED,
    (SeedStage.BLENDING, Event.PRUNE): SeedStage.PRUNED,
    (SeedStage.HOLDING, Event.PRUNE): SeedStage.PRUNED,
    (SeedStage.PRUNED, Event.EXPIRE): SeedStage.EMBARGOED,
    (SeedStage.EMBARGOED, Event.EXPIRE): SeedStage.RESETTING,
    (SeedStage.RESETTING, Event.EXPIRE): SeedStage.DORMANT,
}
"""Every legal move; a pair that is missing is illegal."""

NO_MOVE: Final = 0
"""Entry of `NEXT_STAGE` for an illegal move."""


def _next_stage_table() -> NDArray[np.int8]:
    table = np.full((max(SeedStage) + 1, len(Event)), NO_MOVE, dtype=np.int8)
    for (stage, event), successor in TRANSITIONS.items():
        table[stage, event] = successor
    table.setflags(write=False)
    return table


NEXT_STAGE: Final = _next_stage_table()
"""`TRANSITIONS` as an array `[stage, event]`, for whole arrays of slots."""


def _stage_set(*stages: SeedStage) -> Bools:
    members = np.zeros(max(SeedStage) + 1, dtype=np.bool_)
    members[list(stages)] = True
    members.setflags(write=False)
    return members


LIVE: Final = _stage_set(SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING)
"""Stages of a seed that can still be pruned. Index with a stage: `LIVE[stage]`."""

COMPUTING: Final = _stage_set(SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED)
"""Stages in which a seed takes part in the training pass."""

BLENDED: Final = _stage_set(SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED)
"""Stages in which a seed changes what the host computes."""

OCCUPIED: Final = _stage_set(
    SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED
)
"""Stages in which a slot holds a seed."""

BLOCKS_GERMINATION: Final = _stage_set(
    SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.PRUNED, SeedStage.EMBARGOED, SeedStage.RESETTING
)
"""While any slot of a host is in one of these stages, no other slot of it may germinate."""


def expired(stage: Integers, epochs_in_stage: Integers, embargo_epochs: int) -> Bools:
    """Slots whose dwell time is over.

    A slot stays one tick in PRUNED and RESETTING and `embargo_epochs` ticks in EMBARGOED; no other stage ends by
    itself.

    Args:
        stage: `[...]` values of `SeedStage`.
        epochs_in_stage: `[...]` ticks since the stage was entered.
        embargo_epochs: Length of the embargo, in ticks.

    Returns:
        `[...]` true where `Event.EXPIRE` is due.
    """
    brief = (stage == SeedStage.PRUNED) | (stage == SeedStage.RESETTING)
    embargo_over = (stage == SeedStage.EMBARGOED) & (epochs_in_stage >= embargo_epochs)
    return np.asarray((brief & (epochs_in_stage >= 1)) | embargo_over)


def gate_g0(blueprint_known: Bools, seed_known: Bools) -> Bools:
    """Sanity, before GERMINATED: the seed has an identity and a known blueprint."""
    return blueprint_known & seed_known


def gate_g1(stage: Integers) -> Bools:
    """Before TRAINING: the seed has germinated."""
    return np.asarray(stage == SeedStage.GERMINATED)


def gate_g2(
    epochs_in_stage: Integers,
    gradient_health: Floats,
    exploding: Bools,
    *,
    training_epochs_min: int,
    gradient_health_min: float,
) -> Bools:
    """Before BLENDING: trained long enough, with gradients that were measured and are sound.

    Args:
        epochs_in_stage: `[...]` epochs spent in TRAINING.
        gradient_health: `[...]` in [0, 1]; NaN where never measured, which closes the gate.
        exploding: `[...]` true where a gradient of the last epoch exploded.
        training_epochs_min: Epochs the seed must have trained.
        gradient_health_min: Health it must have, in [0, 1].
    """
    healthy = np.nan_to_num(gradient_health, nan=-1.0) >= gradient_health_min
    return (epochs_in_stage >= training_epochs_min) & healthy & ~exploding


def gate_g3(alpha: Floats, alpha_target: Floats, ramping: Bools) -> Bools:
    """Before HOLDING: the ramp has ended and the seed is blended in wholly.

    Args:
        alpha: `[...]` current weight of the seed, in [0, 1].
        alpha_target: `[...]` weight the ramp leads to.
        ramping: `[...]` true while alpha still moves.
    """
    return (alpha_target >= 1.0) & (alpha >= alpha_target) & ~ramping


def gate_g5(contribution: Floats, gradient_health: Floats, exploding: Bools) -> Bools:
    """Before FOSSILIZED: a counterfactual contribution was measured, and the seed's gradients did not explode.

    A gradient that vanishes is no ill health here: a later slot whose seed is blended in wholly cuts the seeds in front
    of it off from the loss, and they may be worth keeping all the same.

    Args:
        contribution: `[...]` accuracy points the seed is worth; NaN where never measured, which closes the gate.
        gradient_health: `[...]` in [0, 1]; NaN where never measured, which closes the gate.
        exploding: `[...]` true where a gradient of the last epoch exploded.
    """
    return np.isfinite(contribution) & np.isfinite(gradient_health) & ~exploding
