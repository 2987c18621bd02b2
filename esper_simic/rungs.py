"""The rungs of a training that keeps failing: V-trace, then TD(0), then a halt.

```
            a breaker opens, or              the training's breaker opens again
            measures are exhausted           and again, or measures are exhausted
   VTRACE ---------------------------> TD -----------------------------------------> HALTED
      ^                               | ^                                              |
      +-------------------------------+ +----------------------------------------------+
       V-trace's probe went well                        an operator resumes it
```

On VTRACE the targets are V-trace's, on TD they are TD(0): `r + gamma V(x')`, which no importance weight can spoil. TD
is left by a probe: one update with V-trace, once V-trace's breaker allows it and the training's is CLOSED.

The training's breaker, open, lets no update be made for its recovery time. When it has opened `halt_after_openings`
times without one good update, and targets are TD's already, the training is HALTED: it makes no update more and keeps
the last good policy for whoever acts by it, until an operator resumes it. An algorithm that has no V-trace makes the
same update on both rungs; there TD is the last warning. `RUNGS` holds every legal move.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from esper_simic.config_safety import LadderKeys
from esper_simic.errors import InvariantViolation
from esper_simic.safety_facts import (
    FallbackEntered,
    FallbackLeft,
    LadderFact,
    TrainingHalted,
    TrainingResumed,
)

EXHAUSTED: Final = "measures_exhausted"
TRAINING_OPENED: Final = "training_breaker_opened"
VTRACE_OPENED: Final = "vtrace_breaker_opened"


class Rung(IntEnum):
    """How much of the algorithm is still trusted."""

    VTRACE = 0
    TD = 1
    HALTED = 2


class Step(IntEnum):
    """What moves a training along the rungs."""

    FALL = 0
    RISE = 1
    HALT = 2
    RESUME = 3


RUNGS: Final[dict[tuple[Rung, Step], Rung]] = {
    (Rung.VTRACE, Step.FALL): Rung.TD,
    (Rung.TD, Step.RISE): Rung.VTRACE,
    (Rung.TD, Step.HALT): Rung.HALTED,
    (Rung.HALTED, Step.RESUME): Rung.TD,
}
"""Every legal move; a pair that is missing is illegal."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """On which rung a training stands, of JSON types.

    Attributes:
        rung: How much of the algorithm is trusted.
        openings: Openings of the training's breaker since the last update that was made.
    """

    rung: Rung = Rung.VTRACE
    openings: int = 0


class BreakerMoves(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to the breakers at one update: whose opened, and whether V-trace's probe went well."""

    training_opened: bool = False
    vtrace_opened: bool = False
    vtrace_closed: bool = False


def next_rung(rung: Rung, step: Step) -> Rung:
    """Where a step leads.

    Raises:
        InvariantViolation: The step is illegal.
    """
    if (rung, step) not in RUNGS:
        raise InvariantViolation(f"a training cannot {step.name} from {rung.name}")
    return RUNGS[rung, step]


def observe(
    keys: LadderKeys,
    standing: Standing,
    breakers: BreakerMoves,
    made: bool,
    is_exhausted: bool,
    facts: list[LadderFact],
) -> Standing:
    """Fold one update: give way, halt, or go back to V-trace.

    Args:
        keys: Thresholds.
        standing: As it was before the update.
        breakers: What happened to the breakers at it.
        made: Whether the update was made.
        is_exhausted: Whether the measures below this have come to their end.
        facts: What happened is appended here.

    Raises:
        InvariantViolation: The training is halted; nobody makes an update then.
    """
    if standing.rung is Rung.HALTED:
        raise InvariantViolation("an update of a training that is halted; an operator resumes it first")
    openings = 0 if made else standing.openings + breakers.training_opened
    standing = msgspec.structs.replace(standing, openings=openings)
    if standing.rung is Rung.VTRACE:
        reasons = _reasons(is_exhausted, breakers.training_opened, breakers.vtrace_opened)
        if not reasons:
            return standing
        facts.append(FallbackEntered(targets="td", reason=reasons[0]))
        return _moved(standing, Step.FALL)
    reasons = _reasons(is_exhausted, openings >= keys.halt_after_openings, False)
    if reasons:
        facts.append(TrainingHalted(reason=reasons[0]))
        return _moved(standing, Step.HALT)
    if not breakers.vtrace_closed:
        return standing
    facts.append(FallbackLeft())
    return _moved(standing, Step.RISE)


def resumed(standing: Standing) -> tuple[Standing, list[LadderFact]]:
    """Fold that an operator lets a halted training go on.

    Raises:
        InvariantViolation: It is not halted.
    """
    return Standing(rung=next_rung(standing.rung, Step.RESUME)), [TrainingResumed()]


def _reasons(exhausted: bool, training: bool, vtrace: bool) -> list[str]:
    named = ((exhausted, EXHAUSTED), (training, TRAINING_OPENED), (vtrace, VTRACE_OPENED))
    return [name for holds, name in named if holds]


def _moved(standing: Standing, step: Step) -> Standing:
    return msgspec.structs.replace(standing, rung=next_rung(standing.rung, step))
