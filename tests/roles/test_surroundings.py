"""What is read of the outside for each update: by clocks that a test moves, and the machine's memory."""

from __future__ import annotations

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.safety import StepInputs
from supervisor import memory
from supervisor.bus import Poller
from supervisor.clock import ManualClock
from supervisor.roles import surroundings as surroundings_module
from supervisor.roles.surroundings import MEMORY_INTERVAL_S, Surroundings


class Waiting(Poller):
    """Waits by a clock that a test moves."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout_ms: float) -> frozenset[int | zmq.Socket[bytes]]:
        self._clock.advance(timeout_ms / 1000)
        return frozenset()


class Machine:
    """Memory that a test sets, and how often it was looked at."""

    def __init__(self) -> None:
        self.available, self.looks = 250, 0

    def machine_available_bytes(self) -> int:
        self.looks += 1
        return self.available

    def machine_total_bytes(self) -> int:
        return 1000


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(surroundings_module, "memory", made)
    return made


@pytest.fixture
def clock(machine: Machine) -> ManualClock:
    return ManualClock(now_s=5000.0, monotonic_s=3.0)


def update(surroundings: Surroundings, clock: ManualClock, took_s: float) -> StepInputs:
    inputs = surroundings.before_step()
    clock.advance(took_s)
    surroundings.after_step()
    return inputs


def test_the_first_update_knows_of_none_before(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    clock.advance(4.0)
    surroundings.wait(Waiting(clock), 1000.0)
    assert surroundings.now_s() == 5005.0
    assert surroundings.before_step() == StepInputs(at_s=5005.0, memory_fraction=0.75)


def test_an_update_is_told_how_long_the_one_before_took_and_what_lay_between(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    update(surroundings, clock, 0.25)
    clock.advance(0.010)
    surroundings.wait(Waiting(clock), 500.0)
    clock.advance(0.005)
    surroundings.wait(Waiting(clock), 70.0)
    second = update(surroundings, clock, 0.125)
    assert second.previous_step_ms == pytest.approx(250.0)
    assert second.previous_boundary_ms == pytest.approx(15.0), "waiting is no work"
    clock.advance(0.002)
    third = update(surroundings, clock, 1.0)
    assert third.previous_step_ms == pytest.approx(125.0)
    assert third.previous_boundary_ms == pytest.approx(2.0), "the waits of before are forgotten"


def test_waits_before_the_first_update_are_no_part_of_the_first_boundary(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    surroundings.wait(Waiting(clock), 9000.0)
    update(surroundings, clock, 0.1)
    clock.advance(0.03)
    assert surroundings.before_step().previous_boundary_ms == pytest.approx(30.0)


def test_the_time_of_safety_is_the_wall_clocks_and_durations_are_not(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    update(surroundings, clock, 0.5)
    clock.set_now(9000.0)
    inputs = surroundings.before_step()
    assert (inputs.at_s, surroundings.now_s()) == (9000.0, 9000.0)
    assert inputs.previous_step_ms == pytest.approx(500.0)
    assert inputs.previous_boundary_ms == 0.0


def test_a_wall_clock_that_is_set_back_is_time_in_which_nothing_passed(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    update(surroundings, clock, 0.5)
    clock.set_now(10.0)
    assert (surroundings.before_step().at_s, surroundings.now_s()) == (5000.0, 5000.0), (
        "never read in between"
    )
    clock.advance(2.0)
    assert (surroundings.before_step().at_s, surroundings.now_s()) == (5002.0, 5002.0)


def test_time_goes_on_from_the_newest_instant_that_is_known(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    surroundings.go_on_from(None, 7000.0, 6000.0)
    assert surroundings.now_s() == 7000.0
    clock.advance(1.5)
    assert surroundings.before_step().at_s == 7001.5
    behind = Surroundings(clock)
    behind.go_on_from(None, 4000.0)
    assert behind.now_s() == 5001.5, "the wall clock itself, where it is ahead"


@given(
    st.lists(st.floats(-1e10, 1e10) | st.floats(-1, 1), min_size=1, max_size=40),
    st.none() | st.floats(0, 1e10),
)
def test_whatever_becomes_of_a_wall_clock_the_time_never_falls_and_steps_forward_count(
    steps: list[float], known_s: float | None
) -> None:
    clock = ManualClock(now_s=1e9)
    surroundings = Surroundings(clock)
    surroundings.go_on_from(known_s)
    before_s = surroundings.now_s()
    assert before_s == max(1e9, known_s or 0.0)
    for step_s in steps:
        clock.set_now(clock.now_s() + step_s)
        now_s = surroundings.now_s()
        assert now_s >= before_s
        assert now_s - before_s == pytest.approx(max(0.0, step_s), abs=1e-4)
        before_s = now_s


def test_operations_are_counted_from_update_to_update(clock: ManualClock) -> None:
    surroundings = Surroundings(clock)
    surroundings.happened(experiences=4)
    surroundings.happened(failed=True)
    surroundings.happened(experiences=3)
    inputs = update(surroundings, clock, 0.1)
    assert (inputs.operations_since, inputs.errors_since, inputs.experiences_since) == (3, 1, 7)
    surroundings.happened(failed=True)
    inputs = update(surroundings, clock, 0.1)
    assert (inputs.operations_since, inputs.errors_since, inputs.experiences_since) == (1, 1, 0)
    inputs = update(surroundings, clock, 0.1)
    assert (inputs.operations_since, inputs.errors_since, inputs.experiences_since) == (0, 0, 0)


def test_memory_is_looked_at_once_a_second(clock: ManualClock, machine: Machine) -> None:
    surroundings = Surroundings(clock)
    assert surroundings.before_step().memory_fraction == 0.75
    machine.available = 100
    clock.advance(MEMORY_INTERVAL_S / 2)
    assert surroundings.before_step().memory_fraction == 0.75
    assert machine.looks == 1
    clock.advance(MEMORY_INTERVAL_S / 2)
    assert surroundings.before_step().memory_fraction == 0.9
    assert machine.looks == 2


def test_of_a_real_machine_some_of_the_memory_is_in_use() -> None:
    fraction = Surroundings(ManualClock()).before_step().memory_fraction
    assert 0.0 < fraction < 1.0
    assert memory.machine_total_bytes() > memory.machine_available_bytes()
