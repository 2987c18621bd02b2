"""What tests of several lives of a server need to know about a client's socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from supervisor.bus import Client

DEADLINE_MS: Final = 10_000


class Losses(Protocol):
    """Waits until a client has noticed that its server is gone.

    What it says before that may still be given to the dead server's socket and be lost with it; what it says after
    that waits for the next one.
    """

    def __call__(self) -> None: ...


@contextmanager
def losses_of(client: Client) -> Iterator[Losses]:
    """Watch a client's connection; to be left before the client is closed."""
    monitor = client.pollable.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def await_loss() -> None:
        assert monitor.poll(DEADLINE_MS), "the client still believes in its server"
        recv_monitor_message(monitor)

    try:
        yield await_loss
    finally:
        client.pollable.disable_monitor()
        monitor.close(linger=0)
