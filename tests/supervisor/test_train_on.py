"""A training that halted itself, or met its timeout, goes on where an operator asks for it."""

from __future__ import annotations

import pytest

from supervisor.events import ProgressHeard, RunResumed, SignalReceived
from supervisor.outcome import outcome_of
from supervisor.state import Phase
from tests.supervisor.worlds import LEARNER, World, actor, learner


def halted() -> World:
    world = World()
    world.train()
    world.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=90, is_halted=True))
    world.gone(actor(0))
    world.gone(actor(1))
    world.report_checkpoint(LEARNER)
    world.gone(LEARNER)
    assert world.state.phase is Phase.FAILED
    return world


def timed_out_before_it_was_measured() -> World:
    """Trained for the configured 24 hours."""
    world = World()
    world.train()
    world.wait_for(dict.fromkeys(world.state.live, 1e9), 24 * 3600)
    world.end_training()
    assert world.state.phase is Phase.EVALUATING
    return world


def timed_out() -> World:
    """Trained for the configured 24 hours, then measured to the end."""
    world = timed_out_before_it_was_measured()
    world.evaluate()
    assert world.state.training_ended is not None
    assert world.state.training_ended.reason == "training_timeout"
    assert world.state.phase is Phase.FINISHED
    return world


@pytest.mark.parametrize("ended", [halted, timed_out])
def test_it_trains_again_where_somebody_asks_for_it(ended) -> None:
    world = ended()
    assert world.resume(False, True)[0] == "RunResumed"
    (begun,) = [event for event in world.events if isinstance(event, RunResumed)]
    assert (begun.goes_on, begun.trains_on) == ("training", True)
    assert (world.state.phase, world.state.lift) == (Phase.STARTING, 1)
    world.train()
    assert world.state.phase is Phase.TRAINING
    assert world.state.evaluations == {}


def test_without_it_a_halted_run_makes_its_checkpoint_and_fails_again_with_the_remedy() -> None:
    world = halted()
    world.resume()
    assert world.state.lift == 0
    world.spawn()
    world.ready(learner(2))
    world.report_checkpoint(learner(2))
    world.gone(learner(2))
    assert world.state.phase is Phase.FAILED
    assert world.state.finished is not None
    assert "run --resume RUN --train-on" in world.state.finished.reason


def test_a_run_that_met_its_timeout_says_so_and_how_it_goes_on() -> None:
    told = timed_out().state.finished
    assert told is not None
    assert "training_timeout_hours" in told.reason
    assert "--train-on" in told.reason


def test_without_it_a_run_that_met_its_timeout_stays_finished() -> None:
    assert timed_out().resume() == []


def test_other_ends_are_none_to_be_lifted() -> None:
    world = World(max_updates=7)
    world.train()
    world.tell(ProgressHeard(child=LEARNER, learner_step=7, environment_steps=90))
    world.end_training()
    world.evaluate()
    assert world.resume(False, True) == []


def test_an_order_outlives_the_supervisor_that_got_it_and_stays_the_same_order() -> None:
    world = halted()
    world.resume(False, True)
    world.resume()
    assert (world.state.resumes, world.state.lift) == (2, 1)
    world.resume(False, True)
    assert (world.state.resumes, world.state.lift) == (3, 3)


@pytest.mark.parametrize("ended", [halted, timed_out])
def test_an_order_lifts_what_had_halted_when_it_was_given_and_nothing_that_halts_later(ended) -> None:
    world = ended()
    world.resume(False, True)
    world.train()
    life = next(iter(world.state.of_role("learner")))
    assert world.state.lift == 0, "it stood ready: it has obeyed, or there was nothing to lift"
    world.tell(ProgressHeard(child=life, learner_step=99, environment_steps=900, is_halted=True))
    world.gone(life)
    assert world.state.lift == 0, "a life that makes the checkpoint of a halted training lifts nothing"
    world.resume()
    assert world.state.lift == 0, "nor does one that nobody asked to"


@pytest.mark.parametrize("ended", [halted, timed_out])
def test_its_outcome_tells_that_it_goes_on_by_an_order_alone(ended) -> None:
    assert outcome_of(ended().state).needs_order


def test_what_is_left_of_a_training_that_halted_needs_the_order_whatever_ended_the_run() -> None:
    world = halted()
    world.resume()
    world.tell(SignalReceived(name="SIGTERM"))
    assert world.state.finished is not None
    assert world.state.finished.outcome == "stopped"
    assert outcome_of(world.state).needs_order


def test_a_run_that_can_go_on_as_it_was_needs_none() -> None:
    world = World()
    world.train()
    world.tell(SignalReceived(name="SIGTERM"))
    world.gone(actor(0))
    world.gone(actor(1))
    world.report_checkpoint(LEARNER)
    world.gone(LEARNER)
    assert world.state.phase is Phase.STOPPED
    assert not outcome_of(world.state).needs_order
    measuring = timed_out_before_it_was_measured()
    measuring.tell(SignalReceived(name="SIGTERM"))
    for who in list(measuring.state.of_role("evaluate")):
        measuring.gone(who)
    assert measuring.state.phase is Phase.STOPPED
    assert not outcome_of(measuring.state).needs_order, "it is to be measured first"
