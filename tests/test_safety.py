"""The whole of a training's safety, scripted from each failure to its recovery, and under anything that may come."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic import safety as safeties
from esper_simic.breaker import CircuitBreakerState, VtraceVerdict
from esper_simic.config_safety import SafetyKeys
from esper_simic.errors import InvariantViolation
from esper_simic.ladder import LEVEL_MAX, Epoch, Measure, Response
from esper_simic.rungs import Rung
from esper_simic.safety import Observed, Safety, StepInputs, StepMode, StepOutcome, observe, plan
from esper_simic.safety_facts import (
    BatchGrown,
    BatchShrunk,
    BreakerClosed,
    BreakerHalfOpened,
    BreakerOpened,
    ClipTightened,
    ConservativeModeEntered,
    ConservativeModeLeft,
    ConservativeTriggersAdded,
    FallbackEntered,
    FallbackLeft,
    GoodStateRestored,
    RateLowered,
    SafetyFact,
    SloViolated,
    TrainingHalted,
    TrainingResumed,
)
from esper_simic.slo import OBJECTIVES
from esper_simic.training_health import Health

KEYS = SafetyKeys()
GOOD = StepOutcome(loss=0.1, value_loss=0.2, policy_loss=-0.05, grad_norm=0.5)
POISON = StepOutcome(loss=math.nan, value_loss=math.nan, finite=False)
TOO_LARGE = StepOutcome(out_of_memory=True)
UNSOUND = msgspec.structs.replace(GOOD, vtrace=VtraceVerdict.RATIO_TOO_LARGE)


class Training:
    """A script's training: folds outcomes as time passes, and remembers what happened."""

    def __init__(self, keys: SafetyKeys = KEYS) -> None:
        self.keys, self.safety, self.now_s = keys, Safety(), 1e9
        self.facts: list[SafetyFact] = []
        self.responses: tuple[Response, ...] = ()

    def mode(self) -> StepMode:
        return plan(self.safety, self.keys, self.now_s)

    def step(self, outcome: StepOutcome = GOOD, times: int = 1, passed_s: float = 0.1, **inputs) -> None:
        """Some updates of the same outcome; `facts` and `responses` are those of the last call."""
        self.facts, self.responses = [], ()
        for _ in range(times):
            self.now_s += passed_s
            seen = StepInputs(at_s=self.now_s, **inputs)
            self.safety, facts, self.responses = observe(self.safety, self.keys, outcome, seen)
            self.facts += facts

    def kinds(self) -> list[type]:
        return [type(fact) for fact in self.facts]


def test_a_healthy_training_is_left_alone():
    training = Training()
    training.step(times=1000, previous_step_ms=100.0, memory_fraction=0.5, buffer_bytes=1e9)
    assert training.facts == []
    assert training.mode() == StepMode()
    assert training.mode().batch_size(32) == 32
    judged = safeties.health(training.safety, KEYS, since_cleanup_s=100.0)
    assert judged.level is Health.OK
    training.step(times=100)
    assert training.responses == (Response.KEEP,), "1,100 updates are eleven epochs"


# -- scripted: from failure to recovery --------------------------------------------------------------------------------


def test_out_of_memory():
    training = Training()
    training.step(TOO_LARGE)
    assert training.responses == (Response.SHRINK,)
    assert training.facts == [
        BatchShrunk(factor=0.5),
        ConservativeModeEntered(triggers=("memory_pressure",), entries=1),
    ]
    assert training.mode().batch_size(32) == 16, "halved once, for two reasons"
    training.step(TOO_LARGE)
    assert training.mode().batch_size(32) == 8
    training.step(times=100, passed_s=1.0)
    assert training.facts == [BatchGrown(factor=0.5)]
    assert training.mode().batch_size(32) == 16
    training.step(times=100, passed_s=1.0)
    # Two failures of the first twenty operations are a rate that is not quiet yet for ten updates more.
    left, grown = training.facts
    assert isinstance(left, ConservativeModeLeft)
    assert left.triggers == ("memory_pressure",)
    assert 105 < left.steps < 120
    assert grown == BatchGrown(factor=1.0)
    assert training.mode() == StepMode()


def test_memory_pressure():
    training = Training()
    training.step(memory_fraction=0.95)
    assert training.facts == [ConservativeModeEntered(triggers=("memory_pressure",), entries=1)]
    assert training.mode() == StepMode(
        lr_factor=0.5, batch_factor=0.5, timeout_factor=1.5, is_conservative=True
    )
    training.step(times=100, passed_s=1.0, memory_fraction=0.85)
    assert training.mode().is_conservative, "0.85 is not below 0.9 x 0.9"
    training.step(times=100, passed_s=1.0, memory_fraction=0.8)
    assert training.kinds() == [ConservativeModeLeft]
    assert training.mode() == StepMode()


def test_a_rate_that_was_tampered_with():
    training = Training()
    training.step(times=4, rates_tampered=1)
    assert training.facts == [ConservativeModeEntered(triggers=("training_instability",), entries=1)]
    assert training.safety.training.failures == 4
    training.step(rates_tampered=2)
    assert training.facts[0] == BreakerOpened(name="training", failures=5)
    assert not training.mode().may_step
    assert training.safety.averages.losses == 5, "the updates were made"
    training.step(passed_s=60.0)
    assert BreakerClosed(name="training") in training.facts
    training.step(times=200, passed_s=1.0)
    assert training.mode() == StepMode()


def test_an_exploding_gradient():
    training = Training()
    training.step(msgspec.structs.replace(GOOD, grad_norm=150.0))
    assert training.facts[0] == ClipTightened(factor=0.5, grad_norm=150.0)
    assert training.responses == (Response.TIGHTEN_CLIP,)
    assert training.safety.conservative.triggers == ("training_instability",)
    assert training.mode().clip_factor == 0.5
    training.step(times=50)
    assert training.mode().clip_factor == 1.0
    training.step(times=50, passed_s=2.0)
    assert training.mode() == StepMode()


@pytest.mark.parametrize(
    "outcome",
    [
        POISON,
        msgspec.structs.replace(GOOD, finite=False),
        msgspec.structs.replace(GOOD, grad_norm=math.inf),
        msgspec.structs.replace(GOOD, loss=math.nan),
        msgspec.structs.replace(GOOD, value_loss=1e31),
        msgspec.structs.replace(GOOD, policy_loss=-math.inf),
    ],
)
def test_what_is_not_finite(outcome):
    training = Training()
    training.step(times=10)
    before = training.safety.averages
    training.step(outcome)
    assert training.responses == (Response.RESTORE, Response.SKIP)
    assert training.facts == [
        GoodStateRestored(reason="not_finite"),
        ConservativeModeEntered(triggers=("training_instability",), entries=1),
    ]
    assert training.safety.averages.fast == before.fast
    assert training.mode().may_step
    training.step()
    assert training.safety.training.failures == 0


def test_a_loss_that_rises_for_ten_epochs():
    training = Training()
    training.step(times=100)
    for epoch in range(10):
        assert training.mode().lr_factor == 1.0
        rising = msgspec.structs.replace(GOOD, value_loss=0.2 + 0.03 * (epoch + 1))
        training.step(rising, times=100)
    assert training.facts == [GoodStateRestored(reason="diverging"), RateLowered(factor=0.5, epochs=10)]
    assert training.responses == (Response.RESTORE, Response.LOWER_RATE)
    assert training.mode().lr_factor == 0.5
    training.step(times=999)
    assert training.mode().lr_factor == 0.5
    training.step()
    assert training.mode() == StepMode()


def test_v_trace_that_fails_gives_way_to_td_and_comes_back_by_a_probe():
    training = Training()
    training.step(UNSOUND, times=2)
    assert training.facts == []
    training.step(UNSOUND)
    assert training.facts == [
        BreakerOpened(name="vtrace", failures=3),
        FallbackEntered(targets="td", reason="vtrace_breaker_opened"),
        ConservativeModeEntered(triggers=("circuit_breaker_open",), entries=1),
    ]
    assert training.mode().targets == "td"
    assert training.mode().may_step
    assert training.safety.training.failures == 0, "the updates were made"
    training.step(times=299, passed_s=0.1)
    assert training.mode().targets == "td"
    training.now_s += 0.2
    assert training.mode().targets == "vtrace", "30 s later the next update is the probe"
    training.step(UNSOUND)
    assert training.facts == [
        BreakerHalfOpened(name="vtrace"),
        BreakerOpened(name="vtrace", failures=4),
    ]
    assert training.mode().targets == "td"
    training.now_s += 30
    training.step()
    assert training.facts == [
        BreakerHalfOpened(name="vtrace"),
        BreakerClosed(name="vtrace"),
        FallbackLeft(),
    ]
    assert training.mode().targets == "vtrace"
    training.step(times=100, passed_s=1.0)
    assert training.mode() == StepMode()


@pytest.mark.parametrize("outcome", [POISON, TOO_LARGE])
def test_a_probe_whose_update_is_not_made_has_failed(outcome):
    training = Training()
    training.step(UNSOUND, times=3)
    training.now_s += 30
    training.step(outcome)
    assert BreakerOpened(name="vtrace", failures=4) in training.facts


def test_an_update_that_was_not_made_says_nothing_about_a_v_trace_in_use():
    training = Training()
    training.step(UNSOUND, times=2)
    training.step(POISON, times=1)
    training.step(TOO_LARGE, times=1)
    assert training.safety.vtrace.failures == 2
    training.step(msgspec.structs.replace(POISON, vtrace=VtraceVerdict.NOT_FINITE))
    assert BreakerOpened(name="vtrace", failures=3) in training.facts


def test_repeated_failures_give_way_to_td_then_halt_until_an_operator_resumes():
    training = Training()
    training.step(POISON, times=5)
    assert training.facts[-5:] == [
        BreakerOpened(name="training", failures=5),
        GoodStateRestored(reason="not_finite"),
        FallbackEntered(targets="td", reason="training_breaker_opened"),
        BreakerOpened(name="vtrace", failures=0),
        ConservativeTriggersAdded(triggers=("circuit_breaker_open",)),
    ]
    assert not training.mode().may_step
    with pytest.raises(InvariantViolation, match="training breaker OPEN; ask plan first"):
        training.step()
    for opening in (2, 3):
        training.now_s += 60
        assert training.mode().may_step
        assert training.mode().targets == "td", "V-trace waits until the training's breaker is closed"
        training.step(POISON)
        assert training.facts[:2] == [
            BreakerHalfOpened(name="training"),
            BreakerOpened(name="training", failures=4 + opening),
        ]
    assert TrainingHalted(reason="training_breaker_opened") in training.facts
    assert training.responses == (Response.RESTORE, Response.SKIP, Response.HALT)
    training.now_s += 1e6
    assert training.mode().is_halted
    assert not training.mode().may_step
    assert safeties.health(training.safety, KEYS).checks["training"] is Health.CRIT
    with pytest.raises(InvariantViolation, match="an update on HALTED"):
        training.step()

    training.safety, facts = safeties.resume(training.safety)
    assert facts == [TrainingResumed()]
    assert training.mode().may_step
    assert training.mode().targets == "td"
    training.step()
    assert training.facts == [BreakerHalfOpened(name="training"), BreakerClosed(name="training")]
    assert training.mode().targets == "vtrace"
    training.step()
    assert training.kinds() == [BreakerHalfOpened, BreakerClosed, FallbackLeft]
    with pytest.raises(InvariantViolation, match="cannot RESUME"):
        safeties.resume(training.safety)


def test_a_halt_at_the_update_of_v_traces_good_probe_is_lifted_to_td_all_the_same():
    """The update is sound, and ends the epoch that shows a divergence at the lowest of rates."""
    training = Training()
    training.step(POISON, times=5)
    training.now_s += 60
    training.step()
    assert training.mode().targets == "vtrace", "the probe"
    updates, rising = KEYS.divergence_epoch_updates - 1, KEYS.divergence_epochs - 1
    diverging = Epoch(updates=updates, loss_sum=10.0 * updates, before=1.0, rising=rising, rise_from=0.1)
    climbed = msgspec.structs.replace(training.safety.ladder, rate=Measure(LEVEL_MAX), epoch=diverging)
    training.safety = msgspec.structs.replace(training.safety, ladder=climbed)
    training.step()
    assert training.kinds()[:2] == [BreakerHalfOpened, BreakerClosed]
    assert training.mode().is_halted
    training.safety, _ = safeties.resume(training.safety)
    assert training.mode().targets == "td"
    training.now_s += KEYS.circuit_breaker_recovery_timeout_s
    training.step()
    assert training.kinds() == [BreakerHalfOpened, BreakerClosed, FallbackLeft]


def test_where_no_clock_measures_experiences_nothing_is_said_of_their_number():
    training = Training()
    training.step(times=6000, passed_s=1.0, experiences_since=None)
    assert training.safety.windows["throughput"].latest is None
    assert not training.safety.windows["throughput"].is_violated
    training.step(times=6000, passed_s=1.0, experiences_since=0)
    assert training.safety.windows["throughput"].is_violated


def test_repeated_failures_that_end_come_back_rung_by_rung():
    training = Training()
    training.step(POISON, times=5)
    training.now_s += 60
    assert training.mode().targets == "td"
    training.step()
    assert training.facts == [BreakerHalfOpened(name="training"), BreakerClosed(name="training")]
    assert training.safety.ladder.standing.openings == 0
    assert training.mode().targets == "vtrace"
    training.step()
    assert training.facts[-1] == FallbackLeft()
    training.step(times=200, passed_s=1.0)
    assert training.mode() == StepMode()


def test_slow_updates_and_the_time_they_get_in_conservative_mode():
    training = Training()
    training.step(times=300, passed_s=0.6, previous_step_ms=600.0)
    assert training.kinds() == [SloViolated, ConservativeModeEntered]
    assert training.facts[0] == SloViolated(objective="step_latency", value=1.0, target=0.05)
    assert training.facts[1] == ConservativeModeEntered(triggers=("slo_violation",), entries=1)
    # 600 ms is within 1.5 x 500: once the slow ones are few, the objective is met, and the mode is left.
    training.step(times=3500, passed_s=0.6, previous_step_ms=600.0)
    assert training.mode().is_conservative
    training.step(times=3000, passed_s=0.6, previous_step_ms=600.0)
    assert ConservativeModeLeft in training.kinds()


def test_other_violations_call_for_nothing_that_would_not_mend_them():
    training = Training()
    training.step(
        times=4000, passed_s=60.0, previous_boundary_ms=100.0, experiences_since=1, buffer_bytes=7e9
    )
    violated = {fact.objective for fact in training.facts if isinstance(fact, SloViolated)}
    assert violated == {"epoch_boundary", "throughput", "buffer_bytes"}
    assert training.mode() == StepMode()
    assert safeties.health(training.safety, KEYS).checks["objectives"] is Health.WARN


def test_errors_of_operations():
    training = Training()
    training.step(times=200, operations_since=4, errors_since=1)
    assert training.facts == [ConservativeModeEntered(triggers=("high_error_rate",), entries=1)]
    training.step(times=400, operations_since=4, passed_s=1.0)
    assert training.kinds() == [ConservativeModeLeft]


def test_more_than_two_entries_a_day_are_too_many():
    training = Training()
    for entries in (1, 2, 3):
        training.step(memory_fraction=0.95)
        expected = [ConservativeModeEntered, SloViolated] if entries == 3 else [ConservativeModeEntered]
        assert training.kinds() == expected
        training.step(times=100, passed_s=1.0)
    assert safeties.reports(training.safety, KEYS)[6].value == 3.0


def test_open_breakers_are_counted_once():
    training = Training()
    training.step(POISON, times=5)
    training.now_s += 60
    training.step()
    value = {it.objective: it.value for it in safeties.reports(training.safety, KEYS)}["breaker_open"]
    assert value == pytest.approx(60.0 / 86_400)


def test_returns_and_sweeps_reach_their_objectives():
    training = Training(SafetyKeys(improvement_window_episodes=2, convergence_time_hours=1))
    for mean in (0.0, 1.0, 2.0, 1.0):
        training.step(msgspec.structs.replace(GOOD, returns=(mean, mean)), passed_s=3600.0)
    training.step(expired_since=100, removed_since=98)
    figures = {it.objective: it for it in safeties.reports(training.safety, training.keys, 5.0)}
    assert list(figures) == list(OBJECTIVES)
    assert figures["improvement"].value == pytest.approx(1.0)
    assert figures["convergence"].value == pytest.approx(2.0)
    assert figures["convergence"].is_violated
    assert figures["ttl_cleanup"].value == pytest.approx(0.98)
    assert figures["buffer_bytes"].value is None
    assert figures["buffer_bytes"].target == 5.0


def test_a_clock_that_is_set_back_neither_wakes_nor_blocks_a_training():
    training = Training()
    training.step(POISON, times=5)
    training.now_s -= 1e6
    assert not training.mode().may_step
    training.safety = msgspec.structs.replace(training.safety)
    opened_s = training.now_s
    training.now_s = opened_s + 1e6 + 59.9
    assert not training.mode().may_step
    training.now_s += 0.2
    assert training.mode().may_step


# -- laws --------------------------------------------------------------------------------------------------------------

OUTCOMES = st.one_of(
    st.just(GOOD),
    st.just(POISON),
    st.just(TOO_LARGE),
    st.just(UNSOUND),
    st.builds(
        StepOutcome,
        loss=st.floats(-5, 5),
        value_loss=st.floats(0, 5),
        policy_loss=st.floats(-5, 5),
        grad_norm=st.floats(0, 300),
        returns=st.lists(st.floats(-10, 10), max_size=3).map(tuple),
    ),
)
INPUTS = st.fixed_dictionaries(
    {
        "previous_step_ms": st.none() | st.integers(0, 1000),
        "previous_boundary_ms": st.none() | st.floats(0, 40),
        "memory_fraction": st.floats(0, 1.1),
        "operations_since": st.integers(3, 9),
        "errors_since": st.integers(0, 3),
        "experiences_since": st.integers(0, 100),
        "buffer_bytes": st.none() | st.integers(0, 10**10),
        "expired_since": st.integers(5, 9),
        "removed_since": st.integers(0, 5),
    }
)
FAST_KEYS = SafetyKeys(
    circuit_breaker_recovery_timeout_s=5,
    training_breaker_recovery_timeout_s=10,
    training_breaker_failure_threshold=2,
    conservative_quiet_steps=2,
    conservative_quiet_s=3,
    divergence_epoch_updates=1,
    divergence_epochs=2,
    clip_recovery_steps=2,
    batch_recovery_steps=2,
    rate_recovery_epochs=1,
    improvement_window_episodes=2,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(OUTCOMES, INPUTS, st.integers(-20, 40)), max_size=40),
    st.sampled_from([8, 32, 256]),
)
def test_whatever_comes_the_fold_is_lawful(sequence, configured):
    safety, now_s = Safety(), 0
    for outcome, inputs, passed_s in sequence:
        now_s += passed_s
        mode = plan(safety, FAST_KEYS, now_s)
        assert plan(safety, FAST_KEYS, now_s) == mode
        seen = StepInputs(at_s=now_s, **inputs)
        if not mode.may_step:
            with pytest.raises(InvariantViolation):
                observe(safety, FAST_KEYS, outcome, seen)
            if mode.is_halted:
                safety, _ = safeties.resume(safety)
            continue
        assert mode.batch_size(configured) in {8, 16, 32, 64, 128, 256}
        assert mode.batch_size(configured) <= configured
        after = observe(safety, FAST_KEYS, outcome, seen)
        assert after == observe(safety, FAST_KEYS, outcome, seen)
        check_laws(safety, after, mode)
        safety = after.safety


def check_laws(before: Safety, after: Observed, mode: StepMode) -> None:
    safety, facts, responses = after
    # The state is made of JSON types, and comes back from them to the bit: a checkpoint's digest holds.
    builtins = msgspec.to_builtins(safety)
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(builtins)), Safety)
    assert again == safety
    assert repr(msgspec.to_builtins(again)) == repr(builtins)
    assert all(msgspec.json.decode(msgspec.json.encode(fact), type=type(fact)) == fact for fact in facts)
    # V-trace is used where its breaker closed, or for the probe; the rung says which.
    assert (safety.vtrace.state is CircuitBreakerState.CLOSED) == (safety.ladder.standing.rung is Rung.VTRACE)
    assert safety.vtrace.state is not CircuitBreakerState.HALF_OPEN, "a probe is answered where it is made"
    assert safety.training.state is not CircuitBreakerState.HALF_OPEN
    # Each mode is a function of what is on now.
    later = plan(safety, FAST_KEYS, 0.0)
    assert later.timeout_factor == (1.5 if safety.conservative.active else 1.0)
    assert later.lr_factor == (0.5 if safety.conservative.active else 1.0) * 0.5**safety.ladder.rate.level
    halves = max(int(safety.conservative.active), safety.ladder.batch.level)
    assert later.batch_factor == 0.5**halves
    # Facts tell exactly what changed.
    entered = sum(isinstance(fact, ConservativeModeEntered) for fact in facts)
    left = sum(isinstance(fact, ConservativeModeLeft) for fact in facts)
    assert safety.conservative.active - before.conservative.active == entered - left
    assert (Response.HALT in responses) == any(isinstance(fact, TrainingHalted) for fact in facts)
    assert mode.is_conservative == before.conservative.active


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(OUTCOMES, INPUTS, st.integers(0, 40)), max_size=15))
def test_in_the_end_every_mode_is_undone(sequence):
    training = Training(FAST_KEYS)
    for outcome, inputs, passed_s in sequence:
        training.now_s += passed_s
        if training.mode().is_halted:
            training.safety, _ = safeties.resume(training.safety)
        if training.mode().may_step:
            training.step(outcome, **inputs)
    if training.mode().is_halted:
        training.safety, _ = safeties.resume(training.safety)
    training.now_s += 100
    training.step(times=250, passed_s=10.0)
    assert training.mode() == StepMode()
    assert training.mode().batch_size(64) == 64
