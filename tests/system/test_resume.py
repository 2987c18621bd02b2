"""One run and all that befalls it: every process dies or hangs once, its supervisor dies, is stopped, dies measuring.

It is told in order, because one run that survives everything is the point. The tests look at what it left.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from esper_simic.events import CheckpointSaved, ExperienceAdmitted, LearnerRecovered, LearnerStepped
from supervisor import checkpoints
from supervisor.cli import EVALUATED
from supervisor.journal import Record, read
from supervisor.vitals import ProcessView, Snapshot
from tests.system.driver import (
    DEADLINE_S,
    START_DEADLINE_S,
    Running,
    alive_after,
    is_ready,
    left_after,
    running,
    say,
    until,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

ACTORS = 2
POLICIES = list(EVALUATED)
COMMAND = {
    "supervisor__num_actors": ACTORS,
    "supervisor__restart_backoff_s": 0.05,
    "supervisor__max_restarts": 20,
    "supervisor__max_seconds": 3600.0,
    "supervisor__checkpoint_interval_steps": 10,
}
"""The same command each time it is given again."""

HANGS_AFTER_S = 15.0

MEASURE = COMMAND | {"supervisor__max_steps": 200, "supervisor__evaluation_episodes": 24}


@dataclass
class Story:
    """What was seen, in order; what became of a process by the name of what befell it."""

    run_dir: Path
    before: dict[str, list[ProcessView]] = field(default_factory=dict)
    after: dict[str, list[ProcessView]] = field(default_factory=dict)
    not_gone: list[psutil.Process] = field(default_factory=list)
    died: Snapshot | None = None
    gone_on: Snapshot | None = None
    stop_code: int = -1
    stop_output: str = ""
    killed_measuring: Snapshot | None = None
    measured_before: int = 0
    last_code: int = -1
    last_output: str = ""
    left: list[psutil.Process] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    told = Story(tmp_path_factory.mktemp("survivor") / "run")
    with running(told.run_dir, **COMMAND, supervisor__progress_timeout_s=HANGS_AFTER_S) as run:
        run.until_it_learns(ACTORS)
        _befall(told, run, "learner killed", lambda: os.kill(pid_of(run, "learner"), signal.SIGKILL))
        _befall(told, run, "actor stopped", lambda: os.kill(pid_of(run, "actor"), signal.SIGSTOP))
        _befall(told, run, "learner stopped", lambda: os.kill(pid_of(run, "learner"), signal.SIGSTOP))
        _befall(told, run, "fork server killed", lambda: helper(run, "forkserver").kill())
        helper(run, "resource_tracker").kill()
        _befall(told, run, "tracker and learner killed", lambda: os.kill(pid_of(run, "learner"), 9))
        tree = run.tree()
        run.process.kill()
        told.not_gone = alive_after(tree, 5.0)
    with running(told.run_dir, **COMMAND) as run:
        run.until_it_learns(ACTORS)
        told.gone_on = run.until(lambda shot: shot.learner.step > shot.learner.before + 3, "updates")
        run.process.send_signal(signal.SIGTERM)
        told.stop_code = run.process.wait(DEADLINE_S)
        told.stop_output = run.output
    with running(told.run_dir, **MEASURE) as run:
        told.killed_measuring = run.until(
            lambda shot: shot.state == "evaluating" and shot.evaluated, "a policy measured", START_DEADLINE_S
        )
        run.process.kill()
        run.process.wait(DEADLINE_S)
        told.measured_before = len(events(told, "supervisor", "PolicyEvaluated"))
    with running(told.run_dir, **MEASURE) as run:
        told.last_code = run.process.wait(START_DEADLINE_S)
        told.last_output = run.output
        told.left = left_after(run.process.pid)
    return told


def pid_of(run: Running, role: str) -> int:
    shot = run.snapshot()
    assert shot is not None
    return next(view.pid for view in shot.processes if (view.role, view.index) == (role, 0))


def helper(run: Running, name: str) -> psutil.Process:
    """The fork server or the resource tracker of a run."""
    return next(
        one
        for one in psutil.Process(run.process.pid).children()
        if name in " ".join(one.cmdline()) and "spawn_main" not in " ".join(one.cmdline())
    )


def _befall(told: Story, run: Running, what: str, blow: Callable[[], None]) -> None:
    """Strike, and wait until all are ready again, one of them anew, and updates are made of their new unrolls."""
    before = run.snapshot()
    assert before is not None
    told.before[what] = before.processes
    lives = {(view.role, view.index): view.incarnation for view in before.processes}
    blow()
    back = run.until(
        lambda shot: (
            any(view.incarnation > lives[view.role, view.index] for view in shot.processes)
            and all(is_ready(view, view.role) for view in shot.processes)
        ),
        f"everybody ready after: {what}",
        START_DEADLINE_S,
    )
    told.after[what] = back.processes
    heard = Counter((e.actor, e.incarnation) for e in admitted(told))
    present = {(view.index, view.incarnation) for view in back.processes if view.role == "actor"}
    until(
        lambda: all(
            Counter((e.actor, e.incarnation) for e in admitted(told))[one] > heard[one] for one in present
        ),
        f"unrolls of every actor after: {what}",
    )
    run.until(lambda shot: shot.learner.step > back.learner.step + 1, f"updates after: {what}")


def records(told: Story, owner: str, kind: str = "") -> list[Record]:
    return [record for record in read(told.run_dir / "journal" / owner) if kind in ("", record.kind)]


def events(told: Story, owner: str, kind: str) -> list[dict[str, object]]:
    return [record.header for record in records(told, owner, kind)]


def admitted(told: Story) -> list[ExperienceAdmitted]:
    return [r.header_as(ExperienceAdmitted) for r in records(told, "learner-0", "ExperienceAdmitted")]


def replaced(told: Story, what: str) -> list[str]:
    """Whose lives are others after something befell the run."""
    before = {(view.role, view.index): view.incarnation for view in told.before[what]}
    return [
        f"{view.role}-{view.index}"
        for view in told.after[what]
        if view.incarnation > before[view.role, view.index]
    ]


# -- what became of whom -----------------------------------------------------------------------------------------------


def test_a_killed_learner_is_replaced_and_no_actor_with_it(story: Story) -> None:
    assert replaced(story, "learner killed") == ["learner-0"]


def test_an_actor_that_is_stopped_is_noticed_and_replaced_alone(story: Story) -> None:
    assert replaced(story, "actor stopped") == ["actor-0"]


def test_a_learner_that_is_stopped_is_noticed_and_nobody_is_blamed_for_waiting(story: Story) -> None:
    assert replaced(story, "learner stopped") == ["learner-0"]


def test_a_killed_fork_server_is_made_anew_with_all_its_children(story: Story) -> None:
    assert replaced(story, "fork server killed") == ["actor-0", "actor-1"]
    assert {view.restarts > 0 for view in story.after["fork server killed"]} == {True}


def test_a_killed_resource_tracker_keeps_nobody_from_being_replaced(story: Story) -> None:
    assert replaced(story, "tracker and learner killed") == ["learner-0"]


def test_what_hung_was_told_apart_from_what_died(story: Story) -> None:
    asked = events(story, "supervisor", "ChildStopRequested")
    hung = [(event["role"], event["index"]) for event in asked if "no progress" in str(event["reason"])]
    # On a very busy machine a new actor may need longer for its first unroll than it has here.
    assert hung[:2] == [("actor", 0), ("learner", 0)]


def test_kill_nine_of_the_supervisor_leaves_nobody(story: Story) -> None:
    assert story.not_gone == []


# -- what the journals hold --------------------------------------------------------------------------------------------


def test_every_update_was_made_once_and_in_order(story: Story) -> None:
    steps = [r.header_as(LearnerStepped).step for r in records(story, "learner-0", "LearnerStepped")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 30


def test_no_unroll_was_taken_twice(story: Story) -> None:
    seen = Counter((event.actor, event.incarnation, event.sequence) for event in admitted(story))
    assert [one for one, count in seen.items() if count > 1] == []


def test_no_life_of_a_child_was_lived_twice(story: Story) -> None:
    scheduled = events(story, "supervisor", "ChildScheduled")
    lives = [(event["role"], event["index"], event["incarnation"]) for event in scheduled]
    assert len(lives) == len(set(lives))


def test_every_recovery_was_exact_and_began_at_a_checkpoint(story: Story) -> None:
    recovered = [r.header_as(LearnerRecovered) for r in records(story, "learner-0", "LearnerRecovered")]
    # Three in the first supervisor's time, one in each of the two after it that trained.
    assert len(recovered) == 5
    assert all(event.is_exact for event in recovered), recovered
    assert [event.checkpoint != "" for event in recovered[1:]] == [True] * 4
    # A learner that dies between a checkpoint's rename and `CheckpointSaved` leaves one that does not count.
    reasons = {why for event in recovered for why in event.passed_over.values()}
    assert reasons <= {"no CheckpointSaved in the journal names it"}


def test_the_run_is_one_run(story: Story) -> None:
    (started,) = events(story, "supervisor", "RunStarted")
    resumed = events(story, "supervisor", "RunResumed")
    assert [event["goes_on"] for event in resumed] == ["training", "training", "evaluation"]
    assert story.gone_on is not None
    assert (story.gone_on.run_id, story.gone_on.resumes) == (started["run_id"], 1)
    assert f"going on with run {started['run_id']}" in story.last_output


def test_the_journals_are_whole(story: Story) -> None:
    verified = say("log", "verify", story.run_dir)
    assert verified.code == 0, verified.out
    assert verified.out.count(": sound") == 2


# -- what an operator sees ---------------------------------------------------------------------------------------------


def test_a_run_that_went_on_shows_its_whole_past_and_counts_from_there(story: Story) -> None:
    assert story.gone_on is not None
    assert story.gone_on.learner.before > 10
    assert story.gone_on.environment.steps > story.gone_on.environment.before > 0
    assert {view.restarts for view in story.gone_on.processes} == {0}
    assert story.gone_on.troubles == []


def test_sigterm_ends_with_a_checkpoint_and_says_so(story: Story) -> None:
    assert story.stop_code == 0, story.stop_output
    assert "stopped: stopped by SIGTERM" in story.stop_output
    stopped, _ = events(story, "supervisor", "CheckpointReported")
    saved = [r.header_as(CheckpointSaved) for r in records(story, "learner-0", "CheckpointSaved")]
    assert Path(str(stopped["path"])).name in {event.directory for event in saved}


def test_a_limit_of_steps_counted_the_invocation_that_named_it(story: Story) -> None:
    (ended,) = [e for e in events(story, "supervisor", "TrainingEnded") if e["reason"] == "max_steps"]
    ready = [e for e in events(story, "supervisor", "ChildReady") if e["role"] == "learner"]
    before = [event for event in ready if event["at_s"] < ended["at_s"]][-1]  # type: ignore[operator]
    last = events(story, "supervisor", "CheckpointReported")[-1]
    made = int(str(last["environment_steps"])) - int(str(before["environment_steps"]))
    assert 200 <= made < 200 + 600


def test_an_evaluation_that_was_cut_short_goes_on_where_it_was(story: Story) -> None:
    assert story.last_code == 0, story.last_output
    assert story.left == []
    measured = [event["policy"] for event in events(story, "supervisor", "PolicyEvaluated")]
    assert sorted(map(str, measured)) == sorted(POLICIES), "each once"
    assert 1 <= story.measured_before < len(POLICIES)
    assert all(f"| {policy} " in story.last_output for policy in POLICIES)
    assert len(events(story, "supervisor", "TrainingStarted")) == 3, "the last one only measured"


def test_the_scalars_of_all_its_lives_are_one_curve(story: Story) -> None:
    directory = story.run_dir / "tensorboard"
    assert len(list(directory.iterdir())) == 3, "one file for each that trained"
    scalars = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    points = scalars.Scalars("losses/policy_loss")
    steps = [point.step for point in points]
    assert steps == sorted(set(steps))
    last = records(story, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert steps[-1] == last.environment_steps
    assert steps[0] < last.environment_steps / 3, "the first life is still there"


def test_afterwards_the_status_tells_of_all_of_it(story: Story) -> None:
    said = say("status", story.run_dir, "--json")
    assert said.code == 3
    shown = said.json()
    assert (shown["state"], shown["resumes"]) == ("finished", 3)
    last = records(story, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert shown["learner"]["step"] == last.step
    assert shown["learner"]["metrics"]["checkpoint.step"] == last.step
    newest = checkpoints.list_checkpoints(story.run_dir / "checkpoints")[-1]
    assert isinstance(newest, checkpoints.GoodCheckpoint)
    assert newest.manifest.step == last.step
    assert not (story.run_dir / "tmp").exists()
