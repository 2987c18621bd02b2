"""An actor's line to learners that die: greetings, credits, and what is sent again. The learner is a script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from esper_simic.errors import InvariantViolation
from supervisor import faults
from supervisor.bus import Poller, Received, Refused, Server, ipc_endpoint, runtime_directory
from supervisor.clock import ManualClock
from supervisor.protocol import (
    ACCEPTS,
    Acknowledged,
    Credit,
    Hello,
    Message,
    PullWeights,
    Stop,
    Unroll,
    Weights,
    Welcome,
)
from supervisor.protocol import Refused as NotAdmitted
from supervisor.roles.learner_line import GREETING_INTERVAL_S, LearnerLine
from tests.roles.bench import LANES, RUN_ID, T, make_config, spec_of
from tests.sockets import losses_of

BYTES_MAX: Final = 2**26
WAIT_MS: Final = 10_000
WHO: Final = "actor-0-1"
A_WHILE_S: Final = 1.5 * GREETING_INTERVAL_S
MARK: Final = PullWeights(have_version=-99)
FRAME_BYTES: Final = 300_000
"""More than the kernel holds for a socket."""


def hello(number: int, *unacknowledged: int) -> Hello:
    return Hello(actor=0, incarnation=1, number=number, unacknowledged=unacknowledged)


def welcome(learner: int = 1, settled: int = 0, unrolls: int = 0, answers: int = 1) -> Welcome:
    return Welcome(
        learner=learner, first_episodes=[0] * LANES, settled=settled, unrolls=unrolls, answers=answers
    )


def make_unroll(sequence: int) -> Unroll:
    return Unroll(
        actor=0,
        incarnation=1,
        sequence=sequence,
        policy_version=0,
        lanes=LANES,
        steps=T,
        episode_numbers=[0] * LANES,
        episodes=[],
    )


def frames_of(sequence: int) -> list[bytes]:
    return [bytes([sequence % 251]) * FRAME_BYTES, b"", b"tail"]


class Stage:
    """One line, and a learner's end of it, which may die and be followed by another."""

    def __init__(self, directory: Path, endpoint: str, *assignments: str) -> None:
        self.endpoint = endpoint
        self.clock = ManualClock(monotonic_s=50.0)
        self.live()
        config = make_config(*assignments)
        spec = spec_of("actor", 0, directory, config, {"experience": endpoint})
        self.line = LearnerLine(spec, config, self.clock)
        self._came = 0
        receive = self.line.client.receive

        def counted(timeout_ms: int = 0) -> Received | Refused | None:
            received = receive(timeout_ms)
            self._came += received is not None
            return received

        self.line.client.receive = counted  # type: ignore[method-assign]
        self._watch = losses_of(self.line.client)
        self._await_loss = self._watch.__enter__()

    def live(self) -> None:
        """A learner comes and knows nobody."""
        self.server = Server(
            self.endpoint, run_id=RUN_ID, accepts=ACCEPTS["learner"], frame_bytes_max=BYTES_MAX
        )

    def die(self) -> None:
        """The learner is gone, and with it what it did not answer."""
        self.server.close()
        self._await_loss()

    def close(self) -> None:
        self._watch.__exit__(None, None, None)
        self.line.close()
        self.server.close()

    def said(self) -> list[Message]:
        """All that the actor has said and nobody has heard yet; an unroll comes with its frames."""
        self.line.client.send(MARK)
        poller = Poller()
        poller.add(self.server)
        heard: list[Message] = []
        while True:
            assert poller.wait(WAIT_MS)
            received = self.server.receive()
            assert isinstance(received, Received), received
            message = received.message
            if message == MARK:
                return heard
            expected = frames_of(message.sequence) if isinstance(message, Unroll) else []
            assert received.frames == tuple(expected)
            heard.append(message)

    def tell(self, *messages: Message, frames: tuple[bytes, ...] = ()) -> None:
        """Say something to the actor, which takes it."""
        self.post(*messages, frames=frames)
        poller = Poller()
        poller.add(self.line.client)
        while self._came < self._posted:
            assert poller.wait(WAIT_MS)
            self.line.take()

    def post(self, *messages: Message, frames: tuple[bytes, ...] = ()) -> None:
        for message in messages:
            self.server.send(WHO, message, frames)
        self._posted = self._came + len(messages)

    def after(self, seconds: float) -> list[Message]:
        """What the actor, waiting, says after so much time."""
        self.clock.advance(seconds)
        self.line.take()
        return self.said()

    def begin(self, count: int = 2, version: int = 0) -> None:
        """Be welcomed and get credits."""
        assert self.said() == [hello(1)]
        self.tell(welcome(), Credit(count=count, policy_version=version))

    def send(self, *sequences: int) -> None:
        for sequence in sequences:
            self.line.send(make_unroll(sequence), frames_of(sequence))

    def is_turn(self, version: int = 0) -> bool:
        """Whether an unroll may begin once its question for weights is answered."""
        if self.line.seek_turn():
            return True
        if not any(isinstance(message, PullWeights) for message in self.said()):
            return False
        self.tell(Weights(version=version))
        return self.line.seek_turn()


@contextmanager
def stage_for(directory: Path, *assignments: str) -> Iterator[Stage]:
    with runtime_directory() as sockets:
        stage = Stage(directory, ipc_endpoint(sockets, "experience"), *assignments)
        try:
            yield stage
        finally:
            stage.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with stage_for(tmp_path) as made:
        yield made


@pytest.fixture
def lockstep(tmp_path: Path) -> Iterator[Stage]:
    with stage_for(tmp_path, "supervisor.lockstep=true") as made:
        yield made


# ---- credits, answers, weights ---------------------------------------------------------------------------------------


def test_credits_and_answers_are_counted_apart(stage: Stage) -> None:
    stage.begin(count=2)
    assert stage.line.welcome == welcome()
    stage.send(1, 2)
    assert (stage.line.credits, stage.line.unanswered) == (0, (1, 2))
    assert stage.said() == [make_unroll(1), make_unroll(2)]
    stage.tell(Acknowledged(sequence=1, position=3))
    assert (stage.line.credits, stage.line.unanswered, stage.line.refused) == (0, (2,), 0)
    stage.tell(NotAdmitted(sequence=2, reason="too_old"))
    assert (stage.line.credits, stage.line.unanswered, stage.line.refused) == (0, (), 1)


def test_a_turn_takes_a_credit_and_then_weights_newer_than_those_held(stage: Stage) -> None:
    assert stage.said() == [hello(1)]
    stage.tell(welcome())
    assert not stage.line.seek_turn()
    assert stage.said() == [], "no weights are asked for before there is a credit to use them on"
    stage.tell(Credit(count=2, policy_version=7))
    assert not stage.line.seek_turn()
    assert not stage.line.seek_turn()
    assert stage.said() == [PullWeights(have_version=-1)], "asked once"
    stage.tell(Weights(version=7), frames=(b"weights 7",))
    assert stage.line.seek_turn()
    assert stage.line.version == 7
    assert stage.line.take_weights() == b"weights 7"
    assert stage.line.take_weights() is None
    stage.send(1)
    assert not stage.line.seek_turn(), "each unroll is made with weights asked for on its own credit"
    assert stage.said() == [make_unroll(1), PullWeights(have_version=7)]
    stage.tell(Weights(version=7))
    assert stage.line.seek_turn()
    assert (stage.line.version, stage.line.take_weights()) == (7, None)
    stage.send(2)
    assert not stage.line.seek_turn()
    assert stage.said() == [make_unroll(2)], "no credit, no question"


def test_messages_that_fit_nothing_are_harmless(stage: Stage) -> None:
    stage.begin(count=1, version=4)
    stage.tell(
        Weights(version=9),  # nothing was asked
        Acknowledged(sequence=77, position=3),
        NotAdmitted(sequence=78, reason="too_old"),
        Stop(reason="this is not for this line"),
        frames=(b"what is this",),
    )
    line = stage.line
    assert (line.credits, line.version, line.unanswered, line.refused) == (1, -1, (), 0)
    assert line.client.refused == {"unknown_kind": 1}
    assert line.take_weights() is None
    assert not line.seek_turn()
    stage.tell(Weights(version=4), frames=(b"weights 4",))
    stage.tell(Weights(version=3), frames=(b"weights 3",))
    assert (line.seek_turn(), line.version, line.take_weights()) == (True, 4, b"weights 4")


def test_older_weights_do_not_replace_newer_ones(stage: Stage) -> None:
    stage.begin(count=2)
    stage.line.seek_turn()
    stage.tell(Weights(version=4), frames=(b"weights 4",))
    stage.send(1)
    stage.line.seek_turn()
    stage.tell(Weights(version=3), frames=(b"weights 3",))
    assert (stage.line.seek_turn(), stage.line.version, stage.line.take_weights()) == (True, 4, b"weights 4")


# ---- greeting --------------------------------------------------------------------------------------------------------


def test_a_waiting_actor_greets_again_after_a_second_of_silence(stage: Stage) -> None:
    stage.begin()
    stage.send(1, 2)
    assert stage.said() == [make_unroll(1), make_unroll(2)]
    assert stage.after(0.9 * GREETING_INTERVAL_S) == []
    assert stage.after(0.2 * GREETING_INTERVAL_S) == [hello(2, 1, 2)]
    assert stage.after(0.9 * GREETING_INTERVAL_S) == []
    stage.tell(Acknowledged(sequence=1, position=3))
    assert stage.after(0.2 * GREETING_INTERVAL_S) == [hello(3, 2)], (
        "heard, but not answered: it was not the greeting"
    )
    stage.tell(welcome(answers=3))
    assert stage.after(0.9 * GREETING_INTERVAL_S) == [], "heard and answered"
    assert stage.after(0.2 * GREETING_INTERVAL_S) == [hello(4, 2)]


def test_an_actor_at_work_is_not_waiting(stage: Stage) -> None:
    stage.begin()
    stage.clock.advance(A_WHILE_S)  # so long did the unroll take
    stage.send(1)
    stage.line.take()
    assert stage.said() == [make_unroll(1)]


def test_in_a_long_silence_the_pauses_grow_so_that_the_queue_holds_them_for_days(stage: Stage) -> None:
    stage.begin()
    stage.die()
    hour_s = 3_600
    for _ in range(3 * hour_s):
        stage.clock.advance(1.01)
        stage.line.take()
    stage.live()
    greetings = stage.said()
    assert greetings == [hello(2 + index) for index in range(len(greetings))]
    assert 500 < len(greetings) < 600, "1 a second in the first 100 s, then 100 ln(t / 100 s) more"


def test_what_it_waits_for_is_named(stage: Stage) -> None:
    assert stage.line.waiting_for == "learner"
    stage.begin(count=0)
    assert stage.line.waiting_for == "credit"
    stage.tell(Credit(count=1, policy_version=0))
    assert stage.line.waiting_for == "weights"
    stage.after(A_WHILE_S)
    assert stage.line.waiting_for == "weights", "a busy learner is not an absent one"
    stage.after(A_WHILE_S)
    assert stage.line.waiting_for == "learner"
    stage.tell(welcome(answers=3))
    assert stage.line.waiting_for == "weights"


# ---- another learner -------------------------------------------------------------------------------------------------


def test_another_learner_gets_what_is_not_settled_again_in_order_and_on_no_credit(stage: Stage) -> None:
    stage.begin(count=5)
    stage.send(1, 2, 3, 4)
    assert stage.line.credits == 1
    stage.said()
    stage.die()
    stage.live()
    assert stage.after(A_WHILE_S) == [hello(2, 1, 2, 3, 4)]
    stage.tell(welcome(learner=2, settled=2, answers=2))
    assert stage.said() == [make_unroll(3), make_unroll(4)]
    assert (stage.line.credits, stage.line.unanswered) == (0, (3, 4)), (
        "the credits of a dead learner are void"
    )
    assert stage.line.welcome == welcome(), "the life began with the first"
    stage.tell(Credit(count=1, policy_version=0), Acknowledged(sequence=3, position=9))
    assert (stage.line.credits, stage.line.unanswered) == (1, (4,))


def test_the_same_or_an_older_learners_welcome_changes_nothing(stage: Stage) -> None:
    assert stage.said() == [hello(1)]
    stage.tell(welcome(learner=3), Credit(count=3, policy_version=0))
    stage.send(1)
    assert stage.said() == [make_unroll(1)]
    stage.tell(welcome(learner=3, settled=1), welcome(learner=2, settled=1))
    assert stage.said() == []
    assert (stage.line.credits, stage.line.unanswered) == (2, (1,))


def test_an_open_question_for_weights_is_asked_again_on_the_new_learners_credit(stage: Stage) -> None:
    stage.begin(count=1)
    assert not stage.line.seek_turn()
    assert stage.said() == [PullWeights(have_version=-1)]
    stage.die()
    stage.live()
    assert stage.after(A_WHILE_S) == [hello(2)]
    stage.tell(welcome(learner=2, answers=2))
    assert not stage.line.seek_turn()
    stage.tell(Credit(count=1, policy_version=0))
    assert not stage.line.seek_turn()
    assert stage.said() == [PullWeights(have_version=-1)]
    stage.tell(Weights(version=0), frames=(b"weights 0",))
    assert stage.line.seek_turn()


def test_what_was_queued_while_nobody_listened_comes_before_the_greeting_and_again_after_it(
    stage: Stage,
) -> None:
    stage.begin(count=3)
    stage.send(1)
    assert stage.said() == [make_unroll(1)]
    stage.die()
    stage.send(2, 3)
    stage.clock.advance(A_WHILE_S)
    stage.line.take()
    stage.live()
    assert stage.said() == [make_unroll(2), make_unroll(3), hello(2, 1, 2, 3)]
    stage.tell(welcome(learner=2, answers=2))
    assert stage.said() == [make_unroll(1), make_unroll(2), make_unroll(3)]


def test_nothing_begins_between_a_greeting_and_its_welcome(stage: Stage) -> None:
    """A new learner answers a question for weights at once, a greeting only when what it says is durable."""
    stage.begin(count=2)
    stage.die()
    stage.send(1)
    assert not stage.line.seek_turn()
    stage.clock.advance(A_WHILE_S)
    assert not stage.line.seek_turn()
    stage.live()
    assert stage.said() == [make_unroll(1), PullWeights(have_version=-1), hello(2, 1)]
    stage.tell(Weights(version=4), frames=(b"weights 4",))
    assert stage.line.credits == 1, "of the dead learner"
    assert not stage.line.seek_turn(), (
        "an unroll begun now would be counted by a learner that gave no credit for it"
    )
    stage.tell(welcome(learner=2, answers=2))
    assert stage.said() == [make_unroll(1)]
    stage.tell(Credit(count=1, policy_version=4))
    assert stage.is_turn(version=4)


def test_a_slow_learner_that_answers_at_last_costs_no_turn(stage: Stage) -> None:
    stage.begin(count=1)
    assert not stage.line.seek_turn()
    stage.clock.advance(A_WHILE_S)
    assert not stage.line.seek_turn()
    assert stage.said() == [PullWeights(have_version=-1), hello(2)]
    stage.tell(Weights(version=0))
    assert not stage.line.seek_turn()
    stage.tell(welcome(answers=2))
    assert stage.line.seek_turn()
    assert stage.said() == [], "the answer was kept"


def test_a_greeting_lost_with_its_learner_is_said_to_the_next_one(stage: Stage) -> None:
    stage.begin(count=2)
    stage.send(1)
    stage.die()
    stage.live()
    assert stage.after(A_WHILE_S)[-1] == hello(2, 1)
    stage.die()
    stage.live()
    assert stage.after(A_WHILE_S) == [hello(3, 1)]
    stage.tell(welcome(learner=3, settled=1, answers=3))
    assert stage.said() == []
    assert stage.line.unanswered == ()


def test_a_new_life_that_finds_no_learner_is_welcomed_by_the_first_that_comes(stage: Stage) -> None:
    assert stage.said() == [hello(1)]
    stage.die()
    stage.clock.advance(A_WHILE_S)
    stage.line.take()
    assert stage.line.waiting_for == "learner"
    stage.live()
    *_, newest = stage.said()
    assert newest == hello(2)
    stage.tell(welcome(learner=4), Credit(count=2, policy_version=0), welcome(learner=4, answers=2))
    assert stage.line.welcome == welcome(learner=4)
    assert stage.line.credits == 2, "given between the two answers"
    assert stage.is_turn()


def test_the_answer_of_a_learner_that_died_since_begins_nothing(stage: Stage) -> None:
    """Its next life took the newer greeting, which named what is out: an unroll more would be one too many."""
    stage.begin(count=2)
    stage.send(1)
    assert stage.after(A_WHILE_S)[-1] == hello(2, 1)
    assert stage.after(A_WHILE_S) == [hello(3, 1)]
    stage.tell(welcome(answers=2))
    assert not stage.is_turn(), "the third may have been taken by another life"
    stage.tell(welcome(learner=2, settled=1, answers=3), Credit(count=1, policy_version=0))
    assert stage.line.credits == 1
    assert stage.is_turn()


def test_a_learner_slower_than_the_greetings_is_not_greeted_for_ever(stage: Stage) -> None:
    stage.begin(count=1)
    assert stage.after(A_WHILE_S) == [hello(2)]
    assert stage.after(A_WHILE_S) == [hello(3)]
    stage.tell(welcome(answers=2))
    assert stage.after(A_WHILE_S) == [], "its answer to the third is on the way"
    stage.tell(welcome(answers=3))
    assert stage.is_turn()


# ---- promises --------------------------------------------------------------------------------------------------------


def test_every_acknowledgement_is_witnessed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr(faults, "witness", noted.append)
    monkeypatch.setattr(faults, "point", noted.append)
    stage.begin()
    stage.send(1, 2)
    stage.tell(Acknowledged(sequence=1, position=30), Acknowledged(sequence=2, position=31))
    assert noted == [
        *["actor.send.before", "actor.send.after"] * 2,
        "acknowledged 0 1 1 30",
        "actor.acknowledged.after",
        "acknowledged 0 1 2 31",
        "actor.acknowledged.after",
    ]


# ---- lockstep --------------------------------------------------------------------------------------------------------


def test_in_lockstep_a_round_has_exactly_the_version_of_its_credit(lockstep: Stage) -> None:
    lockstep.begin(count=1, version=3)
    lockstep.line.seek_turn()
    lockstep.tell(Weights(version=3), frames=(b"weights 3",))
    assert lockstep.line.seek_turn()
    lockstep.send(1)
    lockstep.tell(Credit(count=1, policy_version=4))
    lockstep.line.seek_turn()
    with pytest.raises(InvariantViolation, match="made with version 4; the learner gave 5"):
        lockstep.tell(Weights(version=5), frames=(b"weights 5",))


@pytest.mark.parametrize(("version", "frames"), [(3, ()), (2, (b"weights 2",)), (4, ())])
def test_in_lockstep_weights_of_another_round_are_not_acted_on(
    lockstep: Stage, version: int, frames: tuple[bytes, ...]
) -> None:
    lockstep.begin(count=1, version=3)
    lockstep.line.seek_turn()
    lockstep.tell(Weights(version=3), frames=(b"weights 3",))
    lockstep.send(1)
    lockstep.tell(Credit(count=1, policy_version=4))
    lockstep.line.seek_turn()
    with pytest.raises(
        InvariantViolation, match=f"made with version 4; the learner gave {version}, this actor holds 3"
    ):
        lockstep.tell(Weights(version=version), frames=frames)


def test_in_lockstep_a_learner_that_has_forgotten_the_rounds_version_is_found(lockstep: Stage) -> None:
    lockstep.begin(count=1, version=3)
    lockstep.line.seek_turn()
    lockstep.tell(Weights(version=3), frames=(b"weights 3",))
    lockstep.send(1)
    lockstep.tell(Credit(count=1, policy_version=3))
    lockstep.line.seek_turn()
    with pytest.raises(
        InvariantViolation, match="made with version 3; the learner gave 2, this actor holds 3"
    ):
        lockstep.tell(Weights(version=2))


def test_in_lockstep_a_refusal_ends_the_life(lockstep: Stage) -> None:
    """The next one re-simulates what was admitted, and makes the refused round again."""
    lockstep.begin(count=1)
    lockstep.send(1)
    with pytest.raises(InvariantViolation, match="unroll 1 was: malformed"):
        lockstep.tell(NotAdmitted(sequence=1, reason="malformed"))
