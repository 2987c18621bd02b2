"""What the learner's log says of an update that failed: one line of JSON, with the traceback.

The journal has the reason alone, since where in the code something happened is no function of the state: the same
journal under other versions would give other records. So whoever wants to know *where* looks here; step and time find
the record in the journal.

What nobody bounds grows for ever. A training may go on for weeks in which one update in a hundred fails, so the first
`TRACES_MAX` failures of a life have their traceback, and later ones a line without (`trace_left_out`). A line that
cannot be written, as on a full disk, is lost and ends nothing; the next one that can says how many were (`lost`).
"""

from __future__ import annotations

from typing import Final, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from esper_simic.telemetry import ErrorText, NullObserver

EVENT: Final = "training step failed"

TRACES_MAX: Final = 100
"""Tracebacks written in one life of a learner; each is a few kilobytes."""

FIRST: Final = ("timestamp", "level", "event")


class StepLog(NullObserver):
    """Writes a line for each update that failed. A `StepObserver`.

    Args:
        out: Where to; a child's standard error is its log.
    """

    def __init__(self, out: TextIO) -> None:
        self._logger = structlog.wrap_logger(
            structlog.WriteLogger(out),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _for_people,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
        self._step = self._batch_size = 0
        self._traces = self._lost = 0

    def begun(self, *, step: int, batch_size: int) -> None:
        """See `StepObserver`."""
        self._step, self._batch_size = step, batch_size

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """See `StepObserver`."""
        told: dict[str, object] = {"step": self._step, "batch_size": self._batch_size, "reason": reason}
        if error is not None:
            told["exception_type"] = error.kind
            is_whole = self._traces < TRACES_MAX
            told |= {"traceback": error.trace} if is_whole else {"trace_left_out": True}
        if self._lost:
            told["lost"] = self._lost
        try:
            self._logger.error(EVENT, **told)
        except OSError:
            self._lost += 1
            return
        self._lost = 0
        self._traces += "traceback" in told


def _for_people(logger: WrappedLogger, name: str, told: EventDict) -> EventDict:
    """What a reader looks for first comes first, and the traceback, which is long, last."""
    last = {key: value for key, value in told.items() if key == "traceback"}
    return {key: told[key] for key in FIRST} | {k: v for k, v in told.items() if k not in FIRST} | last
