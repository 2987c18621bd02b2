"""How a training is, in one word: OK, WARN or CRIT.

| check | WARN | CRIT |
|---|---|---|
| `buffer` | more than 5 GB | more than 6 GB |
| `cleanup` | the last sweep was more than 300 s ago | |
| `loss_slope` | the loss rises by more than 0.01 an update, from epoch to epoch | |
| `loss` | | averaged, more than twice a good or usual one (`conservative.py`) |
| `breakers` | one is HALF_OPEN | one is OPEN |
| `objectives` | one is violated | |
| `training` | | halted |

The worst check decides. It is the maximum over all of them, so no order of asking can hide one.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

import msgspec

from esper_simic.conservative import LOSS_RATIO_MAX
from esper_simic.slo import BUFFER_BYTES_MAX

BUFFER_BYTES_WARN: Final = 5 * 10**9
CLEANUP_S_WARN: Final = 300.0
LOSS_SLOPE_WARN: Final = 0.01


class Health(IntEnum):
    """How a training is; the larger, the worse."""

    OK = 0
    WARN = 1
    CRIT = 2


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """What health is judged by; None is not known, and no complaint.

    Attributes:
        buffer_bytes: Bytes that the buffer holds.
        since_cleanup_s: Seconds since the last sweep of expired experiences.
        loss_slope: Rise of the loss per update, from epoch to epoch.
        loss_ratio: Averaged loss over a good or usual one.
        breakers_open: How many breakers are OPEN.
        breakers_half_open: How many are HALF_OPEN.
        objectives_violated: How many objectives are violated.
        is_halted: Whether no update is made any more.
    """

    buffer_bytes: float | None = None
    since_cleanup_s: float | None = None
    loss_slope: float = 0.0
    loss_ratio: float = 0.0
    breakers_open: int = 0
    breakers_half_open: int = 0
    objectives_violated: int = 0
    is_halted: bool = False


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """Health in all, which is that of the worst check, and every check's."""

    level: Health
    checks: dict[str, Health]


def health(readings: Readings) -> HealthReport:
    """Judge a training; the most severe check decides, in whatever order they stand."""
    checks = {
        "buffer": _level(readings.buffer_bytes, BUFFER_BYTES_WARN, BUFFER_BYTES_MAX),
        "cleanup": _level(readings.since_cleanup_s, CLEANUP_S_WARN, math.inf),
        "loss_slope": _level(readings.loss_slope, LOSS_SLOPE_WARN, math.inf),
        "loss": _level(readings.loss_ratio, LOSS_RATIO_MAX, LOSS_RATIO_MAX),
        "breakers": Health.CRIT if readings.breakers_open else Health(readings.breakers_half_open > 0),
        "objectives": Health(readings.objectives_violated > 0),
        "training": Health.CRIT if readings.is_halted else Health.OK,
    }
    return HealthReport(level=max(checks.values()), checks=checks)


def _level(value: float | None, warn: float, crit: float) -> Health:
    if value is None or value <= min(warn, crit):
        return Health.OK
    return Health.CRIT if value > crit else Health.WARN
