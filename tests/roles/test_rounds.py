"""Whose turn it is in lockstep: the schedule alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from supervisor.protocol import Unroll
from supervisor.roles.rounds import Arrived, Rounds
from tests.policies.synthetic import make_policy, trajectory

ACTORS = 3
TRAJECTORY = trajectory(make_policy(), 0, 2, 1)


def unroll(actor: int, number: int, life: int = 1) -> Arrived:
    message = Unroll(
        actor=actor,
        incarnation=life,
        sequence=number,
        policy_version=0,
        lanes=1,
        steps=2,
        episode_numbers=[0],
        episodes=[],
    )
    return Arrived(f"actor-{actor}-{life}", message, (), TRAJECTORY)


class Schedule:
    """Rounds over counts that a test moves as the learner's fold would."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts = Counter(counts or {})
        self.rounds = Rounds(ACTORS, lambda actor: self.counts[actor])

    def is_open(self) -> bool:
        return self.rounds.is_open

    def take_all(self) -> list[tuple[int, int]]:
        """Admit what can be admitted: actor and number."""
        taken = []
        while (arrived := self.rounds.take()) is not None:
            self.counts[arrived.message.actor] += 1
            taken.append((arrived.message.actor, arrived.message.sequence))
        return taken


def test_nothing_is_admitted_before_the_first_round_is_opened() -> None:
    schedule = Schedule()
    assert not schedule.is_open()
    schedule.rounds.offer(unroll(0, 1))
    assert schedule.take_all() == []
    schedule.rounds.open()
    assert schedule.is_open()
    assert schedule.take_all() == [(0, 1)]


@given(st.lists(st.permutations(range(ACTORS)), min_size=1, max_size=6), st.data())
def test_whatever_the_arrival_the_order_of_admission_is_the_actors(
    arrivals: list[list[int]], data: st.DataObject
) -> None:
    schedule = Schedule()
    admitted: list[tuple[int, int]] = []
    for number, order in enumerate(arrivals, start=1):
        assert not schedule.is_open()
        schedule.rounds.open()
        for actor in order:
            assert schedule.is_open()
            schedule.rounds.offer(unroll(actor, number))
            if data.draw(st.booleans()):
                admitted += schedule.take_all()
        admitted += schedule.take_all()
    rounds = range(1, len(arrivals) + 1)
    assert admitted == [(actor, number) for number in rounds for actor in range(ACTORS)]
    assert not schedule.is_open()


def test_one_that_comes_early_waits_for_those_before_it() -> None:
    schedule = Schedule()
    schedule.rounds.open()
    schedule.rounds.offer(unroll(2, 1))
    schedule.rounds.offer(unroll(1, 1))
    assert schedule.take_all() == []
    schedule.rounds.offer(unroll(0, 1))
    assert schedule.take_all() == [(0, 1), (1, 1), (2, 1)]


def test_the_present_round_follows_from_the_counts_alone() -> None:
    begun = Schedule({0: 5, 1: 4, 2: 4})
    assert begun.is_open()
    assert begun.rounds.admitted() == [0]
    begun.rounds.offer(unroll(2, 5))
    begun.rounds.offer(unroll(1, 5))
    assert begun.take_all() == [(1, 5), (2, 5)]
    assert not begun.is_open()
    assert begun.rounds.admitted() == [], "between two rounds nobody waits for anything"

    whole = Schedule({0: 5, 1: 5, 2: 5})
    assert not whole.is_open()
    assert whole.rounds.admitted() == []
    whole.rounds.open()
    assert whole.rounds.admitted() == []
    assert whole.is_open()


def test_what_a_dead_life_sent_ahead_is_forgotten() -> None:
    schedule = Schedule()
    schedule.rounds.open()
    schedule.rounds.offer(unroll(1, 1, life=1))
    schedule.rounds.forget(1)
    schedule.rounds.forget(2)
    schedule.rounds.offer(unroll(0, 1))
    assert schedule.take_all() == [(0, 1)]
    schedule.rounds.offer(unroll(1, 1, life=2))
    arrived = schedule.rounds.take()
    assert arrived is not None
    assert arrived.message.incarnation == 2
