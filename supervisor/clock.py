"""Time as a value that somebody hands in.

Deciding code takes seconds as arguments; only shells hold a `Clock`, and tests hand them one that stands still.
"""

from __future__ import annotations

import math
import time
from typing import Protocol


class Clock(Protocol):
    """Two readings that must never be mixed: one names an instant, the other measures durations."""

    def now_s(self) -> float:
        """Seconds since 1970-01-01 00:00 UTC; may jump when the machine's clock is set."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_s(self) -> float:
        """Seconds since 1970-01-01 00:00 UTC."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()


class SteadyTime:
    """Instants of a wall clock that may be set back, as a time that never falls.

    A step back counts as no time: it stands still for an instant and goes on from there, as fast as the clock does. It
    is the clock's own reading as long as that is never set back.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._newest_s, self._ahead_s = -math.inf, 0.0

    def go_on_from(self, instant_s: float) -> None:
        """Give no instant before this one; time goes on from now."""
        self._newest_s = max(self._newest_s, instant_s)
        self.now_s()

    def now_s(self) -> float:
        """Seconds, never fewer than before; those since 1970-01-01 00:00 UTC where the clock was never set back."""
        now_s = self._clock.now_s() + self._ahead_s
        if now_s < self._newest_s:
            self._ahead_s += self._newest_s - now_s
        # The newest one itself, not a sum that rounding may have put below it.
        self._newest_s = max(self._newest_s, now_s)
        return self._newest_s


class ManualClock:
    """A clock that moves only when told to.

    Args:
        now_s: First reading of `now_s()`, in seconds since 1970-01-01 00:00 UTC.
        monotonic_s: First reading of `monotonic_s()`.
    """

    def __init__(self, now_s: float = 0.0, monotonic_s: float = 0.0) -> None:
        self._now_s = now_s
        self._monotonic_s = monotonic_s

    def now_s(self) -> float:
        """The wall clock as it was last set or advanced."""
        return self._now_s

    def monotonic_s(self) -> float:
        """The sum of all advances, from the first reading on."""
        return self._monotonic_s

    def advance(self, duration_s: float) -> None:
        """Let time pass on both clocks.

        Raises:
            ValueError: `duration_s` is negative; a monotonic clock cannot go back.
        """
        if duration_s < 0:
            raise ValueError(f"time cannot go back by {-duration_s} s")
        self._now_s += duration_s
        self._monotonic_s += duration_s

    def set_now(self, now_s: float) -> None:
        """Set the wall clock alone, also backwards, as an operator or a time server does."""
        self._now_s = now_s
