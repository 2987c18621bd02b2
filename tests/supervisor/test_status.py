"""What a run looks like from outside: from hand-made journals, from a living supervisor, from a silent one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.events import CheckpointSaved
from supervisor import checkpoints, status
from supervisor.events import ExitReason, TrainingStarted
from supervisor.files import exclusive_lock
from supervisor.journal import JournalDamage
from supervisor.protocol import Command, CommandReply, Message, StatusReply, StatusRequest
from supervisor.state import Phase
from supervisor.status import Health
from supervisor.vitals import Snapshot, Vitals
from tests.supervisor.recorded_runs import (
    admitted,
    failed,
    failed_step,
    finished,
    record,
    record_learner,
    refused,
    stepped,
    stopped,
    supervised,
    training,
)
from tests.supervisor.worlds import LEARNER, World, actor, evaluator, learner

SHORT_MS = 200


def seen(world: World) -> Snapshot:
    """What a living supervisor would say."""
    return Vitals().snapshot(
        world.state, now_s=world.now_s, run_dir="/r", config=world.config, memory_bytes={}, refused={}
    )


# From the files alone


@pytest.mark.parametrize(
    ("world", "state", "health", "reason"),
    [
        (finished, "finished", Health.ENDED, "the run is complete"),
        (stopped, "stopped", Health.ENDED, "stopped by SIGTERM"),
        (failed, "failed", Health.FAILED, "every learner was given up; last seen: learner-0 error: exit"),
        (training, "died", Health.FAILED, "gone without a last word; by its journal the run was training"),
    ],
)
def test_the_journal_tells_how_a_run_ended(
    tmp_path: Path, world: Callable[[], World], state: str, health: Health, reason: str
) -> None:
    shot = status.observe(record(tmp_path, world().events))
    assert (shot.state, status.health(shot)) == (state, health)
    assert reason in shot.reason
    assert (shot.run_id, shot.preset, shot.run_dir) == ("run-1", "digits", str(tmp_path))


def test_a_finished_run_tells_its_checkpoint_times_and_policies(tmp_path: Path) -> None:
    shot = status.observe(record(tmp_path, finished().events))
    assert shot.checkpoint == "checkpoints/7"
    assert (shot.elapsed_s, shot.training_elapsed_s) == (63.0, 60.0)
    assert shot.evaluated == shot.to_evaluate == ["learned", "random", "never-grow"]


def test_a_run_whose_supervisor_died_is_as_old_as_its_learners_last_record(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    record_learner(run_dir, (20.0, stepped(1, 320)), (43.0, stepped(2, 640)))
    (run_dir / "lock").write_text("1\n")
    shot = status.observe(run_dir)
    assert shot.state == status.DIED
    assert (shot.elapsed_s, shot.training_elapsed_s) == (43.0, 40.0)
    assert [(process.role, process.index, process.pid, process.state) for process in shot.processes] == [
        ("actor", 0, 0, "lost"),
        ("actor", 1, 0, "lost"),
        ("learner", 0, 0, "lost"),
    ]


def test_steps_are_those_of_the_learners_journal_also_after_its_last_update(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    record_learner(
        run_dir,
        (4.0, admitted(10, 32)),
        (5.0, stepped(1, 320)),
        (6.0, admitted(10, 32)),
        (7.0, stepped(2, 640)),
        (8.0, admitted(10, 32)),
        (9.0, refused(320)),
    )
    shot = status.observe(run_dir)
    assert (shot.learner.step, shot.learner.metrics) == (2, {"entropy": 1.5})
    assert shot.environment.steps == 640 + 320 + 320
    assert shot.elapsed_s == 9.0


@pytest.mark.parametrize("made", [1, 0])
def test_an_update_that_failed_counts_and_metrics_are_those_of_the_last_that_was_made(
    tmp_path: Path, made: int
) -> None:
    run_dir = record(tmp_path, training().events)
    before = [(4.0 + step, stepped(step, 320 * step)) for step in range(1, made + 1)]
    record_learner(run_dir, *before, (7.0, failed_step(made + 1, 640)), (8.0, admitted(10, 32)))
    shot = status.observe(run_dir)
    assert (shot.learner.step, shot.environment.steps) == (made + 1, 640 + 320)
    assert shot.learner.metrics == ({"entropy": 1.5} if made else {})


def test_steps_admitted_before_the_first_update_count(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    record_learner(run_dir, (4.0, admitted(10, 32)), (5.0, admitted(10, 32)))
    shot = status.observe(run_dir)
    assert (shot.learner.step, shot.environment.steps) == (0, 640)


@pytest.mark.parametrize("make", [None, "", "journal", "journal/supervisor"])
def test_a_directory_without_a_run_is_said_to_hold_none(tmp_path: Path, make: str | None) -> None:
    run_dir = tmp_path / "run"
    if make is not None:
        (run_dir / make).mkdir(parents=True)
    with pytest.raises(UnavailableError, match="holds no run"):
        status.observe(run_dir)


def test_a_damaged_journal_is_not_read_over(tmp_path: Path) -> None:
    run_dir = record(tmp_path, finished().events)
    segment = next((run_dir / "journal" / "supervisor").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(JournalDamage, match=segment.name):
        status.observe(run_dir)


def test_a_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    first, *others = training().events
    old = msgspec.structs.replace(first, config={"supervisor": {"actors": 2}})
    with pytest.raises(ConfigError, match=r"supervisor\.actors: unknown key"):
        status.observe(record(tmp_path, [old, *others]))


# Who lives there


def test_a_stale_address_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = record(tmp_path, training().events)
    with supervised(run_dir, lambda _: None):
        pass
    assert (run_dir / "supervisor.json").exists()
    monkeypatch.setattr(status, "Client", None)
    assert status.observe(run_dir).state == status.DIED


def test_a_living_supervisors_own_picture_comes_first(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    live = msgspec.structs.replace(seen(training()), elapsed_s=123.0)

    def answer(message: Message) -> Message:
        assert isinstance(message, StatusRequest)
        return StatusReply(snapshot=msgspec.to_builtins(live))

    with supervised(run_dir, answer):
        assert status.observe(run_dir) == live


def test_a_supervisor_of_another_version_is_named(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    with supervised(run_dir, lambda _: StatusReply(snapshot={"state": "training"})):
        with pytest.raises(ContractError, match="is of another version"):
            status.observe(run_dir)


def test_a_silent_supervisor_is_not_called_healthy(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    record_learner(run_dir, (9.0, stepped(5, 160)))
    with supervised(run_dir, lambda _: None):
        shot = status.observe(run_dir, timeout_ms=SHORT_MS)
    assert (shot.state, shot.learner.step, shot.environment.steps) == (status.SILENT, 5, 160)
    assert "lives but does not answer; by its journal the run is training" in shot.reason
    assert status.health(shot) is Health.DEGRADED
    assert [process.state for process in shot.processes] == ["ready"] * 3


def test_a_supervisor_at_its_very_end_does_not_answer_and_need_not(tmp_path: Path) -> None:
    run_dir = record(tmp_path, finished().events)
    with exclusive_lock(run_dir / "lock"):
        assert status.observe(run_dir).state == "finished"


def test_an_address_that_is_being_written_is_none(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    (run_dir / "supervisor.json").write_text('{"pid": 1')
    with exclusive_lock(run_dir / "lock"):
        assert status.ask(run_dir, StatusRequest()) is None


def test_looking_at_the_lock_leaves_it_alone(tmp_path: Path) -> None:
    assert not status.is_supervised(tmp_path)
    lock = tmp_path / "lock"
    lock.write_text("4711\n")
    os.utime(lock, ns=(1, 1))
    assert not status.is_supervised(tmp_path)
    assert (lock.read_text(), lock.stat().st_mtime_ns) == ("4711\n", 1)
    with exclusive_lock(lock):
        assert status.is_supervised(tmp_path)
    exclusive_lock(lock).close()


def test_two_who_look_at_once_do_not_see_each_other(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not status.is_supervised(tmp_path)


def test_a_lock_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("lock")
    with pytest.raises(UnavailableError, match="cannot look into"):
        status.is_supervised(tmp_path)


def test_the_newest_run_is_the_one_whose_supervisor_was_started_last(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no run under"):
        status.newest_run(tmp_path / "none")
    (tmp_path / "not-a-run").mkdir()
    with pytest.raises(UnavailableError, match="no run under"):
        status.newest_run(tmp_path)
    for name, started_ns in (("b", 3), ("a", 7), ("c", 5)):
        record(tmp_path / name, training().events)
        os.utime(tmp_path / name / "journal" / "supervisor" / "writer.lock", ns=(started_ns, started_ns))
    status.observe(tmp_path / "c")
    assert status.newest_run(tmp_path) == tmp_path / "a"


# Commands


def test_a_command_is_answered_by_the_supervisor(tmp_path: Path) -> None:
    reply = CommandReply(command_id="7", accepted=True, reason="", position=3)
    with supervised(tmp_path, lambda _: reply) as heard:
        assert status.command(tmp_path, "stop", "7") == reply
    assert heard == [Command(command_id="7", name="stop")]


def test_a_command_to_nobody_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no supervisor answers in"):
        status.command(tmp_path, "stop", "7")


# A run that went on


def checkpoint(run_dir: Path, step: int, position: int, run_id: str = "run-1") -> str:
    manifest = {
        "run_id": run_id,
        "step": step,
        "environment_steps": 10 * step,
        "journal_position": position,
        "state_digest": "d",
        "fingerprint": {},
    }
    return checkpoints.save(run_dir / "checkpoints", {"state.safetensors": b"x"}, manifest).name


def saved(step: int, directory: str) -> CheckpointSaved:
    return CheckpointSaved(
        step=step, environment_steps=10 * step, directory=directory, state_digest="d", files={}
    )


def test_the_last_checkpoint_that_counts_is_told_with_its_age(tmp_path: Path) -> None:
    """The newest has its name, and no `CheckpointSaved`: its learner died in between."""
    run_dir = record(tmp_path, training().events)
    for step, run_id in ((1, "run-1"), (2, "run-1"), (9, "another")):
        checkpoint(run_dir, step, position=2 * (step - 1), run_id=run_id)
    record_learner(
        run_dir, (4.0, stepped(1, 10)), (5.0, saved(1, "step-000000000001")), (45.0, stepped(2, 20))
    )
    (run_dir / "checkpoints" / "step-000000000003").mkdir()
    metrics = status.observe(run_dir).learner.metrics
    assert (metrics["checkpoint.step"], metrics["checkpoint.age_s"]) == (1.0, 40.0)
    assert metrics["entropy"] == 1.5


def test_a_run_without_a_checkpoint_tells_of_none(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    record_learner(run_dir, (4.0, stepped(1, 10)))
    assert "checkpoint.step" not in status.observe(run_dir).learner.metrics


def test_a_run_that_was_resumed_and_died_again_is_as_old_as_its_last_supervisor(tmp_path: Path) -> None:
    world = training()
    world.resume()
    world.now_s = 2.0
    world.train(learner_step=3, environment_steps=30)
    run_dir = record(tmp_path, world.events)
    # The second supervisor began at 1000 s by the wall clock.
    record_learner(run_dir, (20.0, stepped(3, 30)), (1012.0, stepped(4, 40)))
    shot = status.observe(run_dir)
    assert (shot.elapsed_s, shot.training_elapsed_s, shot.resumes) == (12.0, 10.0, 1)
    assert (shot.learner.step, shot.learner.before) == (4, 3)
    assert (shot.environment.steps, shot.environment.before) == (40, 30)


def test_damage_to_the_learners_journal_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    run_dir = record(tmp_path, failed().events)
    record_learner(run_dir, (1.0, stepped(1, 10)), (2.0, stepped(2, 20)))
    segment = next((run_dir / "journal" / "learner-0").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    shot = status.observe(run_dir)
    assert (shot.state, status.health(shot)) == ("failed", Health.FAILED)
    (trouble,) = shot.troubles
    assert segment.name in trouble


# Health


def test_a_run_on_a_full_disk_is_degraded_and_says_so() -> None:
    shot = msgspec.structs.replace(seen(training()), troubles=["the disk is full"])
    assert status.health(shot) is Health.DEGRADED
    assert status.worries(shot) == ["the disk is full"]
    over = msgspec.structs.replace(shot, state="stopping")
    assert status.health(over) is Health.STOPPING


def test_a_learner_on_its_way_back_is_a_degradation_and_named() -> None:
    world = training()
    world.gone(LEARNER, ExitReason.SIGNAL, "SIGKILL")
    assert status.worries(seen(world)) == ["learner-0 is scheduled again"]
    world.wait(1)
    world.spawn()
    assert status.worries(seen(world)) == ["learner-0 is started again"]
    world.ready(learner(2))
    assert status.health(seen(world)) is Health.RUNNING


def test_a_run_that_was_resumed_is_no_worse_for_it() -> None:
    world = training()
    world.gone(actor(0), ExitReason.SIGNAL)
    world.resume()
    world.spawn()
    world.ready(learner(2), actor(0, 3))
    assert world.state.phase is Phase.TRAINING
    assert status.health(seen(world)) is Health.RUNNING, "the other actor starts late, as in any run"


def test_a_run_is_healthy_from_its_first_training_second_to_the_end_of_its_evaluation() -> None:
    world = World(max_seconds=60.0)
    health = [status.health(seen(world))]
    world.train()
    health.append(status.health(seen(world)))
    world.wait(60.0, learner=60.0, actor=60.0)
    health.append(status.health(seen(world)))
    world.end_training()
    health.append(status.health(seen(world)))
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    health.append(status.health(seen(world)))
    for who, policy in ((evaluator(0), "learned"), (evaluator(1), "random")):
        world.evaluated(who, policy)
    health.append(status.health(seen(world)))
    assert health == [
        Health.STARTING,
        Health.RUNNING,
        Health.STOPPING,
        Health.RUNNING,
        Health.RUNNING,
        Health.RUNNING,
    ]


def test_an_actor_that_starts_late_is_no_degradation_but_one_that_fell_is() -> None:
    world = World()
    world.spawn()
    world.ready(LEARNER, actor(0))
    assert status.health(seen(world)) is Health.RUNNING
    world.ready(actor(1))
    world.gone(actor(1), ExitReason.SIGNAL, "SIGKILL")
    assert status.health(seen(world)) is Health.DEGRADED
    world.wait(1.0)
    world.spawn()
    assert status.health(seen(world)) is Health.DEGRADED, "started again, not ready yet"
    world.ready(actor(1, 2))
    assert status.health(seen(world)) is Health.RUNNING


def test_a_run_that_is_failing_is_failed_before_its_processes_are_gone() -> None:
    world = training(max_restarts=0)
    world.gone(LEARNER, ExitReason.ERROR, "exit status 1")
    shot = seen(world)
    assert shot.state == "stopping"
    assert status.health(shot) is Health.FAILED


def test_an_evaluator_that_fell_is_a_degradation() -> None:
    world = training()
    world.wait(60.0, learner=63.0, actor=63.0)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    world.gone(evaluator(0), ExitReason.SIGNAL, "SIGKILL")
    assert world.state.phase is Phase.EVALUATING
    assert status.health(seen(world)) is Health.DEGRADED


def test_every_state_has_a_verdict_and_an_unheard_of_one_is_refused() -> None:
    shot = seen(training())
    for state in (set(Phase) - {Phase.EMPTY}) | {status.DIED, status.SILENT}:
        assert status.health(msgspec.structs.replace(shot, state=str(state))) in Health
    with pytest.raises(ContractError, match="'resting'"):
        status.health(msgspec.structs.replace(shot, state="resting"))


def test_an_event_of_another_program_is_refused(tmp_path: Path) -> None:
    class Stranger(TrainingStarted, frozen=True, kw_only=True):
        pass

    with pytest.raises(ContractError, match="unknown supervisor event 'Stranger'"):
        status.observe(record(tmp_path, [*training().events, Stranger(at_s=1.0)]))
