"""Who may send: the living life of every actor, its credits, and what its unrolls were answered.

A credit is the right to send one unroll. An actor has at most `credits_each` of them out at a time, counted over all
its lives: in its hands, on the way, or in an unroll of which something is still to be consumed. A new life therefore
begins with what its predecessor does not hold, and inherits the rest when it is consumed.

A socket keeps the order, so within a life a sequence number that is not above the newest one is a repeat. It gets the
first answer; gaps are no fault. Bookkeeping only: nothing here sends, and nothing here needs to survive: what a new
life of the learner has to know is in its fold (which unrolls are not consumed yet, which sequences were answered), the
rest the actors tell it when they greet it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

ANSWERS_KEPT: Final = 64
"""Answers remembered of one life; as many as it may have credits, so all that it can still be waiting for."""

REPEATED: Final = "repeated"
"""Why a repeat is refused whose answer is forgotten: it was answered long ago, and not admitted twice."""


class Answer(NamedTuple):
    """What an unroll was answered, on the ground of the record at `position`; `refusal` is empty if it was admitted."""

    position: int
    refusal: str


class Greeting(Enum):
    """What a `Hello` means."""

    BEGUN = "a life that was not known"
    KNOWN = "the living life says it again"
    REFUSED = "no such actor, or a life that is over"


@dataclass(slots=True)
class _Life:
    peer: str
    incarnation: int
    newest_sequence: int = 0
    newest_position: int = 0
    is_welcomed: bool = False
    answers: dict[int, Answer] = field(default_factory=dict)


class Senders:
    """The actors of a run as the learner knows them.

    Args:
        actors: How many there are; their indices are below it.
        credits_each: Credits that one actor may have out at a time, at most `ANSWERS_KEPT`.
    """

    def __init__(self, actors: int, credits_each: int) -> None:
        self._actors, self._credits_each = actors, credits_each
        self._living: dict[int, _Life] = {}
        self._holder: dict[int, int] = {}
        self._out = [0] * actors

    def restore(self, unconsumed: Iterable[tuple[int, int]]) -> None:
        """Take over the unrolls, `(ticket, actor)`, whose credits an earlier life of the learner had out."""
        self._holder.update(unconsumed)

    def greet(
        self, peer: str, actor: int, incarnation: int, *, settled: int, unacknowledged: Collection[int]
    ) -> Greeting:
        """Hear a `Hello`.

        Args:
            peer: Who says it.
            actor: The actor's index.
            incarnation: Its life.
            settled: The newest sequence of this life that the journal has answered.
            unacknowledged: Sequences that it sent; those that are not settled it will send again, on credits it had.
        """
        known = self._living.get(actor)
        if not 0 <= actor < self._actors or (known is not None and incarnation < known.incarnation):
            return Greeting.REFUSED
        if known is not None and incarnation == known.incarnation:
            return Greeting.KNOWN if known.peer == peer else Greeting.REFUSED
        self._living[actor] = _Life(peer, incarnation, newest_sequence=settled)
        self._out[actor] = self._held(actor) + sum(sequence > settled for sequence in unacknowledged)
        return Greeting.BEGUN

    def welcomed(self, actor: int, incarnation: int) -> None:
        """Note that a life has been told where it stands: from now on it may be given credits."""
        life = self._living[actor]
        if life.incarnation == incarnation:
            life.is_welcomed = True

    def is_unknown(self, actor: int, incarnation: int) -> bool:
        """Whether this is a life that has not greeted yet; its unrolls come again when it has."""
        known = self._living.get(actor)
        return known is None or incarnation > known.incarnation

    def peer_of(self, actor: int) -> str:
        """Where the living life of a greeted actor is reached."""
        return self._living[actor].peer

    def is_living(self, peer: str, actor: int, incarnation: int) -> bool:
        """Whether this peer speaks for the living life of an actor."""
        life = self._living.get(actor)
        return life is not None and (life.peer, life.incarnation) == (peer, incarnation)

    def has_room(self, actor: int) -> bool:
        """Whether an unroll of this actor can be in order: it holds fewer than it has credits."""
        return self._held(actor) < self._credits_each

    def answered(self, actor: int, sequence: int) -> Answer | None:
        """What an unroll of the living life was answered when it first came; None if it is new."""
        life = self._living[actor]
        if sequence > life.newest_sequence:
            return None
        return life.answers.get(sequence, Answer(life.newest_position, REPEATED))

    def admitted(self, actor: int, sequence: int, position: int) -> None:
        """Note that an unroll was admitted; it holds its credit until `consumed`, and its position is its ticket."""
        self._holder[position] = actor
        # Sent on a credit of an earlier life of the learner, and not named in the greeting: it counts all the same.
        self._out[actor] = max(self._out[actor], self._held(actor))
        self._note(actor, sequence, Answer(position, ""))

    def consumed(self, ticket: int) -> int:
        """Take back the credit of an admitted unroll; the actor to whom it is owed now."""
        actor = self._holder.pop(ticket)
        self._out[actor] -= 1
        return actor

    def release(self, actor: int) -> None:
        """Take back every credit that the admitted unrolls of an actor hold."""
        tickets = [ticket for ticket, holder in self._holder.items() if holder == actor]
        for ticket in tickets:
            self.consumed(ticket)

    def refused(self, actor: int, sequence: int, position: int, reason: str, *, is_credit_back: bool) -> None:
        """Note that an unroll of the living life was refused, and take its credit back if it had one."""
        self._note(actor, sequence, Answer(position, reason))
        if is_credit_back:
            self._out[actor] -= 1

    def grant(self, actor: int, count: int) -> int:
        """How many of these credits can be given without exceeding the limit; they are out from now on.

        An actor that was not welcomed yet gets none, for its credits begin anew with the welcome: what is owed to it is
        counted then.
        """
        life = self._living.get(actor)
        if life is None or not life.is_welcomed:
            return 0
        granted = max(0, min(count, self._credits_each - self._out[actor]))
        self._out[actor] += granted
        return granted

    def _held(self, actor: int) -> int:
        return sum(holder == actor for holder in self._holder.values())

    def _note(self, actor: int, sequence: int, answer: Answer) -> None:
        life = self._living[actor]
        life.newest_sequence, life.newest_position = sequence, answer.position
        life.answers[sequence] = answer
        if len(life.answers) > ANSWERS_KEPT:
            del life.answers[min(life.answers)]
