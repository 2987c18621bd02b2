"""The learner's books of its actors, and what they say after they were written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.events import EpisodeFinished, ExperienceAdmitted, ExperienceRefused
from esper_simic.ledger import EPISODE_WINDOW, NOT_LIVING, Ledger, Unconsumed

LANES = 2


def episode(lane: int = 0, number: int = 0, **fields: Any) -> EpisodeFinished:
    defaults: dict[str, Any] = {"episode_return": 1.0, "length": 5, "truncated": False}
    return EpisodeFinished(lane=lane, number=number, **defaults | fields)


def admitted(actor: int = 0, incarnation: int = 1, sequence: int = 1, **fields: Any) -> ExperienceAdmitted:
    defaults: dict[str, Any] = {
        "policy_version": 0,
        "length": 5,
        "lanes": LANES,
        "episode_numbers": [0] * LANES,
        "episodes": [],
    }
    return ExperienceAdmitted(actor=actor, incarnation=incarnation, sequence=sequence, **defaults | fields)


def refused(
    actor: int = 0, incarnation: int = 1, sequence: int = 1, reason: str = "too_old", steps: int = 10
) -> ExperienceRefused:
    return ExperienceRefused(
        actor=actor, incarnation=incarnation, sequence=sequence, policy_version=0, steps=steps, reason=reason
    )


def written_down(ledger: Ledger) -> Ledger:
    """Another ledger that read what this one wrote."""
    other = Ledger(LANES)
    other.load(
        json.loads(json.dumps(ledger.numbers())),
        json.loads(json.dumps(ledger.addresses())),
    )
    return other


def test_steps_count_whether_taken_or_not() -> None:
    ledger = Ledger(LANES)
    ledger.admitted(admitted(length=7))
    ledger.refused(refused(sequence=2, steps=3))
    ledger.refused(refused(incarnation=9, reason=NOT_LIVING, steps=4))
    assert ledger.environment_steps == 7 * LANES + 3 + 4


def test_unrolls_are_those_taken_over_all_lives() -> None:
    ledger = Ledger(LANES)
    for event in (admitted(), admitted(sequence=2), admitted(incarnation=3, sequence=1), admitted(actor=1)):
        ledger.admitted(event)
    ledger.refused(refused(sequence=5))
    assert [ledger.unrolls(actor) for actor in range(3)] == [3, 1, 0]


# -- what was answered -------------------------------------------------------------------------------------------------


def test_the_newest_answer_of_the_newest_life_is_settled() -> None:
    ledger = Ledger(LANES)
    assert ledger.settled(0, 1) == 0
    ledger.admitted(admitted(sequence=1))
    ledger.refused(refused(sequence=3))
    ledger.admitted(admitted(sequence=2))
    assert ledger.settled(0, 1) == 3, "an answer that comes late takes none back"
    ledger.admitted(admitted(incarnation=2, sequence=1))
    assert (ledger.settled(0, 2), ledger.settled(0, 1)) == (1, 0)
    ledger.refused(refused(incarnation=1, sequence=99))
    assert ledger.settled(0, 2) == 1, "an older life settles nothing of a newer one"
    assert ledger.settled(1, 1) == 0


def test_an_unroll_of_a_life_that_is_not_the_living_one_settles_nothing() -> None:
    ledger = Ledger(LANES)
    ledger.refused(refused(incarnation=7, sequence=4, reason=NOT_LIVING))
    assert ledger.settled(0, 7) == 0


# -- episodes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "ended", "expected"),
    [
        ([3, 4], [], [4, 5]),
        ([3, 4], [episode(lane=1, number=4)], [4, 6]),
        ([3, 5], [episode(lane=1, number=4)], [4, 6]),
        ([3, 4], [episode(lane=0, number=8), episode(lane=0, number=7)], [10, 5]),
    ],
    ids=["going on", "ended, named before", "ended, named after", "many in one unroll"],
)
def test_a_new_life_begins_with_episodes_that_nobody_has_seen(
    numbers: list[int], ended: list[EpisodeFinished], expected: list[int]
) -> None:
    ledger = Ledger(LANES)
    assert ledger.next_episodes(0) == [0, 0]
    ledger.admitted(admitted(episode_numbers=numbers, episodes=ended))
    assert ledger.next_episodes(0) == expected
    ledger.next_episodes(0).append(99)
    assert ledger.next_episodes(0) == expected, "it is not the ledger's own list"
    assert ledger.next_episodes(1) == [0, 0]


def test_means_are_over_a_window() -> None:
    ledger = Ledger(LANES)
    ledger.episodes.extend(episode(number=number) for number in range(EPISODE_WINDOW + 5))
    assert len(ledger.episodes) == EPISODE_WINDOW
    assert ledger.episodes[0].number == 5


# -- what is still to be consumed --------------------------------------------------------------------------------------


def test_unrolls_are_consumed_in_order_and_whole() -> None:
    ledger = Ledger(LANES)
    for number in range(4):
        ledger.waits(Unconsumed(position=100 + number, actor=number % 2, stop_serial=2 * (number + 1)))
    assert ledger.take_consumed(1) == ()
    assert ledger.take_consumed(2) == (100,)
    assert ledger.take_consumed(2) == ()
    assert ledger.take_consumed(7) == (101, 102)
    assert ledger.unconsumed() == (Unconsumed(103, 1, 8),)
    assert ledger.take_consumed(99) == (103,)
    assert ledger.unconsumed() == ()


# -- written down ------------------------------------------------------------------------------------------------------

optional = st.none() | st.booleans()
finished = st.builds(
    EpisodeFinished,
    lane=st.integers(0, LANES - 1),
    number=st.integers(0, 50),
    episode_return=st.floats(-10, 10),
    length=st.integers(1, 9),
    accuracy=st.none() | st.floats(0, 100),
    parameters_added=st.none() | st.integers(0, 9),
    fossils=st.none() | st.integers(0, 3),
    truncated=st.booleans(),
    success=optional,
    cut=optional,
)
arrivals = st.builds(
    admitted,
    actor=st.integers(0, 11),
    incarnation=st.integers(1, 3),
    sequence=st.integers(1, 9),
    episode_numbers=st.lists(st.integers(0, 50), min_size=LANES, max_size=LANES),
    episodes=st.lists(finished, max_size=3),
)
refusals = st.builds(
    refused,
    actor=st.integers(0, 11),
    incarnation=st.integers(1, 3),
    sequence=st.integers(1, 9),
    reason=st.sampled_from(["too_old", NOT_LIVING]),
)


@settings(max_examples=60)
@given(st.lists(arrivals | refusals, max_size=25), st.lists(arrivals | refusals, max_size=10))
def test_a_ledger_that_was_written_down_goes_on_alike(
    before: list[ExperienceAdmitted | ExperienceRefused], after: list[ExperienceAdmitted | ExperienceRefused]
) -> None:
    ledger = Ledger(LANES)

    def fold(books: Ledger, events: list[ExperienceAdmitted | ExperienceRefused], first: int) -> list[Any]:
        seen: list[Any] = []
        for position, event in enumerate(events, first):
            if isinstance(event, ExperienceRefused):
                books.refused(event)
            else:
                books.admitted(event)
                books.episodes.extend(event.episodes)
                books.waits(Unconsumed(position, event.actor, LANES * (position + 1)))
            seen.append([books.take_consumed(position), books.settled(event.actor, event.incarnation)])
        return seen

    fold(ledger, before, 0)
    other = written_down(ledger)
    assert other.numbers() == ledger.numbers()
    assert other.addresses() == ledger.addresses()
    assert repr(other.numbers()) == repr(ledger.numbers()), "of which the digest is made"
    assert fold(other, after, len(before)) == fold(ledger, after, len(before))
    assert (other.numbers(), other.addresses()) == (ledger.numbers(), ledger.addresses())
    assert list(other.episodes) == list(ledger.episodes)
    assert other.episodes.maxlen == EPISODE_WINDOW


def test_what_is_written_down_has_no_alias_of_the_living() -> None:
    ledger = Ledger(LANES)
    ledger.admitted(admitted(episode_numbers=[1, 2]))
    numbers = ledger.numbers()
    numbers["next_episodes"]["0"].append(9)
    assert ledger.next_episodes(0) == [2, 3]
