"""How a run empties its process tree: in order, in time, and with the last checkpoint whoever dies meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from supervisor.decide import KILL_CONFIRM_S, STACK_DUMP_S
from supervisor.events import (
    AskStop,
    ChildId,
    ChildStopRequested,
    DumpStacks,
    ExitReason,
    KillChild,
    RunFinished,
    SignalReceived,
    StartChild,
)
from supervisor.state import Phase
from supervisor.stopping import EVALUATOR_PATIENCE_S
from tests.supervisor.worlds import LEARNER, World, actor, evaluator, learner

SIGTERM = SignalReceived(name="SIGTERM")


def outcome(world: World) -> RunFinished:
    assert world.state.finished is not None
    return world.state.finished


def ended(**config: Any) -> World:
    """Training has come to its limit; the actors have left, the learner is asked for its checkpoint."""
    world = World(max_seconds=60.0, **config)
    world.train()
    world.time_is_up()
    world.gone(actor(0))
    world.gone(actor(1))
    assert [effect.child for effect in world.owed()] == [LEARNER]
    return world


# The last checkpoint


def test_a_learner_that_dies_before_its_last_checkpoint_is_started_for_it_alone() -> None:
    world = ended()
    assert world.gone(LEARNER, ExitReason.SIGNAL, "signal 9") == ["ChildExited", "ChildScheduled"]
    assert world.state.phase is Phase.STOPPING
    assert world.owed() == (), "not before its delay is over"
    world.wait(0.5)
    assert world.owed() == (StartChild(child=learner(2)),)
    world.spawn()
    assert world.owed() == (), "it is not asked before it can hear"
    assert world.wait_for({learner(2): world.now_s + 9.0}, 9.0) == [], "it recovers"
    assert world.ready(learner(2), learner_step=9) == ["ChildReady", "ChildStopRequested"]
    assert world.owed() == (AskStop(child=learner(2), reason="training ended: max_seconds"),)
    world.report_checkpoint(learner(2))
    assert world.gone(learner(2))[:2] == ["ChildExited", "EvaluationStarted"]


def test_a_learner_that_dies_after_its_last_checkpoint_is_not_missed() -> None:
    world = ended()
    world.report_checkpoint()
    assert world.gone(LEARNER, ExitReason.SIGNAL)[:2] == ["ChildExited", "EvaluationStarted"]


def test_a_learner_that_dies_before_the_actors_have_left_comes_back_after_them() -> None:
    world = World(max_seconds=60.0)
    world.train()
    world.time_is_up()
    assert world.gone(LEARNER, ExitReason.SIGNAL) == ["ChildExited"]
    world.gone(actor(0))
    assert world.gone(actor(1)) == ["ChildExited", "ChildScheduled"]


def test_a_learner_on_its_way_back_when_training_ends_makes_the_checkpoint() -> None:
    world = World(max_seconds=60.0)
    world.train()
    world.wait(59, learner=59, actor=59)
    world.gone(LEARNER, ExitReason.SIGNAL)
    world.wait(1, actor=60)
    world.spawn()
    world.wait(1, actor=61)
    assert world.state.phase is Phase.STOPPING
    world.gone(actor(0))
    assert world.gone(actor(1)) == ["ChildExited"], "the learner is not disturbed"
    assert world.ready(learner(2)) == ["ChildReady", "ChildStopRequested"]


def test_a_learner_waiting_for_its_restart_when_training_ends_makes_the_checkpoint() -> None:
    world = World(max_seconds=60.0, restart_backoff_s=5.0)
    world.train()
    world.wait(59, learner=59, actor=59)
    world.gone(LEARNER, ExitReason.SIGNAL)
    world.wait(1, actor=60)
    world.gone(actor(0))
    assert world.gone(actor(1)) == ["ChildExited"]
    assert world.owed() == ()
    world.wait(4)
    assert world.owed() == (StartChild(child=learner(2)),)


def test_a_learner_that_never_manages_its_last_checkpoint_is_given_up_however_long_each_try_takes() -> None:
    """Each life is killed after its time to stop, which is longer than a window holds restarts."""
    world = ended(max_restarts=3, restart_window_s=60.0, stop_timeout_s=50.0)
    lives = 0
    while world.state.phase is Phase.STOPPING:
        lives += 1
        assert lives < 10, "it would go on for ever"
        world.wait(50.0)
        world.wait(STACK_DUMP_S)
        assert world.owed() == (KillChild(child=learner(lives)),)
        world.gone(learner(lives), ExitReason.SIGNAL, "signal 9, sent by the supervisor")
        world.wait(10.0)
        world.spawn()
        world.ready(*world.state.live)
    assert lives == 4
    assert (outcome(world).exit_code, outcome(world).outcome) == (1, "failed")
    assert "sent by the supervisor" in outcome(world).reason


def test_a_learner_that_asks_for_a_person_instead_of_its_checkpoint_ends_the_run_with_78() -> None:
    world = ended()
    names = world.gone(LEARNER, ExitReason.CONFIGURATION, "a damaged segment")
    assert names == ["ChildExited", "RunFailed", "RunFinished"]
    assert (outcome(world).exit_code, outcome(world).outcome) == (78, "failed")
    assert "a damaged segment" in outcome(world).reason


def test_an_evaluator_that_asks_for_a_person_ends_the_run_with_78() -> None:
    world = ended()
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    assert world.gone(evaluator(0), ExitReason.CONFIGURATION, "no such task")[:2] == [
        "ChildExited",
        "RunFailed",
    ]
    world.gone(evaluator(1))
    assert outcome(world).exit_code == 78


def test_a_stop_does_not_hide_that_a_person_is_needed() -> None:
    world = World()
    world.train()
    world.tell(SIGTERM)
    world.gone(actor(0))
    world.gone(actor(1))
    world.gone(LEARNER, ExitReason.CONFIGURATION, "a damaged segment")
    assert outcome(world).exit_code == 78


def test_without_a_single_update_there_is_nothing_to_measure() -> None:
    world = ended()
    world.report_checkpoint(learner_step=0)
    assert world.gone(LEARNER) == ["ChildExited", "RunFailed", "RunFinished"]
    assert outcome(world).exit_code == 1
    assert outcome(world).reason.startswith("training ended before the first update")


# Who is asked for how long


def patience_s(world: World, who: ChildId) -> float:
    asked = [event for event in world.events if isinstance(event, ChildStopRequested) and event.child == who]
    return asked[-1].kill_at_s - asked[-1].at_s


def test_everybody_is_asked_for_as_long_as_he_has_something_to_save() -> None:
    world = ended(stop_timeout_s=20.0)
    assert (patience_s(world, actor(0)), patience_s(world, LEARNER)) == (20.0, 20.0)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0))
    world.tell(SIGTERM)
    assert patience_s(world, evaluator(0)) == EVALUATOR_PATIENCE_S == 1.0
    assert patience_s(world, evaluator(1)) == 0.0, "it is not ready and cannot hear"


def test_an_evaluator_has_never_more_time_than_others() -> None:
    world = ended(stop_timeout_s=0.25)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    world.tell(SIGTERM)
    assert patience_s(world, evaluator(0)) == 0.25


# A stop, from every phase


def starting() -> World:
    world = World(max_seconds=60.0)
    world.spawn()
    return world


def training() -> World:
    world = World(max_seconds=60.0)
    world.train()
    return world


def recovering() -> World:
    """The learner is on its way back while everybody trains."""
    world = training()
    world.gone(LEARNER, ExitReason.SIGNAL)
    world.wait(1)
    world.spawn()
    return world


def waiting() -> World:
    """The learner's next life is not due yet."""
    world = training()
    world.gone(LEARNER, ExitReason.SIGNAL)
    return world


def coming_for_its_checkpoint() -> World:
    world = ended()
    world.gone(LEARNER, ExitReason.SIGNAL)
    world.wait(1)
    world.spawn()
    return world


def due_for_its_checkpoint() -> World:
    world = ended()
    world.gone(LEARNER, ExitReason.SIGNAL)
    return world


def evaluating() -> World:
    world = ended()
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    return world


def resumed() -> World:
    world = training()
    world.resume()
    world.spawn()
    return world


@pytest.mark.parametrize(
    ("world", "is_saved"),
    [
        (starting, False),
        (training, True),
        (recovering, False),
        (waiting, False),
        (ended, True),
        (coming_for_its_checkpoint, False),
        (due_for_its_checkpoint, False),
        (evaluating, True),
        (resumed, False),
    ],
)
def test_a_stop_ends_every_phase_within_its_deadline_and_what_was_stopped_can_go_on(
    world: Callable[[], World], is_saved: bool
) -> None:
    run = world()
    began_s = run.now_s
    run.tell(SIGTERM)
    while run.state.finished is None:
        owed = run.owed()
        assert owed, f"nobody does anything in {run.state.phase}"
        for effect in owed:
            assert not isinstance(effect, StartChild), "nothing new is begun"
            if not isinstance(effect, DumpStacks):
                run.obey(effect)
        if run.state.finished is None:
            run.wait(STACK_DUMP_S)
    assert run.now_s - began_s <= 2 * STACK_DUMP_S, "nobody was slow here"
    assert (outcome(run).exit_code, outcome(run).outcome) == (0, "stopped")
    assert "SIGTERM" in outcome(run).reason
    assert (run.state.checkpoint is not None) == is_saved
    assert run.resume()[0] == "RunResumed"


def test_those_who_do_not_obey_a_stop_are_killed_in_time_and_the_run_ends() -> None:
    run = training()
    run.tell(SIGTERM)
    deadline_s = run.now_s + 2 * (run.config.stop_timeout_s + STACK_DUMP_S + KILL_CONFIRM_S) + 1.0
    while run.state.finished is None:
        assert run.now_s < deadline_s
        for effect in run.owed():
            if isinstance(effect, KillChild):
                run.gone(effect.child, ExitReason.SIGNAL)
        run.wait(0.1)
    assert (outcome(run).exit_code, outcome(run).outcome) == (0, "stopped")
    assert "no last checkpoint was reported" in outcome(run).reason


def test_what_was_stopped_before_anything_trained_says_so() -> None:
    for world, words in ((starting, "before training began"), (resumed, "before training went on")):
        run = world()
        run.tell(SIGTERM)
        for who in sorted(run.state.live):
            run.gone(who, ExitReason.SIGNAL)
        assert outcome(run).reason == f"stopped by SIGTERM {words}"
