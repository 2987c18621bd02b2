"""The whole loop with real processes and small roles: a run, deaths, hangs, stops, and who is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from esper_simic.config import Config
from esper_simic.curriculum_facts import CoordinationMode, CurriculumRequest
from esper_simic.errors import ConfigError, UnavailableError
from supervisor import files
from supervisor.bus import Client, Received
from supervisor.clock import SystemClock
from supervisor.journal import read
from supervisor.loop import Observer, RunFacts
from supervisor.outcome import RunOutcome, fold_journal
from supervisor.processes import LocalPlacement
from supervisor.protocol import ACCEPTS, Command, CommandReply, Message, StatusReply, StatusRequest
from supervisor.run import run
from supervisor.state import Phase
from supervisor.vitals import Snapshot

CHILDREN = "tests.supervisor.children"
ROLES = {"learner": f"{CHILDREN}:echo", "actor": f"{CHILDREN}:echo", "evaluate": f"{CHILDREN}:evaluate"}
POLICIES = ("learned", "random")
DEADLINE_S = 20.0

pytestmark = pytest.mark.processes


def config(**supervisor: Any) -> Config:
    defaults = {"num_actors": 2, "max_seconds": 0.5, "evaluation_episodes": 3, "restart_backoff_s": 0.05}
    return Config.model_validate({"supervisor": defaults | supervisor})


def train(
    run_dir: Path, observer: Observer | None = None, roles: dict[str, str] | None = None, **supervisor: Any
) -> RunOutcome:
    facts = RunFacts(preset="test", config_text="", evaluation_policies=POLICIES)
    return run(
        run_dir,
        config(**supervisor),
        facts,
        clock=SystemClock(),
        observer=observer,
        roles=ROLES | (roles or {}),  # type: ignore[arg-type]
        preload=(),
    )


def kinds(run_dir: Path) -> list[str]:
    return [record.kind for record in read(run_dir / "journal" / "supervisor")]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record.header for record in read(run_dir / "journal" / "supervisor") if record.kind == kind]


def test_a_run_trains_evaluates_and_says_so_in_its_journal(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    outcome = train(tmp_path, seen.append)
    assert (outcome.exit_code, outcome.outcome) == (0, "finished")
    assert outcome.checkpoint is not None
    assert outcome.checkpoint.path == "checkpoints/last"
    assert {name: result.returns for name, result in outcome.evaluations.items()} == {
        "learned": (7.0, 7.0, 7.0),
        "random": (6.0, 6.0, 6.0),
    }
    journaled = kinds(tmp_path)
    assert journaled[0] == "RunStarted"
    assert journaled[-1] == "RunFinished"
    order = [
        "TrainingStarted",
        "TrainingEnded",
        "CheckpointReported",
        "EvaluationStarted",
        "EvaluationFinished",
    ]
    assert [kind for kind in journaled if kind in order] == order
    assert seen[-1].state == "finished"
    assert seen[-1].environment.steps > 0
    assert any(view.pid > 0 and view.memory_bytes > 2**20 for shot in seen for view in shot.processes)
    assert not (tmp_path / "supervisor.json").exists()


def test_the_same_directory_tells_its_outcome_again_without_running(tmp_path: Path) -> None:
    first = train(tmp_path)
    count = len(kinds(tmp_path))
    assert train(tmp_path) == first
    assert len(kinds(tmp_path)) == count


def test_training_ends_at_the_learners_environment_steps(tmp_path: Path) -> None:
    outcome = train(tmp_path, max_seconds=None, max_steps=50)
    assert outcome.checkpoint is not None
    assert outcome.checkpoint.environment_steps >= 50
    assert events(tmp_path, "TrainingEnded")[0]["reason"] == "max_steps"


def test_a_killed_actor_is_restarted_and_the_run_goes_on(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(snapshot: Snapshot) -> None:
        for view in snapshot.processes:
            if (
                snapshot.state == "training"
                and (view.role, view.index) == ("actor", 1)
                and not killed
                and view.pid
            ):
                killed.append(view.pid)
                os.kill(view.pid, signal.SIGKILL)

    outcome = train(tmp_path, kill_one, max_seconds=2.0)
    assert outcome.outcome == "finished"
    end = next(event for event in events(tmp_path, "ChildExited") if event["reason"] == "signal")
    assert (end["role"], end["index"], end["incarnation"]) == ("actor", 1, 1)
    ready = [
        (event["role"], event["index"], event["incarnation"]) for event in events(tmp_path, "ChildReady")
    ]
    assert ("actor", 1, 2) in ready


def test_an_actor_that_always_dies_fails_the_run_with_its_last_words(tmp_path: Path) -> None:
    outcome = train(
        tmp_path, roles={"actor": f"{CHILDREN}:die"}, max_restarts=1, num_actors=1, max_seconds=30
    )
    assert outcome.exit_code == 1
    assert "the disk is a teapot" in outcome.reason
    assert len(events(tmp_path, "ChildStarted")) == 3, "the learner, the actor and its one restart"


def test_a_dead_learner_fails_the_run_and_names_its_log(tmp_path: Path) -> None:
    outcome = train(tmp_path, roles={"learner": f"{CHILDREN}:die"}, max_seconds=30)
    assert outcome.exit_code == 1
    assert "logs/learner-0.log" in outcome.reason


def test_a_child_that_is_alive_but_does_nothing_leaves_its_stacks_and_is_replaced(tmp_path: Path) -> None:
    outcome = train(
        tmp_path,
        roles={"actor": f"{CHILDREN}:hang_in_a_named_place"},
        progress_timeout_s=0.5,
        max_restarts=0,
        max_seconds=30,
    )
    assert outcome.exit_code == 1
    asked = events(tmp_path, "ChildStopRequested")
    assert all("no progress" in event["reason"] for event in asked if event["role"] == "actor")
    for index in range(2):
        assert "wait_for_nobody" in (tmp_path / "stacks" / f"actor-{index}-1.txt").read_text()


def test_a_child_that_ignores_the_stop_is_killed_after_its_time(tmp_path: Path) -> None:
    outcome = train(
        tmp_path,
        roles={"actor": f"{CHILDREN}:ignore_stop"},
        stop_timeout_s=0.3,
        num_actors=1,
        max_seconds=0.3,
    )
    assert outcome.outcome == "finished", "the learner and the evaluation were not harmed"
    end = next(event for event in events(tmp_path, "ChildExited") if event["role"] == "actor")
    assert "sent by the supervisor" in end["detail"]


def test_a_second_supervisor_on_the_directory_is_refused(tmp_path: Path) -> None:
    with files.exclusive_lock(tmp_path / "lock"), pytest.raises(UnavailableError, match=str(os.getpid())):
        train(tmp_path)
    assert not (tmp_path / "journal").exists()


SUPERVISOR_SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from tests.supervisor.test_run_loop import train
    roles = {
        role: "tests.supervisor.children:" + name
        for role, name in zip(("actor", "learner"), sys.argv[2:], strict=True)
    }
    outcome = train(Path(sys.argv[1]), roles=roles, max_seconds=None)
    sys.exit(outcome.exit_code)
    """
)


class Remote:
    """A supervisor in a process of its own, and an operator's line to it."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.process, self.run_dir = process, run_dir

    def wait_for(self, phase: Phase) -> None:
        until(lambda: self._phase() is phase)

    def line(self) -> Client:
        address = msgspec.json.decode((self.run_dir / "supervisor.json").read_bytes())
        return Client(
            address["endpoint"],
            f"operator-{uuid.uuid4().hex}",
            run_id=address["run_id"],
            accepts=ACCEPTS["operator"],
            frame_bytes_max=2**20,
        )

    def ask(self, message: Message) -> Message:
        with self.line() as client:
            client.send(message)
            heard = client.receive(10_000)
        assert isinstance(heard, Received)
        return heard.message

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def _phase(self) -> Phase:
        assert self.process.poll() is None, "the supervisor ended early"
        return fold_journal(self.run_dir).phase


@contextmanager
def remote(run_dir: Path, actors: str = "echo", learner: str = "echo") -> Iterator[Remote]:
    command = [sys.executable, "-c", SUPERVISOR_SCRIPT, str(run_dir), actors, learner]
    # A session of its own stands for a terminal: a signal to the group reaches supervisor and children alike.
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    try:
        yield Remote(process, run_dir)
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def all_gone(tree: list[psutil.Process], within_s: float) -> bool:
    _, left = psutil.wait_procs(tree, timeout=within_s)
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_ctrl_c_saves_a_checkpoint_and_leaves_nothing_over(tmp_path: Path) -> None:
    with remote(tmp_path) as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        # A child that is not ready yet is not asked but killed: it has nothing to save.
        until(lambda: len(events(tmp_path, "ChildReady")) == 3)
        tree = supervisor.tree()
        assert len(tree) >= 4, "learner, two actors, fork server"
        os.killpg(supervisor.process.pid, signal.SIGINT)
        assert supervisor.process.wait(DEADLINE_S) == 0
        assert all_gone(tree, 1.0)
    state = fold_journal(tmp_path)
    assert state.phase is Phase.STOPPED
    assert state.checkpoint is not None
    assert {event["reason"] for event in events(tmp_path, "ChildExited")} == {"clean"}


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with remote(tmp_path, actors="ignore_stop") as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        tree = supervisor.tree()
        os.killpg(supervisor.process.pid, signal.SIGINT)
        supervisor.wait_for(Phase.STOPPING)
        os.killpg(supervisor.process.pid, signal.SIGINT)
        assert supervisor.process.wait(5.0) == 0
        assert all_gone(tree, 1.0)
    state = fold_journal(tmp_path)
    assert (state.phase, state.checkpoint) == (Phase.STOPPED, None)


def test_an_impatient_ctrl_c_does_not_interrupt_the_last_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over and the fork server is being put away when the signal comes."""
    close = LocalPlacement.close

    def close_interrupted(placement: LocalPlacement) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        close(placement)

    monkeypatch.setattr(LocalPlacement, "close", close_interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        outcome = train(tmp_path)
    except KeyboardInterrupt:
        pytest.fail("the signal was not taken any more")
    assert outcome.outcome == "finished"
    assert signal.getsignal(signal.SIGINT) is before


def test_kill_nine_of_the_supervisor_leaves_no_orphan_and_a_run_that_goes_on(tmp_path: Path) -> None:
    with remote(tmp_path) as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        tree = supervisor.tree()
        supervisor.process.kill()
        assert all_gone(tree, 5.0)
    run_id = events(tmp_path, "RunStarted")[0]["run_id"]
    assert (tmp_path / "supervisor.json").exists(), "it had no time to remove it"
    (tmp_path / "tmp").mkdir(exist_ok=True)
    (tmp_path / "tmp" / "left.py").touch()
    seen: list[Snapshot] = []

    def look(snapshot: Snapshot) -> None:
        seen.append(snapshot)
        assert not (tmp_path / "tmp" / "left.py").exists(), "what children left is removed at the start"

    outcome = train(tmp_path, look)
    assert (outcome.run_id, outcome.outcome) == (run_id, "finished")
    journaled = kinds(tmp_path)
    assert journaled.count("RunStarted") == journaled.count("RunResumed") == 1
    lives = [(e["role"], e["index"], e["incarnation"]) for e in events(tmp_path, "ChildScheduled")]
    assert lives == [
        *(("learner", 0, 1), ("actor", 0, 1), ("actor", 1, 1)),
        *(("learner", 0, 2), ("actor", 0, 2), ("actor", 1, 2)),
        *(("evaluate", 0, 1), ("evaluate", 1, 1)),
    ]
    assert {shot.resumes for shot in seen} == {1}
    assert not (tmp_path / "tmp").exists(), "and at a clean end"


def test_an_evaluation_that_failed_is_made_again_with_another_checkpoint(tmp_path: Path) -> None:
    mortal = {"evaluate": f"{CHILDREN}:evaluate_one_and_die"}
    assert train(tmp_path, roles=mortal, max_restarts=0, evaluation_workers=1).exit_code == 1
    assert len(events(tmp_path, "PolicyEvaluated")) == 1
    trained = events(tmp_path, "TrainingStarted")
    outcome = train(tmp_path, evaluation_workers=1)
    assert outcome.outcome == "finished"
    assert set(outcome.evaluations) == set(POLICIES)
    assert events(tmp_path, "TrainingStarted") == trained, "nothing is trained again"
    assert len(events(tmp_path, "CheckpointReported")) == 2
    assert [event["policy"] for event in events(tmp_path, "PolicyEvaluated")] == ["learned", *POLICIES]


def test_a_run_under_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    assert train(tmp_path, roles={"learner": f"{CHILDREN}:misconfigured"}).exit_code == 78
    count = len(kinds(tmp_path))
    with pytest.raises(ConfigError, match=r"supervisor\.lockstep was False, now True"):
        train(tmp_path, lockstep=True)
    assert len(kinds(tmp_path)) == count


def test_what_a_child_says_that_only_a_person_can_mend_is_the_reason(tmp_path: Path) -> None:
    outcome = train(tmp_path, roles={"learner": f"{CHILDREN}:misconfigured"}, max_seconds=30)
    assert (outcome.exit_code, outcome.outcome) == (78, "failed")
    log = tmp_path / "logs" / "learner-0.log"
    assert outcome.reason == (
        f"learner-0 cannot go on: configuration: environment.host: no such host; log: {log}"
    )
    learners = [event for event in events(tmp_path, "ChildStarted") if event["role"] == "learner"]
    assert len(learners) == 1, "it would say the same again"


def test_a_learner_killed_in_training_and_at_its_last_checkpoint_is_replaced_both_times(
    tmp_path: Path,
) -> None:
    killed: set[tuple[str, int]] = set()

    def kill(snapshot: Snapshot) -> None:
        for view in snapshot.processes:
            wanted = {"training": 1, "stopping": 2}.get(snapshot.state)
            is_there = view.role == "learner" and view.incarnation == wanted and view.state != "scheduled"
            if is_there and view.pid and (snapshot.state, view.pid) not in killed:
                killed.add((snapshot.state, view.pid))
                os.kill(view.pid, signal.SIGKILL)

    outcome = train(tmp_path, kill, roles={"actor": f"{CHILDREN}:leave_slowly"}, max_seconds=3.0)
    assert {state for state, _ in killed} == {"training", "stopping"}
    assert outcome.outcome == "finished"
    assert outcome.checkpoint is not None
    ready = [e["incarnation"] for e in events(tmp_path, "ChildReady") if e["role"] == "learner"]
    assert ready == [1, 2, 3]


def test_a_lock_that_cannot_be_taken_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(UnavailableError, match=r"cannot take the run directory .*Is a directory.*'lock'"):
        train(tmp_path)


def test_a_damaged_journal_of_the_supervisor_is_named_before_anything_starts(tmp_path: Path) -> None:
    train(tmp_path)
    segment = next((tmp_path / "journal" / "supervisor").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{segment.name} is damaged at byte \d+"):
        train(tmp_path)
    assert segment.read_bytes() == data


def wish(name: str, stage: str) -> Command:
    request = CurriculumRequest(
        request_id=name,
        stage=stage,
        difficulty=0.5,
        min_success_rate=0.5,
        min_episodes=1,
        max_episodes=2,
        mode=CoordinationMode.STRATEGY_DRIVEN,
        issued_at_s=0.0,
    )
    return Command(command_id=name, name="curriculum", request=request)


def test_an_operator_asks_something_of_the_curriculum_and_gets_the_learners_answer(tmp_path: Path) -> None:
    with remote(tmp_path, learner="answer_requests") as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        obeyed = supervisor.ask(wish("c1", "walk"))
        assert isinstance(obeyed, CommandReply)
        assert (obeyed.accepted, obeyed.reason) == (True, "")
        assert obeyed.reply is not None
        assert (obeyed.reply.stage, obeyed.reply.advanced) == ("walk", True)
        refused = supervisor.ask(wish("c2", "nowhere"))
        assert isinstance(refused, CommandReply)
        assert (refused.accepted, refused.reason) == (False, "there is none")
        assert supervisor.ask(wish("c1", "walk")) == msgspec.structs.replace(
            obeyed, position=refused.position
        )
        asked = [name for name in kinds(tmp_path) if name.startswith("Curriculum")]
        assert asked == ["CurriculumRequested", "CurriculumAnswered"] * 2
        supervisor.ask(Command(command_id="s", name="stop"))
        assert supervisor.process.wait(DEADLINE_S) == 0


def test_a_request_that_nobody_can_answer_any_more_is_refused(tmp_path: Path) -> None:
    with remote(tmp_path) as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        with supervisor.line() as client:
            client.send(wish("c1", "walk"))
            until(lambda: "CurriculumRequested" in kinds(tmp_path))
            supervisor.ask(Command(command_id="s", name="stop"))
            heard = client.receive(10_000)
        assert isinstance(heard, Received)
        assert isinstance(heard.message, CommandReply)
        assert "before the learner answered" in heard.message.reason
        assert supervisor.process.wait(DEADLINE_S) == 0


def test_an_operator_asks_for_the_status_and_for_the_end(tmp_path: Path) -> None:
    with remote(tmp_path) as supervisor:
        supervisor.wait_for(Phase.TRAINING)
        reply = supervisor.ask(StatusRequest())
        assert isinstance(reply, StatusReply)
        assert reply.snapshot["state"] == "training"
        assert reply.snapshot["schema"] == 1
        roles = sorted(view["role"] for view in reply.snapshot["processes"])
        assert roles == ["actor", "actor", "learner"]
        refused = supervisor.ask(Command(command_id="c1", name="dance"))
        assert isinstance(refused, CommandReply)
        assert (refused.accepted, refused.reason) == (
            False,
            "unknown command 'dance'; known: stop, curriculum",
        )
        accepted = supervisor.ask(Command(command_id="c2", name="stop"))
        assert isinstance(accepted, CommandReply)
        assert accepted.accepted
        journaled = list(read(tmp_path / "journal" / "supervisor"))
        assert any(r.kind == "StopRequested" and r.position <= accepted.position for r in journaled)
        assert supervisor.process.wait(DEADLINE_S) == 0
