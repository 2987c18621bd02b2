"""Who may watch a training step.

A step that computes has no clock and no exporter. It tells an observer where it is, and the observer returns nothing,
so that no reading of a clock can change what is learned: with any observer the step makes the same bits.

A step is told as `begun`, then `passed` after each of its phases, and `done` or `failed`. A phase lasts from what was
told before it; one that comes again (minibatches, several epochs) counts together. What is told outside of a step
belongs to none and is dropped: a watcher never stops the work.

On a GPU a phase passes when its work is *queued*. Who wants to know when it was done hands a clock that waits for the
device first; that costs speed, so it is not the default.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple, Protocol, Self


class Phase(StrEnum):
    """Parts of a step, in their order."""

    SAMPLING = "sampling"
    FORWARD = "forward_pass"
    VTRACE = "vtrace"
    BACKWARD = "backward_pass"
    OPTIMIZER = "optimizer_step"


class ErrorText(NamedTuple):
    """An error and the way that it came, as text.

    The error itself is not kept: it holds on to every frame that it went through, and these to their tensors, which is
    the worst thing to do after one for want of memory.
    """

    kind: str
    """Its class, with the module where that is no built-in one."""
    message: str
    trace: str
    """As an interpreter prints it, with what it came of; the last line is the error."""

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """The text of an error, with the traceback that it has by now."""
        module, name = type(error).__module__, type(error).__qualname__
        kind = name if module == "builtins" else f"{module}.{name}"
        return cls(kind, str(error), "".join(traceback.format_exception(error)))


class StepObserver(Protocol):
    """Can be told things, and returns nothing."""

    def begun(self, *, step: int, batch_size: int) -> None:
        """Step number `step` begins, on `batch_size` experiences."""
        ...

    def passed(self, phase: Phase) -> None:
        """This phase is over."""
        ...

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        """The step has changed the weights."""
        ...

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """The step was given up; of which error, where it was one."""
        ...


class NullObserver:
    """Nobody watches."""

    def begun(self, *, step: int, batch_size: int) -> None:
        """See `StepObserver`."""

    def passed(self, phase: Phase) -> None:
        """See `StepObserver`."""

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        """See `StepObserver`."""

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """See `StepObserver`."""


class Observers:
    """Tells several observers, in their order."""

    def __init__(self, *observers: StepObserver) -> None:
        self._observers = observers

    def begun(self, *, step: int, batch_size: int) -> None:
        """See `StepObserver`."""
        for observer in self._observers:
            observer.begun(step=step, batch_size=batch_size)

    def passed(self, phase: Phase) -> None:
        """See `StepObserver`."""
        for observer in self._observers:
            observer.passed(phase)

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        """See `StepObserver`."""
        for observer in self._observers:
            observer.done(loss=loss, grad_norm=grad_norm, conservative_mode=conservative_mode)

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """See `StepObserver`."""
        for observer in self._observers:
            observer.failed(reason, error)


_KEYS = {
    Phase.SAMPLING: "sampling_time_ms",
    Phase.FORWARD: "forward_time_ms",
    Phase.VTRACE: "vtrace_time_ms",
    Phase.BACKWARD: "backward_time_ms",
    Phase.OPTIMIZER: "optimizer_time_ms",
}
"""Report key of each phase's duration, as the catalogue has it."""


class TimingObserver:
    """Measures how long the newest step and its phases took.

    Args:
        clock_s: Seconds on a clock that never goes back.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._is_open = False
        self._began_s = self._last_s = 0.0
        self._open: dict[str, float] = {}
        self._newest: dict[str, float] = {}

    def begun(self, *, step: int, batch_size: int) -> None:
        """See `StepObserver`; a step that was neither done nor failed is forgotten."""
        self._open = {}
        self._is_open = True
        self._began_s = self._last_s = self._clock_s()

    def passed(self, phase: Phase) -> None:
        """See `StepObserver`."""
        if not self._is_open:
            return
        now_s = self._clock_s()
        key = _KEYS[phase]
        self._open[key] = self._open.get(key, 0.0) + 1000 * (now_s - self._last_s)
        self._last_s = now_s

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        """See `StepObserver`."""
        self._end()

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """See `StepObserver`; the time was spent all the same."""
        self._end()

    def _end(self) -> None:
        if self._is_open:
            self._newest = self._open | {"training_time_ms": 1000 * (self._clock_s() - self._began_s)}
            self._is_open = False

    def milliseconds(self) -> dict[str, float]:
        """Of the newest step that ended: `training_time_ms` and each phase that it had; empty before the first."""
        return dict(self._newest)
