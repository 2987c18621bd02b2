"""The learner's main in a thread, between an actor's socket and a supervisor's, from READY to its checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper_simic.errors import UnavailableError
from esper_simic.events import CheckpointSaved, LearnerStepped, RunStarted
from supervisor import checkpoints
from supervisor.bus import Received, Server, ipc_endpoint, runtime_directory
from supervisor.journal import Journal, read
from supervisor.protocol import ACCEPTS, Acknowledged, Credit, Message, Noted, Progress, Ready, Stop, Stopped
from supervisor.roles import learner as role
from tests.roles.bench import LANES, RUN_ID, Actor, T, bench, make_config, spec_of

DEADLINE_S = 60.0


class Life:
    """A learner in a thread, a supervisor's end of its line, and an actor."""

    def __init__(self, server: Server, control: str, experience: str, run_dir: Path) -> None:
        self.server, self.run_dir = server, run_dir
        self.heard: list[Message] = []
        self.error: Exception | None = None
        self.actor = Actor(experience, 0, 1)
        endpoints = {"control": control, "experience": experience}
        spec = spec_of("learner", 0, run_dir, make_config(), endpoints)

        def live() -> None:
            try:
                role.main(spec)
            except Exception as error:  # noqa: BLE001 - handed to the test
                self.error = error

        self.thread = threading.Thread(target=live, daemon=True)

    def until(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            received = self.server.receive()
            if isinstance(received, Received):
                self.heard.append(received.message)
                if isinstance(received.message, Stopped):
                    self.server.send(received.peer, Noted(of="Stopped"))
            told = self.actor.client.receive(2)
            if isinstance(told, Received):
                self.actor.heard.append(told.message)
            assert time.monotonic() < deadline_s, self.error

    def has_heard(self, kind: type[Message]) -> bool:
        return any(isinstance(message, kind) for message in self.heard)

    def stop(self) -> Stopped:
        self.server.send("learner-0-1", Stop(reason="enough"))
        self.until(lambda: not self.thread.is_alive())
        assert self.error is None, self.error
        (stopped,) = [message for message in self.heard if isinstance(message, Stopped)]
        return stopped


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    with runtime_directory() as sockets:
        control, experience = (ipc_endpoint(sockets, name) for name in ("control", "experience"))
        with Server(control, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=2**20) as server:
            made = Life(server, control, experience, tmp_path / "run")
            yield made
            if made.thread.is_alive():
                made.stop()
            made.actor.client.close()


def teach(life: Life, tmp_path: Path, unrolls: int) -> None:
    """Send unrolls as the credits allow, all of version 0."""
    with bench(tmp_path / "frames") as held:
        life.actor.hello()
        for sequence in range(1, unrolls + 1):
            life.until(lambda: any(isinstance(message, Credit) for message in life.actor.heard))
            credit = next(message for message in life.actor.heard if isinstance(message, Credit))
            life.actor.heard.remove(credit)
            if credit.count > 1:
                life.actor.heard.append(Credit(count=credit.count - 1, policy_version=credit.policy_version))
            life.actor.sequence = sequence
            life.actor.client.send(life.actor.message(), held.frames(sequence))
    life.until(lambda: len([m for m in life.actor.heard if isinstance(m, Acknowledged)]) == unrolls)


def test_it_learns_tells_and_leaves_a_checkpoint(life: Life, tmp_path: Path) -> None:
    life.thread.start()
    life.until(lambda: life.has_heard(Ready))
    teach(life, tmp_path, 6)
    stopped = life.stop()
    records = list(read(life.run_dir / "journal" / "learner-0"))
    started = records[0].header_as(RunStarted)
    assert (started.run_id, started.config) == (RUN_ID, make_config().model_dump(mode="json"))
    assert started.fingerprint["torch"]
    steps = [record.header_as(LearnerStepped) for record in records if record.kind == "LearnerStepped"]
    assert len(steps) == 2, "24 experiences, 8 of them before the first update, 6 fresh ones each"

    saved = records[-1].header_as(CheckpointSaved)
    assert stopped.checkpoint is not None
    assert (stopped.checkpoint.learner_step, stopped.checkpoint.digest) == (2, saved.state_digest)
    manifest, _ = checkpoints.load(Path(stopped.checkpoint.path))
    assert manifest.step == saved.step == 2
    assert Path(stopped.checkpoint.path).parent == life.run_dir / "checkpoints"

    last = [message for message in life.heard if isinstance(message, Progress)][-1]
    assert (last.work, last.learner_step, last.environment_steps) == (2, 2, 6 * T * LANES), (
        "the last word on it"
    )
    assert last.metrics["value_loss"] == steps[-1].metrics["value_loss"]


def test_a_learner_without_experience_says_what_it_waits_for_and_sleeps(life: Life) -> None:
    life.thread.start()
    life.until(lambda: [m for m in life.heard if isinstance(m, Progress)])
    spent_s, began_s = time.process_time(), time.monotonic()
    life.until(lambda: len([m for m in life.heard if isinstance(m, Progress)]) >= 4)
    assert time.process_time() - spent_s < 0.5 * (time.monotonic() - began_s), "no busy loop"
    waits = {message.waiting_for for message in life.heard if isinstance(message, Progress)}
    assert waits == {"experience"}
    checkpoint = life.stop().checkpoint
    assert checkpoint is not None
    assert checkpoint.learner_step == 0


def test_a_journal_that_somebody_writes_is_not_written_by_two(life: Life) -> None:
    directory = life.run_dir / "journal" / "learner-0"
    with Journal(directory, owner="learner-0", run_id=RUN_ID):
        life.thread.start()
        life.until(lambda: not life.thread.is_alive())
    assert isinstance(life.error, UnavailableError)
    assert not life.has_heard(Ready)
