r"""The life of a seed: stages, legal moves, dwell times and gates.

A slot is empty (DORMANT) until a seed germinates in it. The seed is then moved by a controller, one gate at a time,
until it is fossilised (part of the network for good) or pruned; a pruned slot stays closed for a while before it is
empty again. `TRANSITIONS` holds every legal move and nothing else decides what is legal; gates decide whether a
legal move may happen now. Everything here works on whole arrays of slots and imports no tensor library.

```
DORMANT -> GERMINATED -> TRAINING -> BLENDING <-> HOLDING -> FOSSILIZED
                \            \          \          \
                 +-----------+----------+----------+--> PRUNED -> EMBARGOED -> RESETTING -> DORMANT
```

HOLDING goes back to BLENDING when its alpha is led down: to a partial target, or to 0 where a prune was scheduled.

**Gates**, permissive (the default) and strict. What strict asks for comes on top of what permissive asks for, so it
never opens where permissive is closed; what was never measured closes both.

| gate | before | permissive | strict, too |
|---|---|---|---|
| G0 | GERMINATED | the seed has an identity and a known blueprint | |
| G1 | TRAINING | it has germinated | |
| G2 | BLENDING | trained long enough, gradients sound | the accuracy has risen; its gradients are no dwarfs |
| G3 | HOLDING | alpha has arrived at 1 and stands still | blended long enough |
| G4 | | always open: no move asks it | |
| G5 | FOSSILIZED | a contribution was measured, gradients did not explode | it is large enough |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.config import EnvironmentConfig

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
    """What can move a slot: five decisions of a controller, and the passing of a dwell time.

    A prune that is scheduled is a RETARGET to 0 when it is decided and a PRUNE when alpha has arrived there.
    """

    GERMINATE = 0
    ADVANCE = 1
    FOSSILIZE = 2
    PRUNE = 3
    EXPIRE = 4
    RETARGET = 5


TRANSITIONS: Final[dict[tuple[SeedStage, Event], SeedStage]] = {
    (SeedStage.DORMANT, Event.GERMINATE): SeedStage.GERMINATED,
    (SeedStage.GERMINATED, Event.ADVANCE): SeedStage.TRAINING,
    (SeedStage.TRAINING, Event.ADVANCE): SeedStage.BLENDING,
    (SeedStage.BLENDING, Event.ADVANCE): SeedStage.HOLDING,
    (SeedStage.HOLDING, Event.FOSSILIZE): SeedStage.FOSSILIZED,
    (SeedStage.BLENDING, Event.RETARGET): SeedStage.BLENDING,
    (SeedStage.HOLDING, Event.RETARGET): SeedStage.BLENDING,
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


class Gate(IntEnum):
    """The gates; their numbers are those of the wire contract."""

    G0 = 1
    G1 = 2
    G2 = 3
    G3 = 4
    G4 = 5
    G5 = 6


GATE_OF_MOVE: Final[dict[tuple[SeedStage, Event], Gate]] = {
    (SeedStage.DORMANT, Event.GERMINATE): Gate.G0,
    (SeedStage.GERMINATED, Event.ADVANCE): Gate.G1,
    (SeedStage.TRAINING, Event.ADVANCE): Gate.G2,
    (SeedStage.BLENDING, Event.ADVANCE): Gate.G3,
    (SeedStage.HOLDING, Event.FOSSILIZE): Gate.G5,
}
"""The gate in front of each move that has one."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the gates of moving seeds look at; all fields have the same shape `[...]`.

    | field | meaning |
    |---|---|
    | `stage`, `epochs_in_stage` | `SeedStage`, ticks since it was entered |
    | `gradient_health` | share of sound batches in the last epoch, in [0, 1]; NaN where never measured |
    | `exploding` | true where a gradient of the last epoch exploded |
    | `gradient_ratio` | size-normalised ratio of the seed's gradient norm to the host's, averaged; NaN where never |
    | `improvement` | accuracy points gained since the stage was entered; NaN where unknown |
    | `alpha`, `alpha_target`, `ramping` | weight of the seed, where it is led to, whether it still moves |
    | `contribution` | accuracy points the seed is worth; NaN where never measured |
    """

    stage: Integers
    epochs_in_stage: Integers
    gradient_health: Floats
    exploding: Bools
    gradient_ratio: Floats
    improvement: Floats
    alpha: Floats
    alpha_target: Floats
    ramping: Bools
    contribution: Floats


def gate_g0(blueprint_known: Bools, seed_known: Bools) -> Bools:
    """Sanity, before GERMINATED: the seed has an identity and a known blueprint. There is no seed to look at yet."""
    return blueprint_known & seed_known


def gate_g1(vitals: Vitals, rules: EnvironmentConfig) -> Bools:
    """Before TRAINING: the seed has germinated."""
    return np.asarray(vitals.stage == SeedStage.GERMINATED)


def gate_g2(vitals: Vitals, rules: EnvironmentConfig) -> Bools:
    """Before BLENDING: `training_epochs_min` epochs of TRAINING with gradients that were measured and are sound.

    Sound: none exploded, and their health is at least `gradient_health_min`. Strict asks for two things more: an
    improvement of `improvement_min` points since TRAINING began and a gradient ratio of `gradient_ratio_min`.
    """
    healthy = _at_least(vitals.gradient_health, rules.gradient_health_min) & ~vitals.exploding
    ready = (vitals.epochs_in_stage >= rules.training_epochs_min) & healthy
    if rules.gates == "strict":
        ready &= _at_least(vitals.improvement, rules.improvement_min)
        ready &= _at_least(vitals.gradient_ratio, rules.gradient_ratio_min)
    return np.asarray(ready)


def gate_g3(vitals: Vitals, rules: EnvironmentConfig) -> Bools:
    """Before HOLDING: alpha was led to 1, has arrived and stands still; strict: `blending_epochs_min` in BLENDING."""
    ready = (vitals.alpha_target >= 1.0) & (vitals.alpha >= vitals.alpha_target) & ~vitals.ramping
    if rules.gates == "strict":
        ready &= vitals.epochs_in_stage >= rules.blending_epochs_min
    return np.asarray(ready)


def gate_g4(vitals: Vitals, rules: EnvironmentConfig) -> Bools:
    """System impact: always open. The contract has its number, no move asks it."""
    return np.ones(np.shape(vitals.stage), dtype=np.bool_)


def gate_g5(vitals: Vitals, rules: EnvironmentConfig) -> Bools:
    """Before FOSSILIZED: a counterfactual contribution was measured, and the seed's gradients did not explode.

    Strict: the contribution is at least `contribution_min` points. A gradient that vanishes is no ill health here: a
    later slot whose seed is blended in wholly cuts the seeds in front of it off from the loss, and they may be worth
    keeping all the same.
    """
    ready = np.isfinite(vitals.contribution) & np.isfinite(vitals.gradient_health) & ~vitals.exploding
    if rules.gates == "strict":
        ready &= _at_least(vitals.contribution, rules.contribution_min)
    return np.asarray(ready)


GATES: Final[dict[Gate, Callable[[Vitals, EnvironmentConfig], Bools]]] = {
    Gate.G1: gate_g1,
    Gate.G2: gate_g2,
    Gate.G3: gate_g3,
    Gate.G4: gate_g4,
    Gate.G5: gate_g5,
}
"""The gates that look at a seed; G0 comes before there is one."""


def open_gates(vitals: Vitals, event: Event, rules: EnvironmentConfig) -> Bools:
    """Seeds that could make a move now, by lifecycle and gate.

    Args:
        vitals: What is known of the seeds, `[...]`.
        event: `ADVANCE` or `FOSSILIZE`.
        rules: `gates` says which form of them holds; the other fields are their thresholds.

    Returns:
        `[...]` true where the move is legal and its gate is open.
    """
    ready = np.zeros(np.shape(vitals.stage), dtype=np.bool_)
    for (stage, move), gate in GATE_OF_MOVE.items():
        if move == event and gate in GATES:
            ready |= (vitals.stage == stage) & GATES[gate](vitals, rules)
    return ready


def moves_itself(stage: Integers, rules: EnvironmentConfig) -> Bools:
    """Slots in a stage that they leave by themselves when its gate opens (`auto_forward_g1`, `_g2`, `_g3`).

    Args:
        stage: `[...]` values of `SeedStage`.
        rules: The three flags.

    Returns:
        `[...]` bool; a controller's ADVANCE is masked there.
    """
    return np.asarray(
        (rules.auto_forward_g1 & (stage == SeedStage.GERMINATED))
        | (rules.auto_forward_g2 & (stage == SeedStage.TRAINING))
        | (rules.auto_forward_g3 & (stage == SeedStage.BLENDING))
    )


def _at_least(measured: Floats, threshold: float) -> Bools:
    """True where a measurement is known and reaches its threshold; NaN compares false."""
    return np.asarray(measured >= threshold)
