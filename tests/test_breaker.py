"""Circuit breakers: the table, thresholds, the one probe, and clocks that go back."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.breaker import (
    FOLLOWERS,
    MOVES,
    RULES,
    Breaker,
    BreakerRule,
    CircuitBreakerState,
    Clock,
    Move,
    VtraceRatios,
    VtraceVerdict,
    advance,
    allows,
    attempted,
    failed,
    judge_vtrace,
    next_state,
    observed,
    rule,
    succeeded,
    tripped,
)
from esper_simic.config_safety import SafetyKeys
from esper_simic.errors import InvariantViolation
from esper_simic.safety_facts import BreakerClosed, BreakerHalfOpened, BreakerOpened

CLOSED, OPEN, HALF_OPEN = CircuitBreakerState.CLOSED, CircuitBreakerState.OPEN, CircuitBreakerState.HALF_OPEN
RULE = BreakerRule(3, 30.0)


def opened(at_s: float = 0.0) -> Breaker:
    breaker = observed(RULE, Breaker(name="storage"), 0.0)
    for _ in range(3):
        breaker, _ = failed(RULE, breaker, at_s)
    return breaker


def test_states_are_numbered_as_on_the_wire():
    assert {state.name: state.value for state in CircuitBreakerState} == {
        "CLOSED": 1,
        "OPEN": 2,
        "HALF_OPEN": 3,
    }


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("state", CircuitBreakerState)
def test_a_move_is_in_the_table_or_illegal(state, move):
    legal = {
        (CLOSED, Move.SUCCEED): CLOSED,
        (CLOSED, Move.FAIL): CLOSED,
        (CLOSED, Move.TRIP): OPEN,
        (OPEN, Move.SUCCEED): OPEN,
        (OPEN, Move.FAIL): OPEN,
        (OPEN, Move.PROBE): HALF_OPEN,
        (HALF_OPEN, Move.SUCCEED): CLOSED,
        (HALF_OPEN, Move.TRIP): OPEN,
        (HALF_OPEN, Move.PROBE): HALF_OPEN,
    }
    assert legal == MOVES
    if (state, move) in legal:
        assert next_state(state, move) is legal[state, move]
    else:
        with pytest.raises(InvariantViolation, match=f"cannot {move.name} while it is {state.name}"):
            next_state(state, move)


def test_the_named_breakers_have_the_platforms_numbers():
    assert {name: (r.failure_threshold, r.recovery_timeout_s) for name, r in RULES.items()} == {
        "training": (5, 60),
        "vtrace": (3, 30),
        "curriculum": (5, 120),
        "storage": (3, 30),
        "sampling": (5, 30),
        "processing": (3, 60),
        "publication": (3, 30),
        "validation": (3, 30),
        "generic": (3, 30),
    }


@pytest.mark.parametrize("name", RULES)
def test_the_defaults_of_the_configuration_are_the_tables(name):
    assert rule(name, SafetyKeys()) == RULES[name]


@pytest.mark.parametrize("name", RULES)
def test_the_keys_move_those_breakers_that_have_no_numbers_of_their_own(name):
    keys = SafetyKeys(
        circuit_breaker_failure_threshold=7,
        circuit_breaker_recovery_timeout_s=11,
        training_breaker_failure_threshold=9,
        training_breaker_recovery_timeout_s=13,
    )
    moved = {name: BreakerRule(7, 11.0) for name in FOLLOWERS} | {"training": BreakerRule(9, 13.0)}
    assert rule(name, keys) == moved.get(name, RULES[name])


def test_an_unknown_breaker_is_a_contradiction():
    with pytest.raises(InvariantViolation, match="'trainig'; known: training"):
        rule("trainig", SafetyKeys())


def test_only_failures_in_a_row_open_it():
    breaker = Breaker(name="storage")
    for now_s in range(20):
        breaker, facts = failed(RULE, breaker, now_s)
        assert facts == []
        breaker, facts = failed(RULE, breaker, now_s)
        assert facts == []
        breaker, facts = succeeded(RULE, breaker, now_s)
        assert facts == []
        assert breaker.failures == 0
    assert breaker.state is CLOSED
    assert breaker.openings == 0


def test_from_failure_to_recovery():
    breaker = observed(RULE, Breaker(name="storage"), 100.0)
    for _ in range(2):
        breaker, facts = failed(RULE, breaker, 100.0)
        assert facts == []
        assert allows(RULE, breaker, 100.0)
    breaker, facts = failed(RULE, breaker, 100.0)
    assert facts == [BreakerOpened(name="storage", failures=3)]
    assert not allows(RULE, breaker, 129.9)
    with pytest.raises(InvariantViolation, match="storage breaker is OPEN"):
        attempted(RULE, breaker, 129.9)
    assert allows(RULE, breaker, 130.0)
    breaker, facts = attempted(RULE, breaker, 130.0)
    assert facts == [BreakerHalfOpened(name="storage")]
    assert not allows(RULE, breaker, 131.0), "there is one probe"
    breaker, facts = succeeded(RULE, breaker, 131.0)
    assert facts == [BreakerClosed(name="storage")]
    assert breaker.state is CLOSED
    assert breaker.failures == 0
    assert breaker.open_s == 30.0
    breaker, facts = attempted(RULE, breaker, 200.0)
    assert facts == []
    assert breaker.open_s == 30.0, "closed time is not open time"


def test_a_failed_probe_opens_it_for_another_recovery_time():
    breaker, _ = attempted(RULE, opened(), 30.0)
    breaker, facts = failed(RULE, breaker, 31.0)
    assert facts == [BreakerOpened(name="storage", failures=4)]
    assert breaker.openings == 2
    assert not allows(RULE, breaker, 60.9)
    assert allows(RULE, breaker, 61.0)
    assert observed(RULE, breaker, 41.0).open_s == 40.0


def test_it_refuses_for_its_recovery_time_however_long_nobody_asks():
    assert observed(RULE, opened(), 29.0).open_s == 29.0
    late = observed(RULE, opened(), 1e6)
    assert late.state is OPEN
    assert late.open_s == 30.0
    assert observed(RULE, late, 2e6).open_s == 30.0


def test_a_probe_that_never_answers_is_given_up_after_a_recovery_time():
    breaker, _ = attempted(RULE, opened(), 30.0)
    assert not allows(RULE, breaker, 59.0)
    breaker, facts = attempted(RULE, breaker, 60.0)
    assert facts == [BreakerHalfOpened(name="storage")]
    assert breaker.state is HALF_OPEN
    assert not allows(RULE, breaker, 61.0)


def test_late_answers_of_attempts_from_before_the_opening_change_nothing():
    breaker = opened()
    for late in (succeeded(RULE, breaker, 5.0), failed(RULE, breaker, 5.0)):
        assert late == (observed(RULE, breaker, 5.0), [])


def test_tripped_for_anothers_failures():
    breaker, facts = tripped(RULE, Breaker(name="vtrace"), 10.0)
    assert facts == [BreakerOpened(name="vtrace", failures=0)]
    assert breaker.state is OPEN
    again, facts = tripped(RULE, breaker, 30.0)
    assert facts == []
    assert again.openings == 1
    assert allows(RULE, breaker, 40.0)
    assert not allows(RULE, again, 40.0), "it begins to wait anew"


def test_a_clock_that_goes_back_neither_shortens_nor_lengthens_the_wait():
    breaker = observed(RULE, opened(at_s=1000.0), 1010.0)
    breaker = observed(RULE, breaker, 4.0)
    assert breaker.open_s == 10.0
    assert not allows(RULE, breaker, 23.9)
    assert allows(RULE, breaker, 24.0)


@given(st.lists(st.floats(-1e6, 1e6)))
def test_elapsed_time_never_falls(readings):
    clock = Clock()
    for reading in readings:
        later = advance(clock, reading)
        assert later.elapsed_s >= clock.elapsed_s
        assert later.reading_s == reading
        clock = later


STEPS = st.lists(
    st.tuples(st.sampled_from(["attempt", "succeed", "fail", "trip", "look"]), st.integers(-50, 100)),
    max_size=60,
)


@given(STEPS)
def test_no_sequence_leads_to_an_illegal_move(steps):
    breaker, now_s = Breaker(name="storage"), 0.0
    for step, passed_s in steps:
        now_s += passed_s
        before = breaker
        match step:
            case "attempt" if allows(RULE, breaker, now_s):
                breaker, _ = attempted(RULE, breaker, now_s)
            case "succeed":
                breaker, _ = succeeded(RULE, breaker, now_s)
            case "fail":
                breaker, _ = failed(RULE, breaker, now_s)
            case "trip":
                breaker, _ = tripped(RULE, breaker, now_s)
            case _:
                breaker = observed(RULE, breaker, now_s)
        assert any(pair[0] is before.state and state is breaker.state for pair, state in MOVES.items())
        assert 0 <= breaker.open_s <= breaker.clock.elapsed_s
        assert breaker.open_s >= before.open_s
        assert (breaker.state is CLOSED) <= (breaker.failures < RULE.failure_threshold)
        again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(breaker)), Breaker)
        assert again == breaker
        assert repr(again) == repr(breaker)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((True, 0.0, 1.0), VtraceVerdict.SOUND),
        ((True, 20.0, 100.0), VtraceVerdict.SOUND),
        ((True, -5.0, 0.01), VtraceVerdict.SOUND),
        ((False, 0.0, 1.0), VtraceVerdict.NOT_FINITE),
        ((True, 20.1, 1.0), VtraceVerdict.RATIO_TOO_LARGE),
        ((True, float("nan"), 1.0), VtraceVerdict.RATIO_TOO_LARGE),
        ((True, 0.0, 100.1), VtraceVerdict.MEAN_OUT_OF_RANGE),
        ((True, 0.0, 0.009), VtraceVerdict.MEAN_OUT_OF_RANGE),
        ((True, 0.0, float("nan")), VtraceVerdict.MEAN_OUT_OF_RANGE),
    ],
)
def test_vtrace_is_judged_by_what_it_gave(ratios, verdict):
    finite, log_ratio_max, mean_ratio = ratios
    seen = VtraceRatios(finite=finite, log_ratio_max=log_ratio_max, mean_ratio=mean_ratio)
    assert judge_vtrace(seen, SafetyKeys()) is verdict


def test_safety_imports_without_torch():
    code = "import sys, esper_simic.safety, esper_simic.config_safety; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
