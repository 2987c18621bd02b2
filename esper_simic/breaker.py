"""Circuit breakers: an operation that keeps failing is left alone for a while, then tried once.

```
            failures in a row reach the threshold
   CLOSED ------------------------------------------> OPEN <-+
      ^                                                 |    | the probe fails
      |              the recovery time has passed, and  |    |
      |              the operation is tried once        v    |
      +---------------------------------------------- HALF_OPEN
                     the probe succeeds
```

A breaker is a value; `allows` asks it, `attempted`, `succeeded`, `failed` fold what happened. Who owns the operation
asks, notes the attempt, makes it, and tells how it went:

    if allows(rule, breaker, now_s):
        breaker, facts = attempted(rule, breaker, now_s)
        ... -> succeeded(rule, breaker, now_s) or failed(rule, breaker, now_s)

`MOVES` holds every legal move. Answers that come while the breaker is OPEN belong to attempts from before and change
nothing. A probe that never answers (its process died) is given up after another recovery time.

Time is an argument, from any clock. One that goes back, because it was set or because another machine goes on, neither
shortens nor lengthens what a breaker waits: it measures by the steps forward alone (`Clock`).

A broken invariant is never counted by a breaker: it stops the process.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from esper_simic.config_safety import BreakerKeys
from esper_simic.errors import InvariantViolation
from esper_simic.safety_facts import (
    BreakerClosed,
    BreakerFact,
    BreakerHalfOpened,
    BreakerOpened,
)


class CircuitBreakerState(IntEnum):
    """State of a breaker; the numbers are those of the wire contract."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class Move(IntEnum):
    """What can happen to a breaker; FAIL is a failure below the threshold, TRIP the one that reaches it."""

    SUCCEED = 0
    FAIL = 1
    TRIP = 2
    PROBE = 3


MOVES: Final[dict[tuple[CircuitBreakerState, Move], CircuitBreakerState]] = {
    (CircuitBreakerState.CLOSED, Move.SUCCEED): CircuitBreakerState.CLOSED,
    (CircuitBreakerState.CLOSED, Move.FAIL): CircuitBreakerState.CLOSED,
    (CircuitBreakerState.CLOSED, Move.TRIP): CircuitBreakerState.OPEN,
    (CircuitBreakerState.OPEN, Move.SUCCEED): CircuitBreakerState.OPEN,
    (CircuitBreakerState.OPEN, Move.FAIL): CircuitBreakerState.OPEN,
    (CircuitBreakerState.OPEN, Move.PROBE): CircuitBreakerState.HALF_OPEN,
    (CircuitBreakerState.HALF_OPEN, Move.SUCCEED): CircuitBreakerState.CLOSED,
    (CircuitBreakerState.HALF_OPEN, Move.TRIP): CircuitBreakerState.OPEN,
    (CircuitBreakerState.HALF_OPEN, Move.PROBE): CircuitBreakerState.HALF_OPEN,
}
"""Every legal move; a pair that is missing is illegal."""


def next_state(state: CircuitBreakerState, move: Move) -> CircuitBreakerState:
    """Where a move leads.

    Raises:
        InvariantViolation: The move is illegal.
    """
    if (state, move) not in MOVES:
        raise InvariantViolation(f"a circuit breaker cannot {move.name} while it is {state.name}")
    return MOVES[state, move]


class BreakerRule(msgspec.Struct, frozen=True):
    """When a breaker opens and how long it stays so.

    Attributes:
        failure_threshold: Failures in a row that open it, >= 1.
        recovery_timeout_s: Seconds from opening to the probe, > 0.
    """

    failure_threshold: int
    recovery_timeout_s: float


RULES: Final[dict[str, BreakerRule]] = {
    "training": BreakerRule(5, 60.0),
    "vtrace": BreakerRule(3, 30.0),
    "curriculum": BreakerRule(5, 120.0),
    "storage": BreakerRule(3, 30.0),
    "sampling": BreakerRule(5, 30.0),
    "processing": BreakerRule(3, 60.0),
    "publication": BreakerRule(3, 30.0),
    "validation": BreakerRule(3, 30.0),
    "generic": BreakerRule(3, 30.0),
}
"""The named breakers of the platform and their numbers; each breaker has one probe."""

FOLLOWERS: Final = frozenset({"vtrace", "storage", "publication", "validation", "generic"})
"""Breakers whose numbers are the generic ones: they follow `circuit_breaker_…` of the configuration."""


def rule(name: str, keys: BreakerKeys) -> BreakerRule:
    """The numbers of a named breaker under a configuration.

    Raises:
        InvariantViolation: There is no such breaker.
    """
    if name in FOLLOWERS:
        return BreakerRule(keys.circuit_breaker_failure_threshold, keys.circuit_breaker_recovery_timeout_s)
    if name == "training":
        return BreakerRule(keys.training_breaker_failure_threshold, keys.training_breaker_recovery_timeout_s)
    if name not in RULES:
        raise InvariantViolation(f"no circuit breaker is named {name!r}; known: {', '.join(RULES)}")
    return RULES[name]


class Clock(msgspec.Struct, frozen=True):
    """Seconds that have passed, measured by a clock that may be set back.

    Attributes:
        reading_s: Newest reading; None before the first.
        elapsed_s: Sum of all steps forward; never falls.
    """

    reading_s: float | None = None
    elapsed_s: float = 0.0


def advance(clock: Clock, now_s: float) -> Clock:
    """The clock after another reading: a step back counts as no time."""
    before_s = now_s if clock.reading_s is None else clock.reading_s
    return Clock(float(now_s), clock.elapsed_s + max(0.0, now_s - before_s))


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """One breaker's state, of JSON types.

    Attributes:
        name: Whose breaker.
        state: Where it stands.
        failures: Failures in a row, as far as they count for opening; 0 after a success.
        openings: Times it has opened.
        changed_s: Elapsed time of the last opening or probe.
        open_s: Seconds in which it was OPEN and refused, up to `clock`, over all openings.
        clock: Its time.
    """

    name: str
    state: CircuitBreakerState = CircuitBreakerState.CLOSED
    failures: int = 0
    openings: int = 0
    changed_s: float = 0.0
    open_s: float = 0.0
    clock: Clock = Clock()


def allows(rule: BreakerRule, breaker: Breaker, now_s: float) -> bool:
    """Whether the operation may be tried now; changes nothing."""
    if breaker.state is CircuitBreakerState.CLOSED:
        return True
    waited_s = advance(breaker.clock, now_s).elapsed_s - breaker.changed_s
    return waited_s >= rule.recovery_timeout_s


def observed(rule: BreakerRule, breaker: Breaker, now_s: float) -> Breaker:
    """The same breaker later: its clock, and the time in which it refused, are counted up to now.

    When the recovery time has passed it refuses no more, however long nobody asks it.
    """
    clock = advance(breaker.clock, now_s)
    refused_s = 0.0
    if breaker.state is CircuitBreakerState.OPEN:
        until_s = min(clock.elapsed_s, breaker.changed_s + rule.recovery_timeout_s)
        refused_s = max(0.0, until_s - breaker.clock.elapsed_s)
    return msgspec.structs.replace(breaker, clock=clock, open_s=breaker.open_s + refused_s)


def attempted(rule: BreakerRule, breaker: Breaker, now_s: float) -> tuple[Breaker, list[BreakerFact]]:
    """Fold that the operation is being tried.

    Raises:
        InvariantViolation: `allows` says no.
    """
    if not allows(rule, breaker, now_s):
        raise InvariantViolation(f"the {breaker.name} breaker is {breaker.state.name}; ask allows first")
    breaker = observed(rule, breaker, now_s)
    if breaker.state is CircuitBreakerState.CLOSED:
        return breaker, []
    facts: list[BreakerFact] = [BreakerHalfOpened(name=breaker.name)]
    return _moved(breaker, Move.PROBE, changed_s=breaker.clock.elapsed_s), facts


def succeeded(rule: BreakerRule, breaker: Breaker, now_s: float) -> tuple[Breaker, list[BreakerFact]]:
    """Fold that an attempt went well: failures are no longer in a row, and a probe closes the breaker."""
    before = breaker.state
    breaker = observed(rule, breaker, now_s)
    failures = breaker.failures if before is CircuitBreakerState.OPEN else 0
    breaker = _moved(breaker, Move.SUCCEED, failures=failures)
    closed = before is CircuitBreakerState.HALF_OPEN
    return breaker, [BreakerClosed(name=breaker.name)] if closed else []


def failed(rule: BreakerRule, breaker: Breaker, now_s: float) -> tuple[Breaker, list[BreakerFact]]:
    """Fold that an attempt failed: the threshold opens the breaker, and so does a probe."""
    failures = breaker.failures + 1
    match breaker.state:
        case CircuitBreakerState.CLOSED if failures < rule.failure_threshold:
            return _moved(observed(rule, breaker, now_s), Move.FAIL, failures=failures), []
        case CircuitBreakerState.OPEN:
            return _moved(observed(rule, breaker, now_s), Move.FAIL), []
        case _:
            return _opened(observed(rule, breaker, now_s), failures)


def tripped(rule: BreakerRule, breaker: Breaker, now_s: float) -> tuple[Breaker, list[BreakerFact]]:
    """Open a breaker for another's failures; one that is open already begins to wait anew."""
    breaker = observed(rule, breaker, now_s)
    if breaker.state is CircuitBreakerState.OPEN:
        return msgspec.structs.replace(breaker, changed_s=breaker.clock.elapsed_s), []
    return _opened(breaker, breaker.failures)


def _opened(breaker: Breaker, failures: int) -> tuple[Breaker, list[BreakerFact]]:
    opened = _moved(
        breaker,
        Move.TRIP,
        failures=failures,
        openings=breaker.openings + 1,
        changed_s=breaker.clock.elapsed_s,
    )
    return opened, [BreakerOpened(name=breaker.name, failures=failures)]


def _moved(breaker: Breaker, move: Move, **changes: float) -> Breaker:
    return msgspec.structs.replace(breaker, state=next_state(breaker.state, move), **changes)


# -- V-trace -----------------------------------------------------------------------------------------------------------


class VtraceRatios(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen of the importance weights pi/mu of one update, before any truncation.

    Attributes:
        finite: Whether weights, targets and advantages all are.
        log_ratio_max: Largest log(pi/mu) of any step.
        mean_ratio: Mean of pi/mu over the steps at which there was a choice; 1 in expectation where pi = mu.
    """

    finite: bool
    log_ratio_max: float
    mean_ratio: float


class VtraceVerdict(IntEnum):
    """Whether V-trace can be used on a batch, and if not, why."""

    SOUND = 0
    NOT_FINITE = 1
    RATIO_TOO_LARGE = 2
    MEAN_OUT_OF_RANGE = 3


def judge_vtrace(ratios: VtraceRatios, keys: BreakerKeys) -> VtraceVerdict:
    """Judge V-trace's result; anything but SOUND is a failure for its breaker.

    A single small ratio is no failure, however small: it says that the policy has learned not to do that again, and
    truncation leaves it without effect. When all are, the batch teaches nothing; the mean shows that.
    """
    if not ratios.finite:
        return VtraceVerdict.NOT_FINITE
    # Written so that a ratio that is not a number fails, too.
    if not ratios.log_ratio_max <= keys.vtrace_log_ratio_max:
        return VtraceVerdict.RATIO_TOO_LARGE
    if not keys.vtrace_mean_ratio_min <= ratios.mean_ratio <= keys.vtrace_mean_ratio_max:
        return VtraceVerdict.MEAN_OUT_OF_RANGE
    return VtraceVerdict.SOUND
