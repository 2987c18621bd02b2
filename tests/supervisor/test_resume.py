"""A run that goes on: from any point of any journal, under which limits, and which directories make way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.config import Config
from esper_simic.errors import ConfigError, UnavailableError
from supervisor.events import (
    AnyEvent,
    ChildScheduled,
    ExitReason,
    LearnerReported,
    PolicyEvaluated,
    ProgressHeard,
    RunResumed,
    RunStarted,
    SignalReceived,
)
from supervisor.files import exclusive_lock
from supervisor.outcome import past_of, run_id_of
from supervisor.resume import check_resumable, prepare
from supervisor.state import Phase, RunState, Status, apply, check
from tests.supervisor.recorded_runs import (
    failed,
    finished,
    record,
    record_learner,
    stepped,
    stopped,
    training,
)
from tests.supervisor.worlds import (
    LEARNER,
    POLICIES,
    STEPS,
    STORIES,
    World,
    actor,
    evaluator,
    happen,
    learner,
    pid_of,
)

# From any point of any journal


def folded(events: list[AnyEvent]) -> RunState:
    state = RunState()
    for event in events:
        state = apply(state, event)
    return state


def taken_over(events: list[AnyEvent], **config: Any) -> World:
    """A world whose supervisor died after these events; another has just come."""
    world = World(**config)
    world.events = list(events)
    world.state = folded(events)
    world.resume()
    return world


def come_to_an_end(world: World) -> None:
    """Everybody obeys, nobody dies, time passes."""
    for _ in range(200):
        if world.state.finished is not None:
            return
        for effect in world.owed():
            world.obey(effect)
        started = [who for who, child in world.state.live.items() if child.status is Status.STARTED]
        world.ready(*sorted(started))
        if not world.owed() and not started:
            world.wait_for(dict.fromkeys(world.state.live, world.now_s + 100.0), 100.0)
    raise AssertionError(f"it stands still in {world.state.phase}: {world.state.children}")


LIMITS: dict[str, Any] = {"max_seconds": 300, "max_steps": 1500, "max_restarts": 2}


@given(STORIES, st.integers(0, 400))
def test_any_journal_cut_anywhere_can_be_gone_on_with_to_a_good_end(
    story: list[tuple[str, int, ExitReason]], cut: int
) -> None:
    told = World(**LIMITS)
    for what, number, reason in story:
        happen(told, what, number, reason)
    events = told.events[:cut]
    before = folded(events)
    world = taken_over(events, **LIMITS)
    check(world.state)
    if before.phase is Phase.FINISHED:
        assert world.events == events, "a run that is finished is left alone"
        return
    lives = world.state.children
    assert {child.status for child in lives.values()} <= {Status.SCHEDULED}
    wanted = {
        Phase.STARTING: {("learner", 0), ("actor", 0), ("actor", 1)},
        Phase.STOPPING: {("learner", 0)},
        Phase.EVALUATING: {("evaluate", index) for index in range(len(lives))},
    }
    assert {(who.role, who.index) for who in lives} == wanted[world.state.phase]
    assert len(world.owed()) == len(lives), "all of them at once"
    come_to_an_end(world)
    check(world.state)
    assert world.state.phase is Phase.FINISHED
    assert set(world.state.evaluations) == set(POLICIES)
    scheduled = [event.child for event in world.events if isinstance(event, ChildScheduled)]
    assert len(scheduled) == len(set(scheduled)), "no life is lived twice"


@given(STEPS, st.integers(0, 200))
def test_whatever_was_observed_a_later_supervisor_finds_a_state_that_is_true(
    steps: list[tuple[Any, float]], cut: int
) -> None:
    told = World(**LIMITS)
    for observed, delay_s in steps:
        told.now_s += delay_s
        told.tell(observed)
    world = taken_over(told.events[:cut], **LIMITS)
    check(world.state)
    assert folded(world.events) == world.state


def test_a_run_whose_journal_is_empty_is_begun() -> None:
    world = taken_over([])
    assert [type(event) for event in world.events[:1]] == [RunStarted]
    assert (world.state.phase, world.state.resumes) == (Phase.STARTING, 0)


# With what it goes on


def resumed(world: World) -> RunResumed:
    return next(event for event in reversed(world.events) if isinstance(event, RunResumed))


def phase(world: World) -> Phase:
    return world.state.phase


def evaluating(**config: Any) -> World:
    world = World(max_seconds=60.0, **config)
    world.train()
    world.time_is_up()
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    return world


@pytest.mark.parametrize("world", [training, stopped, failed])
def test_a_training_that_was_cut_short_goes_on(world: Callable[[], World]) -> None:
    run = world()
    assert run.resume()[0] == "RunResumed"
    assert run.state.phase is Phase.STARTING
    assert [effect.child for effect in run.owed()] == [actor(0, 2), actor(1, 2), learner(2)]
    assert (run.state.stop, run.state.failure, run.state.finished) == (None, "", None)
    assert run.state.resumes == 1


def test_an_evaluation_goes_on_with_what_was_not_measured() -> None:
    run = evaluating()
    run.evaluated(evaluator(0), "learned")
    run.resume()
    assert phase(run) is Phase.EVALUATING
    assert set(run.state.evaluations) == {"learned"}
    assert [effect.child for effect in run.owed()] == [evaluator(0, 2), evaluator(1, 2)]
    run.evaluate()
    assert phase(run) is Phase.FINISHED
    measured = [event for event in run.events if type(event).__name__ == "PolicyEvaluated"]
    assert len(measured) == len(POLICIES), "none twice"


def test_an_evaluation_with_another_number_of_episodes_is_made_anew() -> None:
    """Policies of one table have the same held-out episodes."""
    run = evaluating()
    run.evaluated(evaluator(0), "learned")
    run.resume(evaluation_episodes=9)
    assert (run.state.phase, run.state.evaluations) == (Phase.EVALUATING, {})


def test_an_evaluation_that_nobody_wants_any_more_is_over() -> None:
    run = evaluating()
    run.policies = ()
    assert run.resume() == ["RunResumed", "EvaluationFinished", "RunFinished"]
    assert phase(run) is Phase.FINISHED


def test_a_training_that_had_ended_is_not_begun_again_for_its_last_checkpoint() -> None:
    run = World(max_seconds=60.0)
    run.train()
    run.time_is_up()
    run.gone(actor(0))
    run.resume()
    assert resumed(run).goes_on == "checkpoint"
    assert phase(run) is Phase.STOPPING
    assert [effect.child for effect in run.owed()] == [learner(2)]
    run.spawn()
    assert run.ready(learner(2)) == ["ChildReady", "ChildStopRequested"]
    run.report_checkpoint(learner(2))
    assert run.gone(learner(2))[:2] == ["ChildExited", "EvaluationStarted"]


def test_after_a_failed_evaluation_the_learner_makes_another_checkpoint() -> None:
    """The one there is may be why nothing could be measured."""
    run = evaluating(max_restarts=0)
    run.evaluated(evaluator(1), "random")
    for index in (0, 1):
        run.gone(evaluator(index), ExitReason.ERROR, "step-7/state.safetensors: bad digest")
    assert phase(run) is Phase.FAILED
    run.resume()
    assert resumed(run).goes_on == "checkpoint"
    assert (run.state.checkpoint, run.state.evaluations) == (None, {})
    come_to_an_end(run)
    assert phase(run) is Phase.FINISHED


def test_a_training_that_ended_before_its_first_update_failed_and_is_tried_again() -> None:
    run = World(max_seconds=1.0)
    run.train()
    run.time_is_up()
    run.end_training(learner_step=0)
    assert run.state.finished is not None
    assert (run.state.finished.exit_code, run.state.finished.outcome) == (1, "failed")
    assert "before the first update" in run.state.finished.reason
    run.resume()
    assert phase(run) is Phase.STARTING


@pytest.mark.parametrize("changed", [{"max_seconds": 120.0}, {"max_steps": 10**6}, {"max_updates": 10**6}])
def test_under_other_limits_a_training_that_had_ended_goes_on(changed: dict[str, float]) -> None:
    run = evaluating()
    run.resume(**changed)
    assert (resumed(run).goes_on, run.state.phase) == ("training", Phase.STARTING)


def measured_to_the_end(**config: Any) -> World:
    run = evaluating(**config)
    run.evaluate()
    assert phase(run) is Phase.FINISHED
    return run


def test_a_finished_run_is_left_alone_under_the_limits_that_ended_it() -> None:
    run = measured_to_the_end()
    assert run.resume(True) == []
    assert phase(run) is Phase.FINISHED


def test_a_finished_run_is_left_alone_where_nobody_named_other_limits() -> None:
    """Those of a preset are not what its own command said, and nobody asked for more of it."""
    run = measured_to_the_end()
    assert run.resume(max_seconds=3000.0) == []
    assert phase(run) is Phase.FINISHED


@pytest.mark.parametrize("changed", [{"max_seconds": 120.0}, {"max_steps": 10**6}, {"max_updates": 10**6}])
def test_under_other_limits_a_finished_run_is_trained_further_and_measured_anew(
    changed: dict[str, float],
) -> None:
    run = measured_to_the_end()
    assert run.resume(True, **changed)[0] == "RunResumed"
    assert (resumed(run).goes_on, phase(run)) == ("training", Phase.STARTING)
    assert (run.state.finished, run.state.evaluations) == (None, {})
    come_to_an_end(run)
    measured = [event.policy for event in run.events if isinstance(event, PolicyEvaluated)]
    assert sorted(measured) == sorted([*POLICIES, *POLICIES])


def test_the_same_limits_given_as_a_whole_number_are_the_same() -> None:
    run = evaluating()
    run.resume(max_seconds=60)
    assert resumed(run).goes_on == "evaluation"


# What counts from where


def test_limits_of_time_and_steps_count_this_invocation() -> None:
    run = World(max_seconds=10.0, max_steps=500)
    run.train()
    run.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=499))
    run.resume()
    run.wait(50)
    run.train(learner_step=9, environment_steps=490)
    work = run.now_s + 9.9
    assert run.wait(9.9, learner=work, actor=work) == []
    heard = ProgressHeard(child=learner(2), learner_step=20, environment_steps=989)
    assert run.tell(heard) == []
    heard = ProgressHeard(child=learner(2), learner_step=20, environment_steps=990)
    assert run.tell(heard)[0] == "TrainingEnded"


def test_steps_count_from_the_first_life_of_the_learner_under_this_supervisor() -> None:
    run = World(max_steps=500)
    run.train(learner_step=5, environment_steps=1000)
    run.gone(LEARNER, ExitReason.SIGNAL)
    run.wait(1)
    run.spawn()
    run.ready(learner(2), learner_step=9, environment_steps=1400)
    assert run.tell(ProgressHeard(child=learner(2), learner_step=9, environment_steps=1499)) == []
    heard = ProgressHeard(child=learner(2), learner_step=10, environment_steps=1500)
    assert run.tell(heard)[0] == "TrainingEnded"


def test_updates_count_over_the_whole_run() -> None:
    run = World(max_updates=30)
    run.train()
    run.tell(ProgressHeard(child=LEARNER, learner_step=20, environment_steps=200))
    run.resume()
    run.train(learner_step=20, environment_steps=200)
    assert run.tell(ProgressHeard(child=learner(2), learner_step=29, environment_steps=290)) == []
    names = run.tell(ProgressHeard(child=learner(2), learner_step=30, environment_steps=300))
    assert names[0] == "TrainingEnded"
    assert run.state.training_ended is not None
    assert run.state.training_ended.reason == "max_updates"


def test_a_run_that_stands_at_its_last_update_already_needs_no_actor() -> None:
    run = World(max_updates=30)
    run.train()
    run.resume()
    run.spawn()
    names = run.ready(learner(2), learner_step=30, environment_steps=300)
    assert names[:3] == ["ChildReady", "TrainingStarted", "TrainingEnded"]
    for index in (0, 1):
        run.gone(actor(index, 2))
    run.report_checkpoint(learner(2), learner_step=30)
    assert run.gone(learner(2))[:2] == ["ChildExited", "EvaluationStarted"]


def test_a_learner_that_died_with_its_last_update_says_so_when_it_is_back() -> None:
    run = World(max_updates=30)
    run.train()
    run.gone(LEARNER, ExitReason.SIGNAL)
    run.wait(1)
    run.spawn()
    assert run.ready(learner(2), learner_step=30)[:2] == ["ChildReady", "TrainingEnded"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_another_number_of_actors_holds_from_now_on(count: int) -> None:
    run = training()
    run.resume(num_actors=count)
    run.train()
    assert {who.index for who in run.state.of_role("actor", Status.READY)} == set(range(count))
    run.wait(1, learner=run.now_s, actor=run.now_s)
    assert run.owed() == (), "those there were before are not missed"


def test_restarts_and_those_given_up_are_forgiven() -> None:
    run = training(max_restarts=1)
    run.gone(actor(0), ExitReason.ERROR)
    run.wait(1)
    run.spawn()
    run.ready(actor(0, 2))
    run.gone(actor(0, 2), ExitReason.ERROR)
    assert run.state.given_up
    run.resume()
    run.train()
    assert run.gone(actor(0, 3), ExitReason.ERROR) == ["ChildExited", "ChildScheduled"]
    assert run.state.children[actor(0, 4)].attempt == 1


def test_words_of_a_life_before_are_not_heard() -> None:
    run = training()
    run.resume()
    late = LearnerReported(child=LEARNER, path="p", learner_step=1, environment_steps=1, digest="d")
    assert run.tell(late) == []
    assert run.tell(ProgressHeard(child=LEARNER, learner_step=1, environment_steps=10**9)) == []
    assert run.ready(LEARNER) == []
    assert run.gone(actor(0)) == []
    assert pid_of(LEARNER) != pid_of(learner(2))


def test_a_command_is_obeyed_once_over_all_supervisors() -> None:
    from supervisor.events import CommandReceived

    run = training()
    run.tell(CommandReceived(command_id="c", name="stop"))
    run.end_training()
    run.resume()
    assert run.tell(CommandReceived(command_id="c", name="stop")) == []
    assert run.tell(SignalReceived(name="SIGTERM"))[0] == "StopRequested"
    assert run.state.stop is not None
    assert not run.state.stop.urgent, "the stop of before is done with"


def test_the_configuration_that_holds_now_is_the_one_shown() -> None:
    run = training()
    run.resume(num_actors=4, evaluation_workers=3)
    started = run.state.started
    assert started is not None
    assert (started.run_id, started.num_actors, started.evaluation_workers) == ("run-1", 4, 3)
    assert (started.started_unix_s, started.config["supervisor"]["num_actors"]) == (1000.0, 4)


# Which keys may change


def config(**changed: dict[str, Any]) -> Config:
    return Config.model_validate(changed)


def recorded(**changed: dict[str, Any]) -> dict[str, Any]:
    return config(**changed).model_dump(mode="json")


@pytest.mark.parametrize(
    "changed",
    [
        {"max_seconds": 60.0, "max_steps": 1, "max_updates": 7},
        {"num_actors": 7},
        {"checkpoint_interval_s": 5.0, "keep_last": 9},
        {"learner_threads": 2},
        {"evaluation_episodes": 2},
    ],
)
def test_how_a_run_is_looked_after_may_change(changed: dict[str, Any]) -> None:
    check_resumable(recorded(), config(supervisor=changed))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("simic_trainer", "gamma", 0.95),
        ("simic_trainer", "seed", 9),
        ("experience_buffer", "capacity", 5000),
        ("environment", "max_epochs", 99),
        ("supervisor", "lockstep", True),
    ],
)
def test_what_makes_another_run_of_it_may_not(section: str, key: str, value: float) -> None:
    before = recorded()
    with pytest.raises(ConfigError) as refused:
        check_resumable(before, config(**{section: {key: value}}))
    assert f": {section}.{key} was {before[section][key]!r}, now {value!r}. " in str(refused.value)
    assert "--restart-behavior restart|overwrite" in str(refused.value), "the remedy"


def test_every_difference_is_named_at_once() -> None:
    given = config(simic_trainer={"gamma": 0.95}, environment={"max_epochs": 99})
    with pytest.raises(ConfigError, match=r"environment\.max_epochs .*; simic_trainer\.gamma "):
        check_resumable(recorded(), given)


def test_in_lockstep_the_number_of_actors_decides_what_is_computed() -> None:
    lockstep = {"lockstep": True}
    before = recorded(supervisor=lockstep)
    check_resumable(before, config(supervisor=lockstep | {"max_updates": 7}))
    with pytest.raises(ConfigError, match=r"supervisor\.num_actors was 2, now 1"):
        check_resumable(before, config(supervisor=lockstep | {"num_actors": 1}))


def test_a_key_that_was_not_there_when_the_run_began_is_no_difference() -> None:
    before = recorded()
    del before["simic_trainer"]["gamma"]
    check_resumable(before, config())


# Which directories make way


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run and a file that is none of its own."""
    directory = record(tmp_path / "run", training().events)
    record_learner(directory, (4.0, stepped(1, 10)))
    for name in ("checkpoints/step-1", "tensorboard", "logs", "tmp"):
        (directory / name).mkdir(parents=True)
        (directory / name / "file").write_text("x")
    for name in ("supervisor.json", "learner-0.reserve", "learner-0.attempts", "lock"):
        (directory / name).write_text("x")
    (directory / "notes.txt").write_text("mine")
    return directory


def test_a_run_that_is_resumed_is_left_as_it_is(run_dir: Path) -> None:
    before = contents(run_dir)
    assert prepare(run_dir, "resume") is None
    assert contents(run_dir) == before


def test_a_run_can_be_moved_aside_again_and_again(run_dir: Path) -> None:
    before = contents(run_dir)
    assert prepare(run_dir, "restart") == run_dir.with_name("run-old-1")
    assert not run_dir.exists()
    aside = contents(run_dir.with_name("run-old-1"))
    assert aside.pop("lock") == f"{os.getpid()}\n".encode(), "it was held while it was moved"
    assert aside == {name: data for name, data in before.items() if name != "lock"}
    record(run_dir, training().events)
    assert prepare(run_dir, "restart") == run_dir.with_name("run-old-2")


def test_overwriting_removes_the_run_and_nothing_else(run_dir: Path) -> None:
    assert prepare(run_dir, "overwrite") is None
    assert set(contents(run_dir)) == {"lock", "notes.txt"}
    assert past_of(run_dir).started is None
    assert run_id_of(run_dir) is None


def test_an_overwriting_that_was_cut_short_is_finished_by_the_next(run_dir: Path) -> None:
    (run_dir / "journal").rename(run_dir / ".journal.removed")
    assert run_id_of(run_dir) is None, "the run is gone at once"
    assert prepare(run_dir, "overwrite") is None
    assert set(contents(run_dir)) == {"lock", "notes.txt"}


@pytest.mark.parametrize("behavior", ["restart", "overwrite"])
def test_a_directory_that_holds_no_run_is_left_alone(tmp_path: Path, behavior: Any) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="does not hold a run; it is left alone"):
        prepare(tmp_path, behavior)
    assert contents(tmp_path) == {"thesis.tex": b"years"}


@pytest.mark.parametrize("behavior", ["resume", "restart", "overwrite"])
def test_where_nothing_is_nothing_has_to_make_way(tmp_path: Path, behavior: Any) -> None:
    assert prepare(tmp_path / "new", behavior) is None
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", behavior) is None
    assert (tmp_path / "empty").is_dir()


@pytest.mark.parametrize("behavior", ["restart", "overwrite"])
def test_a_run_that_is_supervised_does_not_make_way(run_dir: Path, behavior: Any) -> None:
    with exclusive_lock(run_dir / "lock"):
        before = contents(run_dir)
        with pytest.raises(UnavailableError, match=f"in use by process {os.getpid()} "):
            prepare(run_dir, behavior)
        assert contents(run_dir) == before


@pytest.mark.parametrize("behavior", ["restart", "overwrite"])
def test_a_lock_that_cannot_be_taken_is_named(run_dir: Path, behavior: Any) -> None:
    (run_dir / "lock").unlink()
    (run_dir / "lock").mkdir()
    with pytest.raises(UnavailableError, match="cannot make way in .*run: .*Is a directory"):
        prepare(run_dir, behavior)


# What the journal says of the past


def test_the_past_of_a_run_is_the_fold_of_its_journal(tmp_path: Path) -> None:
    run = finished()
    assert past_of(record(tmp_path, run.events)) == run.state
    assert past_of(tmp_path / "nowhere") == RunState()


def test_a_damaged_past_needs_a_person_and_says_where_and_what_to_do(tmp_path: Path) -> None:
    run_dir = record(tmp_path, training().events)
    segment = next((run_dir / "journal" / "supervisor").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(
        ConfigError, match=rf"{segment.name} is damaged at byte \d+.*restore .*journal/supervisor "
    ):
        past_of(run_dir)
