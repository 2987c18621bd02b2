"""One living run and what befalls it: looks at it, strangers' bytes, a rival, a killed actor, Ctrl-C."""

from __future__ import annotations

import os
import signal
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from esper_simic.events import CheckpointSaved, ExperienceAdmitted
from supervisor import checkpoints
from supervisor.journal import read
from supervisor.vitals import Snapshot
from tests.system.driver import Running, Said, alive_after, is_ready, left_after, running, say, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ACTORS = 2


@dataclass
class Story:
    """What was seen, in order."""

    run_dir: Path
    learning: Snapshot
    supervisor_pid: int
    rival: Said
    statuses: dict[str, Said]
    after_garbage: Snapshot | None = None
    steps_at_garbage: int = 0
    killed_pid: int = 0
    after_kill: Snapshot | None = None
    exit_code: int = -1
    output: str = ""
    not_gone: list[psutil.Process] = field(default_factory=list)
    session_left: list[psutil.Process] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    run_dir = tmp_path_factory.mktemp("living") / "run"
    with running(run_dir, supervisor__num_actors=ACTORS, supervisor__restart_backoff_s=0.05) as run:
        told = Story(
            run_dir,
            learning=run.until_it_learns(ACTORS),
            supervisor_pid=run.process.pid,
            rival=say("run", "--run-dir", run_dir),
            statuses={
                "status --json": say("status", run_dir, "--json"),
                "status": say("status", run_dir),
                "is-healthy": say("is-healthy", run_dir),
            },
        )
        _throw_garbage(run, told)
        _kill_an_actor(run, told)
        tree = run.tree()
        run.interrupt()
        told.exit_code = run.process.wait(60)
        told.not_gone = alive_after(tree, 5.0)
        told.session_left = left_after(run.process.pid)
        told.output = run.output
    return told


def _throw_garbage(run: Running, told: Story) -> None:
    context = zmq.Context()
    for name in ("control", "experience"):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 5_000)
        socket.connect(run.endpoint(name))
        socket.send_multipart([b"\xff" * 40, b"\x00", uuid.uuid4().bytes])
        socket.send(b"x")
        socket.close()
    context.term()
    heard = run.until(
        lambda shot: (
            sum(shot.refused_messages.values()) >= 2
            and sum(
                count for name, count in shot.learner.metrics.items() if name.startswith("refused.frame.")
            )
            >= 2
        ),
        "refused garbage",
    )
    told.steps_at_garbage = heard.learner.step
    told.after_garbage = run.until(
        lambda shot: shot.learner.step > heard.learner.step + 2, "updates after garbage"
    )


def _kill_an_actor(run: Running, told: Story) -> None:
    before = run.snapshot()
    assert before is not None
    told.killed_pid = next(view.pid for view in before.processes if (view.role, view.index) == ("actor", 1))
    os.kill(told.killed_pid, signal.SIGKILL)
    run.until(
        lambda shot: any(
            view.index == 1 and is_ready(view, "actor", incarnation=2) for view in shot.processes
        ),
        "the actor's next life",
    )
    until(
        lambda: any((e.actor, e.incarnation) == (1, 2) for e in admitted(told.run_dir)),
        "an unroll of its next life",
    )
    heard = run.snapshot()
    assert heard is not None
    told.after_kill = run.until(
        lambda shot: shot.learner.step > heard.learner.step + 5, "updates after the kill"
    )


def test_status_json_has_its_schema_while_the_run_lives(story: Story) -> None:
    said = story.statuses["status --json"]
    assert said.code == 0, said.err
    shown = said.json()
    assert shown["schema"] == 1
    assert shown["state"] == "training"
    assert shown["learner"]["step"] >= story.learning.learner.step >= 2
    assert shown["environment"]["steps"] >= story.learning.environment.steps > 0
    assert sorted((view["role"], view["index"]) for view in shown["processes"]) == [
        ("actor", 0),
        ("actor", 1),
        ("learner", 0),
    ]
    for view in shown["processes"]:
        assert view["pid"] > 1
        assert view["memory_bytes"] > 20 * 2**20, "a process with torch in it"


def test_a_person_sees_the_same_and_a_script_may_ask_whether_it_is_healthy(story: Story) -> None:
    page = story.statuses["status"]
    assert page.code == 0, page.err
    assert all(word in page.out for word in ("training", "actor-0", "actor-1", "learner-0"))
    healthy = story.statuses["is-healthy"]
    assert (healthy.code, healthy.out.split(":")[0]) == (0, "healthy")


def test_a_second_supervisor_on_the_directory_is_refused_and_told_who_holds_it(story: Story) -> None:
    assert story.rival.code == 1
    assert f"process {story.supervisor_pid} " in story.rival.err
    assert len(story.rival.err.splitlines()) == 1, "a sentence, not a trace"


def test_garbage_is_refused_counted_in_the_status_and_changes_nothing(story: Story) -> None:
    assert story.after_garbage is not None
    assert story.after_garbage.refused_messages == {"checksum": 1, "truncated": 1}
    counted = story.after_garbage.learner.metrics
    assert (counted["refused.frame.checksum"], counted["refused.frame.truncated"]) == (1.0, 1.0)
    assert story.after_garbage.state == "training"
    assert story.after_garbage.learner.step > story.steps_at_garbage
    learners = [view for view in story.after_garbage.processes if view.role == "learner"]
    assert [view.restarts for view in learners] == [0]


def test_a_killed_actor_comes_back_and_the_run_goes_on(story: Story) -> None:
    assert story.after_kill is not None
    (view,) = [view for view in story.after_kill.processes if (view.role, view.index) == ("actor", 1)]
    assert (view.incarnation, view.restarts) == (2, 1)
    assert view.pid != story.killed_pid
    exits = [r.header for r in read(story.run_dir / "journal" / "supervisor") if r.kind == "ChildExited"]
    killed = [event for event in exits if event["reason"] != "clean"]
    assert [(event["role"], event["index"], event["incarnation"]) for event in killed] == [("actor", 1, 1)]
    assert "SIGKILL" in killed[0]["detail"]


def admitted(run_dir: Path) -> list[ExperienceAdmitted]:
    records = read(run_dir / "journal" / "learner-0")
    return [r.header_as(ExperienceAdmitted) for r in records if r.kind == "ExperienceAdmitted"]


def test_the_next_life_is_heard_and_repeats_no_episode_of_the_one_before(story: Story) -> None:
    events = admitted(story.run_dir)
    lives = {life: [e for e in events if (e.actor, e.incarnation) == (1, life)] for life in (1, 2)}
    assert lives[1], "the first life was heard"
    assert lives[2], "the second life was heard"
    for lane in range(4):
        reached = max(event.episode_numbers[lane] for event in lives[1])
        assert min(event.episode_numbers[lane] for event in lives[2]) > reached
    for life in lives.values():
        sequences = [event.sequence for event in life]
        assert sequences == sorted(set(sequences))


def test_ctrl_c_leaves_a_checkpoint_and_no_process(story: Story) -> None:
    assert story.exit_code == 0, story.output
    assert story.not_gone == []
    assert story.session_left == []
    saved = list(read(story.run_dir / "journal" / "learner-0"))[-1]
    assert saved.kind == "CheckpointSaved"
    event = saved.header_as(CheckpointSaved)
    manifest, files = checkpoints.load(story.run_dir / "checkpoints" / event.directory)
    assert (manifest.step, manifest.state_digest) == (event.step, event.state_digest)
    assert manifest.step >= (story.after_kill.learner.step if story.after_kill else 0)
    assert set(files) == {"state.safetensors", "numbers.json"}
    assert event.directory in story.output
    assert not (story.run_dir / "supervisor.json").exists()


def test_after_ctrl_c_the_journals_are_whole_and_the_files_tell_of_it(story: Story) -> None:
    verified = say("log", "verify", story.run_dir)
    assert verified.code == 0, verified.out
    assert verified.out.count("sound") == 2
    assert "torn" not in verified.out
    said = say("status", story.run_dir, "--json")
    assert said.code == 3
    snapshot = msgspec.convert(said.json(), Snapshot)
    assert (snapshot.state, snapshot.reason) == ("stopped", "stopped by SIGINT")
    assert all(view.pid == 0 for view in snapshot.processes)
