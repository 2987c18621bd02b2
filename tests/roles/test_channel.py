"""A child's line to its supervisor: what it says, what it hears, and how long it waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_simic.errors import UnavailableError
from supervisor.bus import Poller, Received, Server, ipc_endpoint, runtime_directory
from supervisor.protocol import ACCEPTS, Evaluate, Message, Noted, Progress, Ready, Stop, Stopped
from supervisor.roles import channel
from supervisor.roles.channel import ControlChannel
from tests.roles.bench import RUN_ID, make_config, spec_of

BYTES_MAX = 2**20
STOPPED = Stopped(role="actor", index=1, incarnation=3)


class Line:
    """A supervisor's end and a child's end of one control line."""

    def __init__(self, server: Server, child: ControlChannel) -> None:
        self.server, self.child = server, child

    def heard(self) -> Message:
        """The next message from the child."""
        poller = Poller()
        poller.add(self.server)
        poller.wait(10_000)
        received = self.server.receive()
        assert isinstance(received, Received), received
        assert received.peer == "actor-1-3"
        return received.message

    def tell(self, message: Message) -> None:
        """Say something to a child that was heard before, and return when it is there."""
        self.server.send("actor-1-3", message)
        poller = Poller()
        poller.add(self.child.client)
        assert poller.wait(10_000)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, "control")
        spec = spec_of("actor", 1, tmp_path, make_config(), {"control": endpoint}, life=3)
        with Server(endpoint, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=BYTES_MAX) as server:
            with ControlChannel(spec, BYTES_MAX) as child:
                made = Line(server, child)
                child.ready()
                assert made.heard() == Ready(role="actor", index=1, incarnation=3, pid=os.getpid())
                yield made


def test_a_stop_is_heard_and_stays(line: Line) -> None:
    assert line.child.stop_requested() is None
    line.tell(Stop(reason="enough"))
    assert line.child.stop_requested() == Stop(reason="enough")
    assert line.child.stop_requested() == Stop(reason="enough")


def test_tasks_are_kept_in_order_whenever_they_were_heard(line: Line) -> None:
    tasks = [Evaluate(policy=name, episodes=2, checkpoint="") for name in ("random", "patient")]
    for task in tasks:
        line.tell(task)
        assert line.child.stop_requested() is None, "listening for a stop does not lose a task"
    assert [line.child.next_task(0), line.child.next_task(0), line.child.next_task(0)] == [*tasks, None]


def test_work_only_grows_when_the_child_says_so(line: Line) -> None:
    line.child.report(now=True)
    line.child.worked()
    line.child.worked()
    line.child.report(
        now=True, learner_step=4, environment_steps=40, waiting_for="credit", metrics={"lag": 2.0}
    )
    who = {"role": "actor", "index": 1, "incarnation": 3}
    assert line.heard() == Progress(**who, work=0)  # type: ignore[arg-type]
    assert line.heard() == Progress(
        **who,  # type: ignore[arg-type]
        work=2,
        learner_step=4,
        environment_steps=40,
        waiting_for="credit",
        metrics={"lag": 2.0},
    )


def test_reports_are_rare_unless_they_must_be_now(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "PROGRESS_INTERVAL_S", 3600.0)
    for _ in range(50):
        line.child.report()
    line.child.worked()
    line.child.report(now=True)
    assert [line.heard(), line.heard()] == [
        Progress(role="actor", index=1, incarnation=3, work=0),
        Progress(role="actor", index=1, incarnation=3, work=1),
    ]
    assert line.server.receive() is None


def test_another_phase_is_told_at_once_in_both_directions(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who begins something long may have no time to say so again."""
    monkeypatch.setattr(channel, "PROGRESS_INTERVAL_S", 3600.0)
    for phase in ("", "", "long", "long", "", ""):
        line.child.worked()
        line.child.report(phase=phase)
    assert [line.heard() for _ in range(3)] == [
        Progress(role="actor", index=1, incarnation=3, work=1),
        Progress(role="actor", index=1, incarnation=3, work=3, phase="long"),
        Progress(role="actor", index=1, incarnation=3, work=5),
    ]
    assert line.server.receive() is None


def test_telling_waits_until_it_is_noted_and_hears_the_rest_meanwhile(line: Line) -> None:
    done = threading.Event()

    def speak() -> None:
        line.child.tell(STOPPED)
        done.set()

    speaker = threading.Thread(target=speak)
    speaker.start()
    assert line.heard() == STOPPED
    assert not done.is_set(), "said, and not noted"
    line.server.send("actor-1-3", Noted(of="Evaluated"))
    line.server.send("actor-1-3", Stop(reason="late"))
    assert not done.wait(0.05), "something else was noted"
    line.server.send("actor-1-3", Noted(of="Stopped"))
    assert done.wait(10)
    speaker.join()
    assert line.child.stop_requested() == Stop(reason="late")


def test_a_supervisor_that_notes_nothing_is_unavailable(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "NOTED_TIMEOUT_MS", 60)
    began_s = time.monotonic()
    with pytest.raises(UnavailableError, match="did not confirm Stopped within 60 ms"):
        line.child.tell(STOPPED)
    assert 0.06 <= time.monotonic() - began_s < 5
