"""Who may send: the bookkeeping alone, against a slow literal truth."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.roles import senders
from supervisor.roles.senders import REPEATED, Answer, Greeting, Senders

ACTORS, CREDITS = 3, 2


def greet(made: Senders, peer: str, actor: int, life: int) -> Greeting:
    """A greeting, at once welcomed, of a life of which nothing was answered and nothing is on the way."""
    greeting = made.greet(peer, actor, life, settled=0, unacknowledged=())
    if greeting is Greeting.BEGUN:
        made.welcomed(actor, life)
    return greeting


def greeted() -> Senders:
    made = Senders(ACTORS, CREDITS)
    for actor in range(ACTORS):
        assert greet(made, f"actor-{actor}-1", actor, 1) is Greeting.BEGUN
        assert made.grant(actor, CREDITS) == CREDITS
    return made


def test_only_a_later_life_of_an_actor_of_the_run_is_greeted() -> None:
    made = Senders(ACTORS, CREDITS)
    assert greet(made, "x", ACTORS, 1) is Greeting.REFUSED
    assert greet(made, "x", -1, 1) is Greeting.REFUSED
    assert greet(made, "a", 1, 2) is Greeting.BEGUN
    assert greet(made, "a", 1, 2) is Greeting.KNOWN
    assert greet(made, "b", 1, 2) is Greeting.REFUSED, "two that claim one life"
    assert greet(made, "b", 1, 1) is Greeting.REFUSED
    assert made.peer_of(1) == "a"
    assert greet(made, "b", 1, 3) is Greeting.BEGUN
    assert made.peer_of(1) == "b"
    assert not made.is_living("a", 1, 2)
    assert made.is_living("b", 1, 3)
    assert not made.is_living("b", 2, 3)
    assert not made.is_living("b", 1, 2)


def test_a_repeat_gets_the_first_answer_and_a_gap_is_new() -> None:
    made = greeted()
    assert made.answered(0, 1) is None
    made.admitted(0, 1, 10)
    made.refused(0, 5, 11, "too_old", is_credit_back=True)
    assert made.answered(0, 1) == Answer(10, "")
    assert made.answered(0, 5) == Answer(11, "too_old")
    assert made.answered(0, 6) is None
    assert made.answered(0, 3) == Answer(11, REPEATED), (
        "the socket keeps the order: it cannot come for the first time"
    )
    assert made.answered(1, 1) is None
    assert greet(made, "actor-0-2", 0, 2) is Greeting.BEGUN
    assert made.answered(0, 1) is None, "a new life counts anew"


def test_the_memory_of_answers_is_bounded_and_loses_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "ANSWERS_KEPT", 2)
    made = greeted()
    for sequence in (1, 2, 3):
        made.refused(0, sequence, sequence, "malformed", is_credit_back=True)
    assert [made.answered(0, sequence) for sequence in (1, 2, 3)] == [
        Answer(3, REPEATED),
        Answer(2, "malformed"),
        Answer(3, "malformed"),
    ]


def test_credits_come_after_the_welcome_and_none_is_lost_for_it() -> None:
    made = greeted()
    made.admitted(0, 1, 10)
    made.admitted(0, 2, 11)
    assert made.greet("actor-0-2", 0, 2, settled=0, unacknowledged=()) is Greeting.BEGUN
    assert made.consumed(10) == 0
    assert made.grant(0, 1) == 0, "the welcome would void it"
    made.welcomed(0, 1)
    assert made.grant(0, 1) == 0, "that was the welcome of a life that is over"
    made.welcomed(0, 2)
    assert made.grant(0, CREDITS) == CREDITS - 1


def test_what_is_on_the_way_or_held_keeps_its_credit_over_a_new_life_of_the_learner() -> None:
    made = Senders(ACTORS, 4)
    made.restore([(10, 0), (12, 1), (13, 0)])
    assert made.greet("actor-0-1", 0, 1, settled=7, unacknowledged=(7, 8)) is Greeting.BEGUN
    made.welcomed(0, 1)
    assert made.grant(0, 4) == 1, "two are held, one (8) is on the way again, 7 was answered"
    assert made.answered(0, 7) == Answer(0, REPEATED)
    assert made.answered(0, 8) is None
    assert made.grant(1, 4) == 0, "it has not greeted"
    assert [made.consumed(10), made.consumed(12)] == [0, 1]
    assert made.grant(0, 1) == 1
    assert made.grant(1, 1) == 0
    assert greet(made, "actor-1-1", 1, 1) is Greeting.BEGUN
    assert made.grant(1, 9) == 4


def test_an_unroll_that_its_greeting_did_not_name_takes_up_a_credit_too() -> None:
    """Sent on a credit of an earlier life of the learner, when the greeting was on its way already."""
    made = Senders(ACTORS, CREDITS)
    assert made.greet("actor-0-1", 0, 1, settled=0, unacknowledged=()) is Greeting.BEGUN
    made.admitted(0, 1, 10)
    made.welcomed(0, 1)
    assert made.grant(0, CREDITS) == CREDITS - 1
    assert made.consumed(10) == 0
    assert made.grant(0, CREDITS) == 1


def test_releasing_an_actor_takes_back_all_it_holds_and_nothing_of_others() -> None:
    made = greeted()
    made.admitted(0, 1, 10)
    made.admitted(1, 1, 11)
    made.admitted(0, 2, 12)
    assert not made.has_room(0)
    made.release(0)
    assert (made.grant(0, 9), made.grant(1, 9)) == (2, 0)


Move = st.tuples(st.sampled_from(["send", "bad", "consume", "pay", "die"]), st.integers(0, ACTORS - 1))


@given(st.lists(Move, max_size=80))
def test_credits_are_neither_made_nor_lost(moves: list[tuple[str, int]]) -> None:
    """In hand, held, or owed: of each actor there are exactly `CREDITS`, whatever lives and dies."""
    made = greeted()
    hand = Counter(dict.fromkeys(range(ACTORS), CREDITS))
    lives = Counter(dict.fromkeys(range(ACTORS), 1))
    held: list[tuple[int, int]] = []
    owed: list[int] = []
    for position, (move, actor) in enumerate(moves, start=1):
        if move == "send" and hand[actor]:
            hand[actor] -= 1
            assert made.has_room(actor)
            made.admitted(actor, position, position)
            held.append((position, actor))
        elif move == "bad" and hand[actor]:
            hand[actor] -= 1
            made.refused(actor, position, position, "malformed", is_credit_back=True)
            owed.append(actor)
        elif move == "consume" and held:
            oldest, holder = held.pop(0)
            assert made.consumed(oldest) == holder
            owed.append(holder)
        elif move == "pay" and owed:
            to = owed.pop(0)
            hand[to] += made.grant(to, 1)
        elif move == "die":
            lives[actor] += 1
            greeting = greet(made, f"actor-{actor}-{lives[actor]}", actor, lives[actor])
            assert greeting is Greeting.BEGUN
            hand[actor] = made.grant(actor, CREDITS)
        held_by = Counter(holder for _, holder in held)
        assert all(hand[each] + held_by[each] <= CREDITS for each in range(ACTORS))
    while held:
        oldest, holder = held.pop(0)
        made.consumed(oldest)
        owed.append(holder)
    for actor in owed:
        hand[actor] += made.grant(actor, 1)
    assert all(hand[actor] == CREDITS for actor in range(ACTORS)), (
        "with nothing held and nothing owed all are in hand"
    )
