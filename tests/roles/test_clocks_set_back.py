"""Wall clocks are set back by operators and time servers: to a learner that is time in which nothing passed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.events import LearnerStepped, StepFailed
from esper_simic.safety import Safety, StepOutcome, observe, plan, resume
from esper_simic.safety_facts import BreakerClosed, BreakerHalfOpened
from supervisor.clock import ManualClock
from supervisor.roles.fold import event_of
from supervisor.roles.surroundings import Surroundings
from tests.roles.bench import LANES, Bench, bench, episode
from tests.roles.pair import SMALL
from tests.roles.scribe import is_same_state
from tests.roles.test_curriculum_roles import STAGES
from tests.roles.test_failed_steps import EVERY, break_updates, fill, folded, not_finite
from tests.test_safety import FAST_KEYS

FRAIL = (EVERY, "simic_trainer.training_breaker_failure_threshold=1")
RECOVERY_S = 60.0


def open_breaker(held: Bench) -> None:
    """The first update fails, the training's breaker opens, and there is enough for the next update."""
    break_updates(held.loop.learner, not_finite)
    actors = [held.actor(0), held.actor(1)]
    fill(held, actors, 2)
    assert held.records("StepFailed")
    for actor in actors:
        held.send(actor)
    assert held.loop.learner.can_step()
    assert held.loop.waiting_for == "breaker"


def times_of(held: Bench) -> list[float]:
    """The time of every update."""
    times = []
    for record in held.records():
        event = event_of(record)
        if isinstance(event, LearnerStepped | StepFailed):
            assert event.inputs is not None
            times.append(event.inputs.at_s)
    return times


def check(held: Bench) -> None:
    """The probe was made and went well, no time fell, and the journal gives the same state."""
    (stepped,) = [record.header_as(LearnerStepped) for record in held.records("LearnerStepped")]
    assert {type(fact) for fact in stepped.facts} >= {BreakerHalfOpened, BreakerClosed}
    assert times_of(held) == sorted(times_of(held))
    assert is_same_state(folded(held).learner.state(), held.loop.learner.state())


def test_between_the_question_and_the_update_it_breaks_no_invariant(tmp_path: Path) -> None:
    with bench(tmp_path / "run", *FRAIL) as held:
        open_breaker(held)
        held.clock.advance(RECOVERY_S)
        assert held.loop.may_step
        held.clock.set_now(held.clock.now_s() - 3600.0)
        assert held.loop.may_step, "what was allowed is not taken back"
        held.loop.step()
        check(held)


def test_behind_an_open_breaker_it_lengthens_no_wait(tmp_path: Path) -> None:
    with bench(tmp_path / "run", *FRAIL) as held:
        held.clock.advance(1e6)
        open_breaker(held)
        held.clock.advance(RECOVERY_S / 2)
        assert not held.loop.may_step
        held.clock.set_now(5.0)
        for wait_s in (0.0, RECOVERY_S / 2 - 1.0):
            held.clock.advance(wait_s)
            assert not held.loop.may_step
        held.clock.advance(1.0)
        held.step_all()
        check(held)


def test_between_two_lives_it_makes_the_next_one_wait_anew_and_no_longer(tmp_path: Path) -> None:
    """How long the breaker was open when the first life ended stands nowhere."""
    with bench(tmp_path / "run", *FRAIL) as held:
        held.clock.advance(1e6)
        open_breaker(held)
        held.make_durable()
        held.kill()
        held.clock.set_now(5.0)
        held.live(2)
        held.clock.advance(RECOVERY_S - 1.0)
        assert not held.loop.may_step
        held.clock.advance(1.0)
        held.step_all()
        check(held)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_life_goes_on_from_the_newest_time_of_safety_and_curriculum(tmp_path: Path, is_ahead: bool) -> None:
    """A verdict of the curriculum has a time, too, and comes between updates."""
    with bench(tmp_path / "run", EVERY, *SMALL, *STAGES) as held:
        held.clock.advance(1000.0)
        one, two = held.actor(0), held.actor(1)
        for actor in (one, two, one, two):
            held.send(actor)
        assert held.step_all() == 1
        held.make_durable()
        held.clock.advance(500.0)
        held.send(two, episodes=[episode(lane, success=True, cut=False) for lane in range(LANES)])
        assert held.loop.learner.stage == 1
        held.make_durable()
        held.kill()
        held.clock.set_now(2000.0 if is_ahead else 5.0)
        held.live(2)
        assert held.step_all() == 1
        assert times_of(held)[-1] == (2000.0 if is_ahead else 1500.0)
        assert is_same_state(folded(held).learner.state(), held.loop.learner.state())


STEP_S = st.sampled_from([0.0, 1.0, 9.0, 12.0, -0.5, -11.0, -1e9]) | st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(st.lists(st.tuples(STEP_S, STEP_S, st.integers(0, 5)), max_size=40), st.integers(0, 40))
def test_whatever_becomes_of_the_clock_an_update_that_was_allowed_is_made(
    turns: list[tuple[float, float, int]], lives_after: int
) -> None:
    """The clock moves before it is asked and again before the update; every so often another life begins."""
    clock, safety = ManualClock(now_s=1.7e9), Safety()
    surroundings = Surroundings(clock)
    for number, (before_s, between_s, luck) in enumerate(turns):
        if number == lives_after:
            surroundings = Surroundings(clock)
            surroundings.go_on_from(safety.clock.reading_s)
        clock.set_now(clock.now_s() + before_s)
        mode = plan(safety, FAST_KEYS, surroundings.now_s())
        if mode.is_halted:
            safety, _ = resume(safety)
        if mode.may_step:
            clock.set_now(clock.now_s() + between_s)
            inputs = surroundings.before_step()
            safety = observe(safety, FAST_KEYS, StepOutcome(finite=luck == 0), inputs).safety
