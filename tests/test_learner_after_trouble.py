"""The learner after trouble from outside: a rate that somebody wrote, memory that ran short, a halt that is lifted."""

from __future__ import annotations

from typing import Any

import msgspec

from esper_simic.breaker import CircuitBreakerState
from esper_simic.events import EpisodeFinished, HaltLifted, StepFailed
from esper_simic.rate_facts import Tampered
from esper_simic.safety import StepInputs
from esper_simic.safety_facts import (
    BreakerOpened,
    ConservativeModeEntered,
    GoodStateRestored,
    TrainingResumed,
)
from esper_simic.step_report import StepReport
from tests.test_learner_safety import (
    EPOCHS,
    FRAIL,
    GPU_IS_FULL,
    NOT_FINITE,
    Script,
    is_same,
    living,
    recorded,
    reloaded,
)

# -- a rate that somebody else wrote -----------------------------------------------------------------------------------


def tamper(script: Script, rate: float = 7.0) -> None:
    script.learner.engine.optimisers._by_name["policy"].param_groups[0]["lr"] = rate


def step_tampered(script: Script, passed_s: float = 1.0) -> tuple[StepReport, StepInputs]:
    """One update, of which the inputs say what the role would have found before it."""
    tamper(script)
    while not script.learner.can_step():
        script.admit()
    found = script.learner.learning_rates.tampered()
    inputs = msgspec.structs.replace(script.inputs(passed_s), rates_tampered=found)
    return script.learner.step(inputs), inputs


def test_rates_are_compared_before_a_step() -> None:
    script = Script(unrolls=8)
    rates = script.learner.learning_rates
    assert rates.tampered() == 0
    tamper(script, float("nan"))
    assert rates.tampered() == 1
    script.learner.engine.optimisers._by_name["value"].param_groups[0]["lr"] = 1.0
    assert rates.tampered() == 2
    script.step()
    assert rates.tampered() == 0, "the step wrote its own back"


def test_a_tampered_rate_is_a_failure_of_the_trainings_breaker_and_makes_careful() -> None:
    script = Script("simic_trainer.training_breaker_failure_threshold=2", unrolls=8)
    report, _ = step_tampered(script)
    assert not report.failure, "the update was made, by the controller's own rate"
    assert any(isinstance(fact, Tampered) for fact in report.facts)
    assert ConservativeModeEntered(triggers=("training_instability",), entries=1) in report.facts
    assert script.learner.safety.training.failures == 1
    assert script.mode().lr_factor == 0.5
    report, _ = step_tampered(script)
    assert BreakerOpened(name="training", failures=2) in report.facts
    assert not script.mode().may_step
    assert script.mode(60.0).may_step
    script.step(60.0)
    assert script.learner.safety.training.state is CircuitBreakerState.CLOSED


def test_somebody_who_always_tampers_halts_nothing() -> None:
    script = Script(
        "simic_trainer.training_breaker_failure_threshold=1", "simic_trainer.halt_after_openings=2", unrolls=8
    )
    for _ in range(4):
        step_tampered(script, 60.0)
    assert script.learner.safety.training.openings == 4
    assert not script.learner.is_halted, "each update is as good as without"


def test_the_record_alone_gives_the_same_where_nobody_tampers() -> None:
    script, twin = Script(unrolls=8), Script(unrolls=8)
    _, inputs = step_tampered(script)
    assert twin.learner.step(inputs).digest
    assert twin.learner.learning_rates.tampered() == 0
    assert is_same(script.learner, twin.learner)
    assert is_same(reloaded(script.learner), twin.learner)


# -- memory that ran short ---------------------------------------------------------------------------------------------


def trained(*assignments: str) -> Script:
    """Two updates after the last good state."""
    script = Script(*EPOCHS, *assignments, unrolls=8)
    script.shown(value_loss=3.0)
    script.shown(value_loss=4.0)
    return script


def test_what_was_learned_stays_where_nothing_had_moved() -> None:
    script = trained()
    before = living(script.learner.state())
    good = script.learner.engine._good
    assert good is not None
    report = script.failing(GPU_IS_FULL)
    assert report.out_of_memory
    assert not report.moved
    assert not any(isinstance(fact, GoodStateRestored) for fact in report.facts)
    assert living(script.learner.state()) == before
    assert report.digest == script.reports[-2].digest


def test_what_had_moved_goes_back() -> None:
    script = trained()
    before = living(script.learner.state())
    report = script.failing(GPU_IS_FULL, made=True)
    assert report.moved
    assert report.facts[-1] == GoodStateRestored(reason="out_of_memory")
    assert living(script.learner.state()) != before


def test_an_optimiser_that_had_only_begun_counts_as_moved() -> None:
    script = trained()

    def short(name: str, **arguments: Any) -> Any:
        GPU_IS_FULL()

    script.learner.learning_rates.step = short  # type: ignore[method-assign]
    assert script.step().moved


def test_a_record_says_whether_it_went_back_and_an_older_one_says_yes() -> None:
    for made in (False, True):
        script, twin = trained(), trained()
        report = script.failing(GPU_IS_FULL, made=made)
        inputs = twin.inputs()
        while not twin.learner.can_step():
            twin.admit()
        event = msgspec.structs.replace(recorded(report, inputs), moved=report.moved)
        assert twin.learner.fail(event).facts == report.facts
        assert is_same(script.learner, twin.learner)
    old = msgspec.to_builtins(event)
    del old["moved"]
    assert msgspec.convert(old, StepFailed).moved


# -- a halt that is lifted ---------------------------------------------------------------------------------------------


def halted() -> Script:
    script = Script(*FRAIL, unrolls=4)
    script.failing(NOT_FINITE)
    script.now_s += 60.0
    script.failing(NOT_FINITE)
    assert script.learner.is_halted
    return script


def test_an_operators_order_lets_a_halted_training_go_on_with_td_first() -> None:
    script = halted()
    before = script.learner.state().digest
    lifted = script.learner.lifted(3)
    assert lifted == HaltLifted(order=3, facts=[TrainingResumed()])
    assert script.learner.state().digest == before, "asking changes nothing"
    script.learner.lift(lifted)
    assert not script.learner.is_halted
    assert not script.mode().may_step, "the breaker of the training waits as ever"
    assert (script.mode(60.0).may_step, script.mode(60.0).targets) == (True, "td")
    assert not script.step(60.0).failure
    assert script.learner.lifted(4) is None, "there is nothing to lift"


def test_one_order_lifts_one_halt_in_whatever_life() -> None:
    script = halted()
    lifted = script.learner.lifted(1)
    assert lifted is not None
    script.learner.lift(lifted)
    script.now_s += 60.0
    script.failing(NOT_FINITE)
    script.now_s += 60.0
    script.failing(NOT_FINITE)
    assert script.learner.is_halted
    for learner in (script.learner, reloaded(script.learner)):
        assert learner.lifted(1) is None
        assert learner.lifted(0) is None
        assert learner.lifted(2) is not None
    assert is_same(script.learner, reloaded(script.learner))


# -- where the mean return stands --------------------------------------------------------------------------------------


def test_the_time_of_the_last_new_height_is_among_the_figures_once_there_is_one() -> None:
    script = Script("simic_trainer.improvement_window_episodes=2", unrolls=4)
    assert "convergence_hours" not in script.step(1.0).metrics
    heights = []
    for value in (1.0, 1.0, 9.0, 9.0, 2.0, 2.0):
        script.admit(episodes=(ended(value),))
        heights.append(script.step(1800.0).metrics.get("convergence_hours"))
    assert heights == [None, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert script.learner.safety.improvement.best_s == 7200.0


def ended(value: float) -> EpisodeFinished:
    return EpisodeFinished(
        lane=0, number=0, episode_return=value, length=3, accuracy=50.0, truncated=False, cut=False
    )
