"""What comes from outside with each update, gathered for the record: clocks, memory, what went wrong meanwhile.

The learner's fold reads none of this itself; what is read here stands in the journal with the update (`StepInputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from esper_simic.safety import StepInputs
from supervisor import memory
from supervisor.bus import Poller
from supervisor.clock import Clock, SteadyTime

MEMORY_INTERVAL_S: Final = 1.0
"""How often the machine's memory is looked at."""


class Surroundings:
    """The learner's readings between two updates.

    Args:
        clock: Time.
        device_memory: Gives the share of the device's own memory that is taken; None where it has none.
    """

    def __init__(self, clock: Clock, device_memory: Callable[[], float | None] = lambda: None) -> None:
        self._clock, self._device_memory = clock, device_memory
        self._time = SteadyTime(clock)
        self._operations = self._errors = self._experiences = 0
        self._step_ms: float | None = None
        self._boundary_ms: float | None = None
        self._ended_s: float | None = None
        self._idle_s = 0.0
        self._memory: tuple[float, float] | None = None
        self._began_s = clock.monotonic_s()

    def go_on_from(self, *instants_s: float | None) -> None:
        """Let no time be before these: the newest that the learner's state knows of, None for none."""
        for instant_s in instants_s:
            if instant_s is not None:
                self._time.go_on_from(instant_s)

    def now_s(self) -> float:
        """The time by which the safety of the training is measured: a wall clock, so that it goes on over a restart.

        It never falls, whatever becomes of the wall clock: what may be done at one reading is done at a later one, and
        in between the answer must not become no.
        """
        return self._time.now_s()

    def monotonic_s(self) -> float:
        """A clock for durations."""
        return self._clock.monotonic_s()

    def happened(self, *, failed: bool = False, experiences: int = 0) -> None:
        """Count an operation on the outside world, and the experiences that it brought."""
        self._operations += 1
        self._errors += failed
        self._experiences += experiences

    def wait(self, poller: Poller, wait_ms: float) -> None:
        """Wait for something to do; such time is no part of the boundary between two updates."""
        began_s = self._clock.monotonic_s()
        poller.wait(wait_ms)
        self._idle_s += self._clock.monotonic_s() - began_s

    def before_step(self) -> StepInputs:
        """The inputs of an update that begins now; counting begins anew."""
        began_s = self._clock.monotonic_s()
        if self._ended_s is not None:
            self._boundary_ms = max(0.0, 1000 * (began_s - self._ended_s - self._idle_s))
        inputs = StepInputs(
            at_s=self.now_s(),
            previous_step_ms=self._step_ms,
            previous_boundary_ms=self._boundary_ms,
            memory_fraction=self._memory_fraction(began_s),
            operations_since=self._operations,
            errors_since=self._errors,
            experiences_since=self._experiences,
        )
        self._operations = self._errors = self._experiences = 0
        self._began_s = began_s
        return inputs

    def after_step(self) -> None:
        """The update has ended."""
        self._ended_s = self._clock.monotonic_s()
        self._step_ms = 1000 * (self._ended_s - self._began_s)
        self._idle_s = 0.0

    def _memory_fraction(self, now_s: float) -> float:
        if self._memory is None or now_s - self._memory[0] >= MEMORY_INTERVAL_S:
            available, total = memory.machine_available_bytes(), memory.machine_total_bytes()
            # Either of them ends a run when it is full.
            fraction = max(1.0 - available / total, self._device_memory() or 0.0)
            self._memory = (now_s, fraction)
        return self._memory[1]
