"""What the service manager wants to hear: ready, alive, stopping, be patient.

The protocol is one datagram of `NAME=value` lines to the socket in `$NOTIFY_SOCKET`. Without that variable nobody
listens, and every call does nothing; that is a normal way to run, so it is no error.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from esper_simic.errors import UnavailableError


class Notifier:
    """Speaks to the service manager named by an environment.

    Args:
        environment: Usually `os.environ`; `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are read from it.

    Raises:
        UnavailableError: The socket is named, but cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket: socket.socket | None = None
        self._said = ""
        self.watchdog_interval_s = _watchdog_interval_s(environment)
        """How often `alive` is to be called, half of the manager's patience; None when it does not watch."""
        address = environment.get("NOTIFY_SOCKET", "")
        if not address:
            return
        # A leading @ stands for the zero byte of Linux's abstract socket names.
        name = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(name)
        except OSError as error:
            self._socket.close()
            raise UnavailableError(
                f"the service manager's socket {address} cannot be reached: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self) -> None:
        """The service does what it is for."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for people; sent only when it changes."""
        if text != self._said:
            self._said = text
            self._send("STATUS=" + text.replace("\n", " "))

    def alive(self) -> None:
        """Keep the watchdog quiet."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service has begun to end."""
        self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping goes on; ask for so many more seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def close(self) -> None:
        """Close the socket. A second call does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, line: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(line.encode())
        except OSError as error:
            raise UnavailableError(f"the service manager does not take {line!r}: {error}") from error


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    microseconds = environment.get("WATCHDOG_USEC", "")
    pid = environment.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1_000_000 / 2
