"""Conservative mode: smaller batches, slower learning, more time, for as long as something is wrong.

Five triggers can put a training into the mode, each of which the configuration may switch off. Any one enters it; a
second one while inside only adds its name. It is left when **all** have been quiet for a number of updates and of
seconds. A trigger becomes quiet only below its threshold times `conservative_leave_factor`, so that a figure at the
threshold does not switch the mode to and fro.

| trigger | raised by | quiet again |
|---|---|---|
| `high_error_rate` | share of failed operations > `error_rate_max` | below the factor times that |
| `memory_pressure` | memory in use > `memory_pressure_fraction`, or it ran out | as above, and it did not |
| `circuit_breaker_open` | a breaker is OPEN | all are CLOSED |
| `slo_violation` | an objective that smaller steps serve is violated and not met now | there is none |
| `training_instability` | loss or gradient norm too large, see below | both below the factor times that |
| | a learning rate that somebody else had written | there is none |

What the mode does is nowhere stored: `effects(keys, active)` is a function of the configuration and of whether the mode
is on, so that two entries cannot halve a batch twice, and leaving undoes everything exactly.

**What counts as a large loss.** The requirement's threshold, twice `max_validation_loss`, was meant for a loss that is
at its best near 0. An actor-critic's total is not: the policy's part has either sign and the entropy bonus lowers it,
so a huge value loss can hide. The loss judged here is `value_loss + |policy_loss|`, in units of the scaled reward, as a
moving average over about `FAST_STEPS` updates; single batches of healthy trainings exceed 1. The threshold is twice
`max_validation_loss`, or twice what is usual in this run (a moving average over about `SLOW_STEPS` updates) where that
is more: a critic that begins at 0 has a large loss and is not unstable, one whose loss doubles is. In seven recorded
trainings, 473 to 11,673 updates long, the first average reached at most 1.47 times the larger of the two, where 2
raises the trigger; a single loss was above the plain threshold in each of them, in up to 5.9 % of the updates.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from esper_simic.config_safety import ConservativeKeys
from esper_simic.safety_facts import (
    ConservativeFact,
    ConservativeModeEntered,
    ConservativeModeLeft,
    ConservativeTriggersAdded,
)

FAST_STEPS: Final = 20
SLOW_STEPS: Final = 1000
ERROR_STEPS: Final = 100
"""Updates after which an operation counts 1/e in the error rate."""

OPERATIONS_MIN: Final = 20.0
"""The error rate of fewer operations is taken as if there had been so many: one failure at the start is no rate."""

LOSS_RATIO_MAX: Final = 2.0
SPIKE_MAX: Final = 100.0

BATCH_SIZE_MIN: Final = 8
BATCH_SIZE_MAX: Final = 256


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """What the triggers look at after one update.

    Attributes:
        error_rate: Share of failed operations, `error_rate` of the averages.
        memory_fraction: Share of the memory limit in use.
        out_of_memory: Whether this update did not fit.
        breaker_open: Whether a breaker is OPEN.
        breakers_closed: Whether every breaker is CLOSED.
        slo_violated: Whether an objective that smaller steps serve is violated and not met now.
        loss_ratio: Averaged loss over the larger of `max_validation_loss` and the usual loss.
        grad_norm: Before clipping.
        rates_tampered: Whether somebody else had written a learning rate.
    """

    error_rate: float = 0.0
    memory_fraction: float = 0.0
    out_of_memory: bool = False
    breaker_open: bool = False
    breakers_closed: bool = True
    slo_violated: bool = False
    loss_ratio: float = 0.0
    grad_norm: float = 0.0
    rates_tampered: bool = False


class Conservative(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the mode is on, of JSON types.

    Attributes:
        active: Whether it is.
        triggers: What was raised since it was entered, in the order of the first time.
        entries: Times it was entered.
        entered_s: When it was entered last.
        steps: Updates since then.
        quiet_steps: Updates in a row, up to now, in which every trigger was quiet.
        quiet_since_s: When the first of those was.
    """

    active: bool = False
    triggers: tuple[str, ...] = ()
    entries: int = 0
    entered_s: float = 0.0
    steps: int = 0
    quiet_steps: int = 0
    quiet_since_s: float = 0.0


def raised(keys: ConservativeKeys, signals: Signals) -> tuple[str, ...]:
    """The triggers that these signals raise, of those that are switched on, in the configuration's order."""
    states = _states(keys, signals, 1.0)
    states["circuit_breaker_open"] = signals.breaker_open
    return tuple(name for name in keys.conservative_mode_triggers if states[name])


def quiet(keys: ConservativeKeys, signals: Signals) -> bool:
    """Whether every trigger that is switched on is below its threshold for leaving."""
    states = _states(keys, signals, keys.conservative_leave_factor)
    states["circuit_breaker_open"] = not signals.breakers_closed
    return not any(states[name] for name in keys.conservative_mode_triggers)


def _states(keys: ConservativeKeys, signals: Signals, factor: float) -> dict[str, bool]:
    return {
        "high_error_rate": signals.error_rate > keys.error_rate_max * factor,
        "memory_pressure": signals.out_of_memory
        or signals.memory_fraction > keys.memory_pressure_fraction * factor,
        "slo_violation": signals.slo_violated,
        "training_instability": signals.rates_tampered
        or signals.loss_ratio > LOSS_RATIO_MAX * factor
        or signals.grad_norm > keys.unstable_grad_norm * factor,
    }


def observe(
    keys: ConservativeKeys, mode: Conservative, signals: Signals, now_s: float
) -> tuple[Conservative, list[ConservativeFact]]:
    """Fold the signals of one update.

    Args:
        keys: Thresholds.
        mode: As it was before the update.
        signals: What the update showed.
        now_s: Seconds by a clock that never goes back.

    Returns:
        The mode after the update, and what happened to it.
    """
    triggers = raised(keys, signals)
    if not mode.active:
        return _entered(mode, triggers, now_s) if triggers else (mode, [])
    mode = msgspec.structs.replace(mode, steps=mode.steps + 1)
    if not quiet(keys, signals):
        return _noisy(mode, triggers)
    since_s = mode.quiet_since_s if mode.quiet_steps else now_s
    mode = msgspec.structs.replace(mode, quiet_steps=mode.quiet_steps + 1, quiet_since_s=since_s)
    if mode.quiet_steps < keys.conservative_quiet_steps or now_s - since_s < keys.conservative_quiet_s:
        return mode, []
    left = ConservativeModeLeft(triggers=mode.triggers, seconds=now_s - mode.entered_s, steps=mode.steps)
    return Conservative(entries=mode.entries), [left]


def _entered(
    mode: Conservative, triggers: tuple[str, ...], now_s: float
) -> tuple[Conservative, list[ConservativeFact]]:
    entries = mode.entries + 1
    entered = Conservative(active=True, triggers=triggers, entries=entries, entered_s=now_s)
    return entered, [ConservativeModeEntered(triggers=triggers, entries=entries)]


def _noisy(mode: Conservative, triggers: tuple[str, ...]) -> tuple[Conservative, list[ConservativeFact]]:
    new = tuple(name for name in triggers if name not in mode.triggers)
    mode = msgspec.structs.replace(mode, quiet_steps=0, triggers=mode.triggers + new)
    return mode, [ConservativeTriggersAdded(triggers=new)] if new else []


# -- what it changes ---------------------------------------------------------------------------------------------------


class Effects(msgspec.Struct, frozen=True, kw_only=True):
    """Factors on configured values; all 1 outside of the mode."""

    batch_factor: float = 1.0
    timeout_factor: float = 1.0
    lr_factor: float = 1.0


def effects(keys: ConservativeKeys, active: bool) -> Effects:
    """What the mode changes, as factors on what is configured."""
    if not active:
        return Effects()
    return Effects(
        batch_factor=keys.conservative_batch_size_factor,
        timeout_factor=keys.conservative_timeout_factor,
        lr_factor=keys.conservative_lr_factor,
    )


def batch_size(configured: int, factor: float) -> int:
    """The largest power of two in [8, 256] that is at most `configured * factor`; 8 where there is none.

    Args:
        configured: The configuration's batch size, itself a power of two in that range.
        factor: In (0, 1]; 1 gives `configured`.
    """
    size = max(BATCH_SIZE_MIN, min(BATCH_SIZE_MAX, math.floor(configured * factor)))
    return 1 << (size.bit_length() - 1)


# -- moving averages ---------------------------------------------------------------------------------------------------


class Averages(msgspec.Struct, frozen=True, kw_only=True):
    """Moving averages of a training's loss and errors, of JSON types.

    Attributes:
        losses: Losses folded; counted up to `SLOW_STEPS`.
        fast: Their average over about `FAST_STEPS` updates; the plain mean before there were so many.
        slow: The same over `SLOW_STEPS`.
        errors: Failed operations, each weighted by `(1 - 1 / ERROR_STEPS)^age`, its age in updates.
        operations: All operations, weighted alike.
    """

    losses: int = 0
    fast: float = 0.0
    slow: float = 0.0
    errors: float = 0.0
    operations: float = 0.0

    @property
    def error_rate(self) -> float:
        """Share of operations that failed, in [0, 1]."""
        return self.errors / max(self.operations, OPERATIONS_MIN)

    def loss_ratio(self, max_validation_loss: float) -> float:
        """Fast average over the larger of a good loss and the usual one."""
        return self.fast / max(max_validation_loss, self.slow)


def with_loss(averages: Averages, loss: float, max_validation_loss: float) -> Averages:
    """The averages after one more loss.

    A single monstrous loss must neither keep the mode on for thousands of updates nor raise what is usual: from the
    `FAST_STEPS`-th on, the fast average takes at most `SPIKE_MAX` times the larger of a good loss and the usual one,
    the slow average at most `LOSS_RATIO_MAX` times.

    Args:
        averages: As they were.
        loss: Finite, >= 0.
        max_validation_loss: A loss that is still good.
    """
    for_fast = for_slow = loss
    if averages.losses >= FAST_STEPS:
        usual = max(max_validation_loss, averages.slow)
        for_fast, for_slow = min(loss, SPIKE_MAX * usual), min(loss, LOSS_RATIO_MAX * usual)
    losses = min(averages.losses + 1, SLOW_STEPS)
    fast = averages.fast + (for_fast - averages.fast) / min(losses, FAST_STEPS)
    slow = averages.slow + (for_slow - averages.slow) / losses
    return msgspec.structs.replace(averages, losses=losses, fast=fast, slow=slow)


def with_operations(averages: Averages, errors: int, operations: int) -> Averages:
    """The averages one update later, in which `errors` of `operations` failed."""
    kept = 1.0 - 1.0 / ERROR_STEPS
    return msgspec.structs.replace(
        averages, errors=averages.errors * kept + errors, operations=averages.operations * kept + operations
    )
