"""The loop of a learner, moved by hand, beside actors that live their own lives, in threads instead of processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from esper_simic.errors import UnavailableError
from supervisor.bus import Received, Server, ipc_endpoint, runtime_directory
from supervisor.child import ChildSpec
from supervisor.protocol import ACCEPTS, FromChild, Message, Noted, Stop, Stopped
from supervisor.roles import actor
from tests.roles.bench import LANES, RUN_ID, Bench, spec_of

DEADLINE_S = 60.0
BYTES_MAX = 2**26
SMALL = (
    "environment.max_epochs=6",
    "environment.training_epochs_min=2",
    "environment.train_batches=1",
    "environment.train_batch_size=4",
    "environment.validation_samples=20",
)


class Control:
    """A supervisor's end of control lines, by hand: it notes whatever is to be noted."""

    def __init__(self, server: Server, endpoint: str) -> None:
        self.server, self.endpoint = server, endpoint
        self.heard: list[Message] = []

    def hear(self) -> None:
        while (received := self.server.receive()) is not None:
            assert isinstance(received, Received), received
            self.heard.append(received.message)
            if isinstance(received.message, Stopped):
                self.server.send(received.peer, Noted(of="Stopped"))

    def said(self, kind: type[FromChild]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


@contextmanager
def control_line(name: str = "control") -> Iterator[Control]:
    with runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, name)
        with Server(endpoint, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=BYTES_MAX) as server:
            yield Control(server, endpoint)


class Thread(threading.Thread):
    """A child's main; what it raised is raised again by `finish`."""

    def __init__(self, spec: ChildSpec) -> None:
        super().__init__(daemon=True)
        self._spec = spec
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            actor.main(self._spec)
        except Exception as error:  # noqa: BLE001 - handed to the test
            self._error = error

    def finish(self) -> None:
        self.join(DEADLINE_S)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error


class Pair:
    """The loop of a learner, moved by hand, and an actor that lives its own life in a thread."""

    def __init__(self, held: Bench, control: Control) -> None:
        self.held, self.control = held, control

    def begin(self, incarnation: int = 1, index: int = 0) -> Thread:
        endpoints = {"control": self.control.endpoint, "experience": self.held.endpoint}
        child = Thread(spec_of("actor", index, self.held.directory, self.held.config, endpoints, incarnation))
        child.start()
        return child

    def turn(self) -> None:
        self.control.hear()
        self.held.loop.take_messages()
        self.held.journal.sync()
        self.held.loop.pay()

    def step_turn(self) -> None:
        """As `turn`, and all updates that may be made; in lockstep a complete round is followed by the next."""
        self.turn()
        self.held.step_all()
        self.held.journal.sync()
        self.held.loop.pay()
        self.held.loop.open_round()
        self.held.loop.pay()

    def until(self, admitted: int) -> None:
        self.wait(lambda: self.held.loop.learner.buffer.inserted >= admitted * LANES, self.turn)

    def wait(self, is_reached: Callable[[], bool], turn: Callable[[], None]) -> None:
        """Move the learner until something is true."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_reached():
            turn()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)

    def _asked_to_stop(self, peer: str) -> bool:
        """A child may be slower to come to the control line than its predecessor's unrolls were."""
        try:
            self.control.server.send(peer, Stop(reason="enough"))
        except UnavailableError:
            return False
        return True

    def stop(self, child: Thread, incarnation: int = 1, index: int = 0) -> None:
        self.wait(lambda: self._asked_to_stop(f"actor-{index}-{incarnation}"), self.turn)
        self.wait(lambda: not child.is_alive(), self.turn)
        child.finish()
