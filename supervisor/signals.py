"""Termination signals as something to poll: no handler runs in the middle of anything."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Final

TERMINATION: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask for the end. A closed terminal asks for it too: the run is saved, not lost."""


class SignalInbox:
    """Signals received and not yet taken; `descriptor` is readable when there are any."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def take(self) -> list[signal.Signals]:
        """Give the signals since the last call, in order, without waiting."""
        try:
            numbers = os.read(self.descriptor, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if signal.Signals(number) in TERMINATION]


@contextlib.contextmanager
def signal_inbox() -> Iterator[SignalInbox]:
    """Take over the termination signals for as long as the block lasts. Main thread only."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # The interpreter writes a signal's number into the pipe; the handler itself has nothing to do but to exist.
    before_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in TERMINATION}
    try:
        yield SignalInbox(read_fd)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(read_fd)
        os.close(write_fd)
