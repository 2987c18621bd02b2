"""The learner's main in a thread, between an actor's socket and a supervisor's, from READY to its checkpoint."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esper_simic.config import Config
from esper_simic.errors import ConfigError, UnavailableError
from esper_simic.events import (
    AdmissionPaused,
    AdmissionResumed,
    CheckpointSaved,
    CurriculumJudged,
    LearnerRecovered,
    LearnerStepped,
    RunStarted,
)
from esper_simic.learner import FISHER_LANES
from supervisor import checkpoints, files
from supervisor.bus import Received, Server, ipc_endpoint, runtime_directory
from supervisor.files import Reserve
from supervisor.journal import Journal, Record, read
from supervisor.protocol import (
    ACCEPTS,
    CONSOLIDATING,
    Acknowledged,
    Credit,
    Message,
    Noted,
    Progress,
    Ready,
    Stop,
    Stopped,
    Welcome,
)
from supervisor.roles import channel
from supervisor.roles import learner as role
from supervisor.roles.attempts import Attempts, Work
from supervisor.roles.learner import Admission
from tests.roles.bench import LANES, RUN_ID, Actor, T, episode, make_config, spec_of
from tests.roles.pair import SMALL
from tests.roles.scribe import Scribe, unroll_frames
from tests.roles.test_curriculum_roles import STAGES

DEADLINE_S = 60.0


class Life:
    """A learner in a thread, a supervisor's end of its line, and an actor."""

    def __init__(self, server: Server, control: str, experience: str, run_dir: Path, config: Config) -> None:
        self.server, self.run_dir, self.config = server, run_dir, config
        self.endpoints = {"control": control, "experience": experience}
        self.heard: list[Message] = []
        self.actor = Actor(experience, 0, 1)
        self.number = 0

    def begin(self) -> None:
        """The next life."""
        self.number += 1
        self.heard.clear()
        self.error: Exception | None = None
        spec = spec_of("learner", 0, self.run_dir, self.config, self.endpoints, self.number)

        def live() -> None:
            try:
                role.main(spec)
            except Exception as error:  # noqa: BLE001 - handed to the test
                self.error = error

        self.thread = threading.Thread(target=live, daemon=True)
        self.thread.start()

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

    def until_over(self) -> None:
        self.until(lambda: not self.thread.is_alive())

    def said(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def until_ready(self) -> Ready:
        self.until(lambda: self.said(Ready))
        ready: Ready = self.said(Ready)[0]
        return ready

    def stop(self) -> Stopped:
        self.server.send(f"learner-0-{self.number}", Stop(reason="enough"))
        self.until_over()
        assert self.error is None, self.error
        (stopped,) = self.said(Stopped)
        assert isinstance(stopped, Stopped)
        return stopped

    def teach(self, unrolls: int) -> None:
        """Send unrolls as the credits allow, all of version 0."""
        for _ in range(unrolls):
            self.until(lambda: any(isinstance(message, Credit) for message in self.actor.heard))
            credit = next(message for message in self.actor.heard if isinstance(message, Credit))
            self.actor.heard.remove(credit)
            if credit.count > 1:
                self.actor.heard.append(Credit(count=credit.count - 1, policy_version=credit.policy_version))
            self.actor.sequence += 1
            self.actor.client.send(self.actor.message(), list(unroll_frames(self.actor.sequence)))
        self.until(
            lambda: any(
                isinstance(m, Acknowledged) and m.sequence == self.actor.sequence for m in self.actor.heard
            )
        )

    def records(self, kind: type | None = None) -> list[Record]:
        found = read(self.run_dir / "journal" / "learner-0")
        return [record for record in found if kind is None or record.kind == kind.__name__]


@contextmanager
def living(run_dir: Path, *assignments: str) -> Iterator[Life]:
    with runtime_directory() as sockets:
        control, experience = (ipc_endpoint(sockets, name) for name in ("control", "experience"))
        with Server(control, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=2**20) as server:
            config = make_config("supervisor.disk_reserve_bytes=4096", *assignments)
            made = Life(server, control, experience, run_dir, config)
            try:
                yield made
            finally:
                if made.number and made.thread.is_alive():
                    made.stop()
                made.actor.client.close()


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    with living(tmp_path / "run") as made:
        yield made


def test_it_learns_tells_and_leaves_a_checkpoint(life: Life) -> None:
    life.begin()
    assert life.until_ready().learner_step == 0
    life.actor.hello()
    life.teach(6)
    stopped = life.stop()
    records = life.records()
    started = records[0].header_as(RunStarted)
    assert (started.run_id, started.config) == (RUN_ID, life.config.model_dump(mode="json"))
    assert started.fingerprint["torch"]
    steps = [record.header_as(LearnerStepped) for record in records if record.kind == "LearnerStepped"]
    assert len(steps) == 2, "24 experiences, 8 of them before the first update, 6 fresh ones each"

    saved = records[-1].header_as(CheckpointSaved)
    assert stopped.checkpoint is not None
    assert (stopped.checkpoint.learner_step, stopped.checkpoint.digest) == (2, saved.state_digest)
    manifest, _ = checkpoints.load(Path(stopped.checkpoint.path))
    assert manifest.step == saved.step == 2
    assert Path(stopped.checkpoint.path).parent == life.run_dir / "checkpoints"

    last = life.said(Progress)[-1]
    assert (last.metrics["quarantined"], last.metrics["inexact"]) == (0, 0)
    assert (last.work, last.learner_step, last.environment_steps) == (2, 2, 6 * T * LANES), (
        "the last word on it"
    )
    assert last.metrics["value_loss"] == steps[-1].metrics["value_loss"]


def test_a_learner_without_experience_says_what_it_waits_for_and_sleeps(life: Life) -> None:
    life.begin()
    life.until(lambda: life.said(Progress))
    spent_s, began_s = time.process_time(), time.monotonic()
    life.until(lambda: len(life.said(Progress)) >= 4)
    assert time.process_time() - spent_s < 0.5 * (time.monotonic() - began_s), "no busy loop"
    assert {message.waiting_for for message in life.said(Progress)} == {"experience"}
    checkpoint = life.stop().checkpoint
    assert checkpoint is not None
    assert checkpoint.learner_step == 0


def test_a_journal_that_somebody_writes_is_not_written_by_two(life: Life) -> None:
    directory = life.run_dir / "journal" / "learner-0"
    with Journal(directory, owner="learner-0", run_id=RUN_ID):
        life.begin()
        life.until_over()
    assert isinstance(life.error, UnavailableError)
    assert life.said(Ready) == []


def test_what_it_estimates_at_a_passed_stage_is_work_that_its_supervisor_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the life that passes it, and in one that folds the record of that."""
    monkeypatch.setattr(channel, "PROGRESS_INTERVAL_S", 0.0)
    with living(tmp_path / "run", *SMALL, *STAGES) as life:
        life.begin()
        life.until_ready()
        life.actor.hello()
        life.teach(3)
        episodes = [episode(lane, success=True, cut=False) for lane in range(LANES)]
        life.actor.sequence += 1
        life.actor.client.send(life.actor.message(episodes=episodes), list(unroll_frames(4)))
        life.until(lambda: life.records(CurriculumJudged))
        life.until(lambda: life.said(Progress)[-1].learner_step)
        assert life.records(CurriculumJudged)[0].header["consolidated"] > FISHER_LANES
        works = [said.work for said in life.said(Progress) if said.phase == CONSOLIDATING]
        assert len(works) == 3, "its beginning, and two batches"
        assert works == [*range(works[0], works[0] + 3)]
        life.stop()
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        life.begin()
        life.until_ready()
        phases = [said.phase for said in life.said(Progress) if not said.waiting_for]
        assert phases.count(CONSOLIDATING) == 3
        assert phases.index("recovering") < phases.index(CONSOLIDATING)


# -- a later life ------------------------------------------------------------------------------------------------------


def test_a_later_life_says_where_it_stands_and_the_same_actor_goes_on(life: Life) -> None:
    life.begin()
    life.until_ready()
    life.actor.hello()
    life.teach(6)
    checkpoint = life.stop().checkpoint
    assert checkpoint is not None

    life.begin()
    ready = life.until_ready()
    assert (ready.incarnation, ready.learner_step) == (2, 2)
    assert ready.environment_steps == 6 * T * LANES
    (recovered,) = [record.header_as(LearnerRecovered) for record in life.records(LearnerRecovered)]
    assert (recovered.incarnation, recovered.checkpoint) == (2, Path(checkpoint.path).name)
    assert (recovered.state_digest, recovered.is_exact) == (checkpoint.digest, True)

    life.actor.heard.clear()
    life.actor.hello()
    life.until(lambda: any(isinstance(message, Welcome) for message in life.actor.heard))
    assert life.actor.take(Welcome) == [
        Welcome(learner=2, answers=1, first_episodes=[1] * LANES, settled=6, unrolls=6)
    ]
    life.teach(3)
    assert life.stop().checkpoint is not None
    steps = [record.header["step"] for record in life.records(LearnerStepped)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) == 4


def test_after_an_inexact_recovery_it_serves_only_once_its_checkpoint_counts(tmp_path: Path) -> None:
    with Scribe(tmp_path / "run", make_config()) as scribe:
        scribe.teach(5)
        last = scribe.admit()
    for _ in range(3):
        with Attempts(tmp_path / "run" / "learner-0.attempts") as attempts:
            attempts.begin(Work.RECORD, last)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_ready()
        kinds = [record.kind for record in life.records()[last + 1 :]]
        assert kinds == ["RecordQuarantined", "LearnerRecovered", "CheckpointStaged", "CheckpointSaved"]
        recovered, saved = life.records(LearnerRecovered)[0].header, life.records(CheckpointSaved)[0].header
        assert not recovered["is_exact"]
        assert saved["state_digest"] == recovered["state_digest"]
        assert (life.run_dir / "checkpoints" / saved["directory"]).is_dir()
        life.until(lambda: "inexact" in life.said(Progress)[-1].metrics)
        metrics = life.said(Progress)[-1].metrics
        assert (metrics["quarantined"], metrics["inexact"]) == (1, 1)


def test_in_lockstep_it_is_ready_once_the_updates_of_the_last_round_are_made(tmp_path: Path) -> None:
    settings = ("supervisor.lockstep=true",)
    with Scribe(tmp_path / "run", make_config(*settings)) as scribe:
        carried = bytes(4 * LANES * scribe.learner.policy.state_size)
        for number in range(6):
            scribe.admit(number % 2, frames=(*unroll_frames(number), carried))
        possible = (scribe.learner.buffer.fresh) // 6
        assert possible == 2
    with living(tmp_path / "run", *settings) as life:
        life.begin()
        assert life.until_ready().learner_step == possible
        assert len(life.records(LearnerStepped)) == possible


def test_while_it_recovers_it_says_how_far_it_is_and_that_counts_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.roles.recovery.REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr("supervisor.roles.channel.PROGRESS_INTERVAL_S", 0.0)
    with Scribe(tmp_path / "run", make_config()) as scribe:
        scribe.teach(8)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_ready()
        told = [message for message in life.said(Progress) if message.phase == "recovering"]
        assert life.heard.index(told[-1]) < life.heard.index(life.said(Ready)[0])
        total = float(len(scribe.digests))
        assert {message.metrics["recovery.total"] for message in told} == {total}
        done = [message.metrics["recovery.done"] for message in told]
        assert done == sorted(set(done))
        assert done[-1] == total
        assert told[-1].metrics["recovery.seconds_left"] == 0
        assert told[0].metrics["recovery.seconds_left"] > 0
        work = [message.work for message in told]
        assert work == sorted(set(work)), "each of them is progress"


@pytest.mark.parametrize("where", ["newest", "needed"])
def test_damage_is_for_a_person_to_mend_and_is_named(tmp_path: Path, where: str) -> None:
    """Found when the journal is opened or when it is folded: status 78 either way, and no restart that cannot help."""
    with Scribe(tmp_path / "run", make_config()) as scribe:
        scribe.teach(30)
        scribe.journal.sync()
        segments = sorted(scribe.journal.directory.glob("*.log"))
    assert len(segments) >= 4
    segment = segments[-1] if where == "newest" else segments[1]
    data = bytearray(segment.read_bytes())
    data[4000] ^= 1
    segment.write_bytes(data)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_over()
        assert isinstance(life.error, ConfigError)
        assert f"{segment.name} is damaged at byte" in str(life.error)
        assert life.said(Ready) == []


# -- beside training ---------------------------------------------------------------------------------------------------


def test_checkpoints_are_made_beside_training_and_old_ones_go(tmp_path: Path) -> None:
    settings = ("supervisor.checkpoint_interval_steps=1", "supervisor.keep_last=1", "supervisor.keep_best=0")
    with living(tmp_path / "run", *settings) as life:
        life.begin()
        life.until_ready()
        life.actor.hello()
        life.teach(8)
        life.until(lambda: life.records(CheckpointSaved))
        life.until(lambda: life.said(Progress)[-1].metrics["checkpoint.step"] >= 1)
        life.teach(4)
        stopped = life.stop()
        saved = [record.header["directory"] for record in life.records(CheckpointSaved)]
        assert len(saved) >= 2
        assert stopped.checkpoint is not None
        left = [path.name for path in (life.run_dir / "checkpoints").iterdir()]
        assert left == [saved[-1]] == [Path(stopped.checkpoint.path).name]


def test_on_a_full_disk_it_takes_nothing_in_and_goes_on_when_there_is_room(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life.begin()
    life.until_ready()
    life.actor.hello()
    life.teach(3)
    admitted = len(life.records(LearnerStepped)), life.actor.sequence
    with monkeypatch.context() as context:
        context.setattr(files, "free_bytes", lambda path: 0)
        (life.run_dir / "learner-0.reserve").unlink()  # as the journal does on a full disk
        life.until(lambda: life.said(Progress)[-1].waiting_for == "disk")
        assert life.said(Progress)[-1].metrics["admission_paused"] == 1
        life.until(lambda: any(isinstance(message, Credit) for message in life.actor.heard))
        life.actor.sequence += 1
        life.actor.client.send(life.actor.message(), list(unroll_frames(5)))
        count = len(life.said(Progress))
        life.until(lambda: len(life.said(Progress)) > count + 2)
        assert {message.waiting_for for message in life.said(Progress)[count:]} == {"disk"}
        heard = life.actor.take(Acknowledged)
        assert max(message.sequence for message in heard) == admitted[1], "the last one waits in its socket"
    life.until(lambda: life.actor.take(Acknowledged))
    assert len(life.records(AdmissionPaused)) == len(life.records(AdmissionResumed)) == 1
    life.until(lambda: life.said(Progress)[-1].metrics["admission_paused"] == 0)
    assert (life.run_dir / "learner-0.reserve").stat().st_size == 4096


def test_a_pause_and_its_end_are_journaled_once_each(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", 4096)
    directory = tmp_path / "journal"
    with Journal(directory, owner="learner-0", run_id=RUN_ID, reserve=reserve) as journal:
        admission = Admission(journal, tmp_path)
        for _ in range(3):
            admission.look()
        assert (admission.is_paused, journal.next_position) == (False, 0)
        assert reserve.give_up()
        with pytest.MonkeyPatch.context() as context:
            context.setattr(files, "free_bytes", lambda path: 4096)
            for _ in range(3):
                admission.look()
                assert admission.is_paused
        for _ in range(3):
            admission.look()
            assert not admission.is_paused
        journal.sync()
        paused, resumed = read(directory)
        assert paused.header_as(AdmissionPaused).reason.startswith("the disk is full")
        assert resumed.header_as(AdmissionResumed).free_bytes > 0


def test_a_run_directory_can_be_moved_between_two_lives(life: Life, tmp_path: Path) -> None:
    """A backup that is restored elsewhere goes on: nothing in it names a place."""
    life.begin()
    life.until_ready()
    life.actor.hello()
    life.teach(5)
    digest = life.stop().checkpoint
    assert digest is not None
    shutil.copytree(life.run_dir, tmp_path / "elsewhere")
    with contextlib.ExitStack() as stack:
        moved = stack.enter_context(living(tmp_path / "elsewhere"))
        moved.number = 1
        moved.begin()
        moved.until_ready()
        (recovered,) = [record.header_as(LearnerRecovered) for record in moved.records(LearnerRecovered)]
        assert recovered.state_digest == digest.digest
