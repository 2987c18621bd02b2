"""Who may send: the bookkeeping alone, against a slow literal truth."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.roles import senders
from supervisor.roles.senders import REPEATED, Answer, Senders

ACTORS, CREDITS = 3, 2


def greeted() -> Senders:
    made = Senders(ACTORS, CREDITS)
    for actor in range(ACTORS):
        assert made.greet(f"actor-{actor}-1", actor, 1)
        assert made.grant(actor, CREDITS) == CREDITS
    return made


def test_only_a_later_life_of_an_actor_of_the_run_is_greeted() -> None:
    made = Senders(ACTORS, CREDITS)
    assert not made.greet("x", ACTORS, 1)
    assert not made.greet("x", -1, 1)
    assert made.greet("a", 1, 2)
    assert not made.greet("a", 1, 2)
    assert not made.greet("b", 1, 1)
    assert made.peer_of(1) == "a"
    assert made.greet("b", 1, 3)
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
    assert made.greet("actor-0-2", 0, 2)
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
            assert made.greet(f"actor-{actor}-{lives[actor]}", actor, lives[actor])
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
