"""An actor's line to the learner: credits, weights, and every unroll until it is answered.

The learner may die and come back: the socket finds it again by itself, the actor finds out by greeting it. While it
waits and hears nothing it says `Hello` again; the `Welcome` of another life of the learner says what is settled, and
the rest is sent once more, in order, on the credits it was first sent on. The credits in hand are void then, for the
learner counts anew, and with them the weights that were fetched for them.

What a new life of the learner takes before the greeting it drops, to get it again after it. What it took after the
greeting it would count; so from the moment an actor greets until it is welcomed it begins nothing. Otherwise a credit
of the dead life could be spent on the new one, which has not given it: in lockstep a round would be made twice. For the
same reason it waits for the answer to its newest greeting: the life that answers an older one may be dead by then.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from esper_simic.config import Config
from esper_simic.errors import InvariantViolation
from esper_simic.hardware import HardwareContext
from supervisor import faults
from supervisor.bus import Client, Received
from supervisor.child import ChildSpec
from supervisor.clock import Clock
from supervisor.protocol import (
    ACCEPTS,
    Acknowledged,
    Credit,
    Hello,
    Message,
    PullWeights,
    Refused,
    Unroll,
    Weights,
    Welcome,
)

GREETING_INTERVAL_S: Final = 1.0
"""Silence after which an actor that waits greets the learner again."""

GREETINGS_PER_SILENCE: Final = 100
"""A pause between two greetings is at least this part of the silence. All of them wait in the socket's queue while
nobody takes them, and this way they fill its thousand places after nine days, not after a quarter of an hour."""

PATIENCE: Final = 5
"""A pause is this many times as long while a learner that is slow answers one greeting after the other."""


class _Question(Enum):
    """Where the question for the weights of the next unroll stands."""

    NOT_ASKED = "not asked"
    ASKED = "asked"
    ANSWERED = "answered"


class LearnerLine:
    """The experience socket of one actor's life; greets the learner at once.

    Args:
        spec: Who this is.
        config: The run's configuration.
        clock: Measures silence.
        hardware: On what this actor acts; the learner notes it.
    """

    def __init__(
        self, spec: ChildSpec, config: Config, clock: Clock, hardware: HardwareContext | None = None
    ) -> None:
        self._who, self._clock, self._hardware = spec.who, clock, hardware
        self._lockstep = config.supervisor.lockstep
        self._client = Client(
            spec.endpoints["experience"],
            spec.identity,
            run_id=spec.run_id,
            accepts=ACCEPTS["actor"],
            frame_bytes_max=config.supervisor.frame_bytes_max,
        )
        self.welcome: Welcome | None = None
        """The first one of this life: where it begins."""
        self.credits = 0
        """Unrolls that may be sent."""
        self.version = -1
        """Of the newest weights received; -1 before the first."""
        self.stage = 0
        """Of the curriculum, to act in."""
        self.refused = 0
        """Unrolls that were not admitted."""
        self._learner = -1
        self._credit_version = -1
        self._question = _Question.NOT_ASKED
        self._weights: bytes | None = None
        self._sent: dict[int, tuple[Unroll, list[bytes]]] = {}
        self._quiet_since_s = clock.monotonic_s()
        self._greetings = 0
        self._greet()

    @property
    def client(self) -> Client:
        """To be watched by a poller."""
        return self._client

    @property
    def unanswered(self) -> tuple[int, ...]:
        """Sequences sent and not answered, oldest first."""
        return tuple(self._sent)

    @property
    def waiting_for(self) -> str:
        """What is missing for the next unroll: the learner itself, a credit, or weights."""
        if self.welcome is None or self._quiet_s > 2 * GREETING_INTERVAL_S:
            return "learner"
        return "credit" if self.credits < 1 else "weights"

    def take(self) -> None:
        """Handle all that came, and greet again if nothing does.

        Raises:
            InvariantViolation: In lockstep, weights of another version than the round's, or a refusal.
        """
        while (received := self._client.receive()) is not None:
            if isinstance(received, Received):
                self._quiet_since_s = self._clock.monotonic_s()
                self._hear(received.message, received.frames)
        since_s = self._clock.monotonic_s() - self._greeted_s
        pause_s = max(GREETING_INTERVAL_S, self._quiet_s / GREETINGS_PER_SILENCE)
        if self._is_older_answered:
            pause_s *= PATIENCE
        if since_s > pause_s and (self._is_greeting or self._quiet_s > GREETING_INTERVAL_S):
            self._greet()

    def seek_turn(self) -> bool:
        """Take what came; whether an unroll may begin: a credit is here, and the newest weights since it came.

        In this order, because a credit may be long in coming: weights fetched before it would be old by then.

        Raises:
            InvariantViolation: As `take`.
        """
        self.take()
        if self._is_greeting or self.credits < 1:
            return False
        if self._question is _Question.NOT_ASKED:
            self._question = _Question.ASKED
            self._client.send(PullWeights(have_version=self.version))
        return self._question is _Question.ANSWERED

    def take_weights(self) -> bytes | None:
        """The newest weights as safetensors, `version` of them; None when they were taken before."""
        weights, self._weights = self._weights, None
        return weights

    def send(self, message: Unroll, frames: list[bytes]) -> None:
        """Send an unroll on one credit; it is kept until it is answered."""
        self.credits -= 1
        self._question = _Question.NOT_ASKED
        self._sent[message.sequence] = (message, frames)
        self._quiet_since_s = self._clock.monotonic_s()  # an actor at work did not wait
        faults.point("actor.send.before")
        self._client.send(message, frames)
        faults.point("actor.send.after")

    def close(self) -> None:
        """End the socket; what the learner did not take is lost."""
        self._client.close()

    @property
    def _quiet_s(self) -> float:
        return self._clock.monotonic_s() - self._quiet_since_s

    def _greet(self) -> None:
        self._is_greeting = True
        self._is_older_answered = False
        self._greetings += 1
        self._greeted_s = self._clock.monotonic_s()
        who = self._who
        self._client.send(
            Hello(
                actor=who.index,
                incarnation=who.incarnation,
                number=self._greetings,
                unacknowledged=self.unanswered,
                hardware=self._hardware,
            )
        )

    def _hear(self, message: Message, frames: tuple[bytes, ...]) -> None:
        match message:
            case Welcome():
                self._welcomed(message)
            case Credit(count=count, policy_version=version):
                self.credits += count
                self._credit_version = version
            case Acknowledged(sequence=sequence, position=position):
                self._acknowledged(sequence, position)
            case Refused(sequence=sequence, reason=reason):
                self._refused(sequence, reason)
            case Weights(version=version, stage=stage) if self._question is _Question.ASKED:
                self.stage = stage
                self._answered(version, frames)
            case _:  # an answer to a question of before
                pass

    def _welcomed(self, welcome: Welcome) -> None:
        if welcome.learner < self._learner:
            return
        # The learner that gave it may have died since, and another may have taken the newer ones.
        self._is_older_answered = welcome.answers != self._greetings
        self._is_greeting = self._is_older_answered
        if welcome.learner == self._learner:
            return
        self._learner = welcome.learner
        self.welcome = self.welcome or welcome
        self.credits = 0
        self._question = _Question.NOT_ASKED
        self._sent = {sequence: sent for sequence, sent in self._sent.items() if sequence > welcome.settled}
        for message, frames in self._sent.values():
            self._client.send(message, frames)

    def _acknowledged(self, sequence: int, position: int) -> None:
        self._sent.pop(sequence, None)
        who = self._who
        faults.witness(f"acknowledged {who.index} {who.incarnation} {sequence} {position}")
        faults.point("actor.acknowledged.after")

    def _refused(self, sequence: int, reason: str) -> None:
        if self._sent.pop(sequence, None) is None:
            return
        self.refused += 1
        if self._lockstep:
            # This life stands behind a round that the learner will never have; the next one goes back to it.
            raise InvariantViolation(f"in lockstep nothing is refused; unroll {sequence} was: {reason}")

    def _answered(self, version: int, frames: tuple[bytes, ...]) -> None:
        self._question = _Question.ANSWERED
        if frames and version > self.version:
            self.version, self._weights = version, frames[0]
        if self._lockstep and not version == self.version == self._credit_version:
            raise InvariantViolation(
                f"in lockstep this round is made with version {self._credit_version}; the learner gave {version}, this "
                f"actor holds {self.version}"
            )
