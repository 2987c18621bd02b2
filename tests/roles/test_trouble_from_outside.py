"""What an operator or another hand does to a learner at work: a halt that is lifted, a rate that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_simic.events import HaltLifted, LearnerStepped
from esper_simic.rate_facts import Tampered
from esper_simic.safety_facts import BreakerOpened, TrainingResumed
from tests.roles.bench import Bench, bench
from tests.roles.scribe import contents, is_same_state
from tests.roles.test_failed_steps import EVERY, FRAIL, break_updates, fill, folded, not_finite


def halt(held: Bench) -> None:
    """Two updates fail, each after the breaker's time."""
    break_updates(held.loop.learner, not_finite, times=2)
    actors = [held.actor(0), held.actor(1)]
    fill(held, actors, 2)
    for actor in actors:
        held.send(actor)
    held.clock.advance(60.0)
    held.step_all()
    assert held.loop.learner.is_halted
    held.make_durable()


def test_a_halt_is_lifted_once_and_the_journal_gives_what_came_of_it(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *FRAIL) as held:
        halt(held)
        held.kill()
        held.live(2)
        held.loop.lift_halt(0)
        assert held.loop.learner.is_halted, "nobody asked for it"
        held.loop.lift_halt(1)
        (record,) = held.records("HaltLifted")
        assert record.header_as(HaltLifted) == HaltLifted(order=1, facts=[TrainingResumed()])
        assert held.loop.counters()["facts.TrainingResumed"] == 1.0
        assert not held.loop.may_step
        held.clock.advance(60.0)
        fill(held, [held.actor(0, 2), held.actor(1, 2)], 2)
        assert held.records("LearnerStepped")
        held.make_durable()
        learner = held.loop.learner
        fold = folded(held)
        assert is_same_state(fold.learner.state(), learner.state())
        assert contents(fold.learner) == contents(learner)
        before = learner.state().digest
        held.kill()
        assert held.live(3).is_exact
        held.loop.lift_halt(1)
        assert held.loop.learner.state().digest == before
        assert len(held.records("HaltLifted")) == 1


def test_a_lifted_halt_is_folded_where_the_failure_that_led_to_it_is_quarantined(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *FRAIL) as held:
        halt(held)
        held.kill()
        held.live(2)
        held.loop.lift_halt(1)
        held.clock.advance(60.0)
        fill(held, [held.actor(0, 2), held.actor(1, 2)], 2)
        last = held.records("StepFailed")[-1]
        fold = folded(held, quarantined=(last.position,))
        assert fold.learner.steps_done == held.loop.learner.steps_done
        assert fold.learner.lifted(1) is None, "the order is obeyed all the same"


def test_behind_an_open_breaker_it_is_time_that_is_waited_for(tmp_path: Path) -> None:
    """Actors wait for credits meanwhile: were it experience, all would seem to wait for each other, and be killed."""
    with bench(tmp_path / "run", EVERY, "simic_trainer.training_breaker_failure_threshold=1") as held:
        assert held.loop.waiting_for == "experience"
        break_updates(held.loop.learner, not_finite)
        fill(held, [held.actor(0), held.actor(1)], 2)
        assert not held.loop.may_step
        assert held.loop.waiting_for == "breaker"
        held.clock.advance(60.0)
        assert held.loop.waiting_for == "experience"


def test_nobody_waits_behind_a_halt(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *FRAIL) as held:
        halt(held)
        assert held.loop.waiting_for == "experience", "the supervisor ends it, no time does"


@pytest.mark.parametrize("mode", ["free", "lockstep"])
def test_the_buffers_bytes_are_an_input_and_lockstep_measures_no_throughput(
    tmp_path: Path, mode: str
) -> None:
    lockstep = ("supervisor.lockstep=true",) if mode == "lockstep" else ()
    with bench(tmp_path / "run", EVERY, *lockstep) as held:
        actors = [held.actor(0), held.actor(1)]
        for _ in range(3):
            for actor in actors:
                held.send(actor, held.loop._published[0])
            held.step_all()
            held.loop.open_round()
            held.make_durable()
        inputs = held.records("LearnerStepped")[0].header_as(LearnerStepped).inputs
        learner = held.loop.learner
        assert inputs is not None
        assert inputs.buffer_bytes == learner.buffer.bytes > 0
        assert (inputs.experiences_since is None) == (mode == "lockstep")
        assert learner.safety.windows["buffer_bytes"].latest == learner.buffer.bytes
        assert (learner.safety.windows["throughput"].latest is None) == (mode == "lockstep")
        told = learner.safety_figures()
        assert told["slo_budget_left.buffer_bytes"] == 1.0
        assert "slo_budget_left.ttl_cleanup" not in told, "nothing in this buffer has an end of its time"
        assert "slo_budget_left.step_latency" not in told or mode == "free"
        assert is_same_state(folded(held).learner.state(), learner.state())


def test_in_lockstep_a_lifted_halt_needs_no_clock(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *FRAIL, "supervisor.lockstep=true") as held:
        actors = [held.actor(0), held.actor(1)]
        break_updates(held.loop.learner, not_finite, times=2)
        for _ in range(8):
            if held.loop.learner.is_halted:
                break
            for actor in actors:
                held.send(actor, held.loop._published[0])
            held.step_all()
            held.loop.open_round()
            held.make_durable()
        assert held.loop.learner.is_halted
        held.kill()
        held.live(2)
        steps = held.loop.learner.steps_done
        held.loop.lift_halt(1)
        held.loop.begin()
        actors = [held.actor(0, 2), held.actor(1, 2)]
        for actor in actors:
            actor.sequence = held.loop.learner.ledger.unrolls(actor.index)
            held.send(actor, held.loop._published[0])
        held.step_all()
        assert held.loop.learner.steps_done > steps
        assert is_same_state(folded(held).learner.state(), held.loop.learner.state())


@pytest.mark.parametrize("mode", ["free", "lockstep"])
def test_a_rate_that_somebody_wrote_stands_in_the_inputs_and_the_journal_gives_the_same(
    tmp_path: Path, mode: str
) -> None:
    lockstep = ("supervisor.lockstep=true",) if mode == "lockstep" else ()
    with bench(
        tmp_path / "run", EVERY, "simic_trainer.training_breaker_failure_threshold=1", *lockstep
    ) as held:
        actors = [held.actor(0), held.actor(1)]
        groups = held.loop.learner.engine.optimisers._by_name["policy"].param_groups
        for _ in range(4):
            groups[0]["lr"] = 0.5
            for actor in actors:
                held.send(actor, held.loop._published[0])
            held.step_all()
            held.loop.open_round()
            held.make_durable()
        stepped = [record.header_as(LearnerStepped) for record in held.records("LearnerStepped")]
        assert stepped[0].inputs is not None
        assert stepped[0].inputs.rates_tampered == 1
        assert any(isinstance(fact, Tampered) for fact in stepped[0].facts)
        assert BreakerOpened(name="training", failures=1) in stepped[0].facts
        fold = _folded_without_tampering(held)
        assert fold == held.loop.learner.state().digest


def _folded_without_tampering(held: Bench) -> str:
    """The digest of the journal's state, where nobody wrote a rate; its facts lack what was found then."""
    from supervisor.roles.fold import LearnerFold

    fold = LearnerFold(held.config, held.journal.directory, held.directory / "checkpoints")
    for record in held.records():
        moved = fold.take(record)
        if isinstance(moved.event, LearnerStepped):
            assert moved.report is not None
            assert moved.state_digest == moved.event.state_digest
    return fold.learner.state().digest


def test_what_only_an_updates_own_check_found_counts_with_the_next(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY) as held:
        optimisers = held.loop.learner.engine.optimisers
        minimise = optimisers.minimise

        def tampering(*arguments: object, **named: object) -> float:
            optimisers._by_name["value"].param_groups[0]["lr"] = 0.5
            optimisers.minimise = minimise  # type: ignore[method-assign]
            return minimise(*arguments, **named)  # type: ignore[arg-type]

        optimisers.minimise = tampering  # type: ignore[method-assign]
        fill(held, [held.actor(0), held.actor(1)], 4)
        inputs = [record.header_as(LearnerStepped).inputs for record in held.records("LearnerStepped")]
        assert [one.rates_tampered for one in inputs[:3] if one is not None] == [0, 1, 0]
