"""Words to the service manager, heard at a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_simic.errors import UnavailableError
from supervisor.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5.0)
        yield listener


def address(manager: socket.socket) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(manager.getsockname())}


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_each_word_is_one_datagram_of_the_protocol(manager: socket.socket) -> None:
    with Notifier(address(manager)) as notifier:
        notifier.ready()
        notifier.alive()
        notifier.extend_timeout(2.5)
        notifier.stopping()
    words = [heard(manager) for _ in range(4)]
    assert words == ["READY=1", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=2500000", "STOPPING=1"]


def test_a_status_is_one_line_and_said_once(manager: socket.socket) -> None:
    with Notifier(address(manager)) as notifier:
        notifier.status("training\nstep 1")
        notifier.status("training\nstep 1")
        notifier.status("training step 2")
    assert [heard(manager), heard(manager)] == ["STATUS=training step 1", "STATUS=training step 2"]
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_an_abstract_socket_is_reached_too() -> None:
    name = f"simic-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        listener.settimeout(5.0)
        with Notifier({"NOTIFY_SOCKET": "@" + name}) as notifier:
            notifier.ready()
        assert heard(listener) == "READY=1"


def test_without_a_service_manager_nothing_happens() -> None:
    with Notifier({}) as notifier:
        notifier.ready()
        notifier.status("alone")
        assert notifier.watchdog_interval_s is None


def test_a_named_but_missing_socket_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached"):
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})


def test_a_manager_that_goes_away_is_unavailable(manager: socket.socket) -> None:
    with Notifier(address(manager)) as notifier:
        manager.close()
        with pytest.raises(UnavailableError, match="READY=1"):
            notifier.ready()


def test_the_watchdog_is_fed_twice_as_often_as_asked_and_only_by_whom_it_watches() -> None:
    assert Notifier({"WATCHDOG_USEC": "30000000"}).watchdog_interval_s == 15.0
    mine = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(mine).watchdog_interval_s == 0.5
    other = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notifier(other).watchdog_interval_s is None
