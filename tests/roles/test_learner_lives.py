"""The learner's loop over several lives: nothing acknowledged is lost, nothing is taken twice, no credit too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from esper_simic.config import fresh_per_batch
from esper_simic.events import ExperienceAdmitted
from supervisor.protocol import Acknowledged, Credit, Message, Refused, Unroll, Welcome
from supervisor.roles.fold import LearnerFold
from tests.roles.bench import LANES, Bench, T, bench, credits_in
from tests.roles.scribe import contents, is_same_state

IN_FLIGHT = 2


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    """A loop whose journal becomes durable only when a test says so."""
    with bench(tmp_path / "run") as made:
        yield made


class Player:
    """An actor's side of the contract, literally: it keeps what is not answered, begins anew with a new learner, and
    sends nothing between its greeting and the welcome."""

    def __init__(self, held: Bench, index: int, incarnation: int = 1) -> None:
        self.held, self.index, self.incarnation = held, index, incarnation
        self.line = held.stranger(index, incarnation)
        self.unanswered: dict[int, Unroll] = {}
        self.acknowledged: set[int] = set()
        self.refused: dict[int, str] = {}
        self.credits = 0
        self.learner = 0
        self.version = 0
        self.is_greeting = False

    def greet(self) -> None:
        self.hear()
        self.is_greeting = True
        self.line.hello(tuple(sorted(self.unanswered)))
        self.held.settle(self.line)

    def play(self) -> bool:
        """Make an unroll and send it, if there is a credit."""
        self.hear()
        if not self.credits or self.is_greeting:
            return False
        self.credits -= 1
        self.line.sequence += 1
        self.unanswered[self.line.sequence] = self.line.message(
            self.version, episode_numbers=[self.line.sequence] * LANES
        )
        self.send(self.line.sequence)
        self.held.settle(self.line)
        return True

    def send(self, sequence: int) -> None:
        seed = 1000 * self.index + 100 * self.incarnation + sequence
        self.line.client.send(self.unanswered[sequence], self.held.frames(seed))

    def hear(self) -> None:
        heard, self.line.heard = self.line.heard, []
        for message in heard:
            self._hear(message)

    def _hear(self, message: Message) -> None:
        self.is_greeting &= not isinstance(message, Welcome)
        match message:
            case Welcome(learner=learner, settled=settled) if learner != self.learner:
                self.learner, self.credits = learner, 0
                self.unanswered = {n: unroll for n, unroll in self.unanswered.items() if n > settled}
                for sequence in sorted(self.unanswered):
                    self.send(sequence)
                self.held.settle(self.line)
            case Credit(count=count, policy_version=version):
                self.credits += count
                self.version = max(self.version, version)
            case Acknowledged(sequence=sequence):
                self.acknowledged.add(sequence)
                self.unanswered.pop(sequence, None)
            case Refused(sequence=sequence, reason=reason):
                self.refused[sequence] = reason
                self.unanswered.pop(sequence, None)
            case _:
                pass


def admitted_of(held: Bench) -> list[tuple[int, int, int]]:
    events = [record.header_as(ExperienceAdmitted) for record in held.records("ExperienceAdmitted")]
    return [(event.actor, event.incarnation, event.sequence) for event in events]


# -- one restart -------------------------------------------------------------------------------------------------------


def test_what_was_durable_is_settled_and_what_was_not_is_sent_again_and_taken_once(held: Bench) -> None:
    player = Player(held, 0)
    player.greet()
    held.make_durable()
    player.play()
    player.play()
    held.journal.sync()  # both durable, and the answers never sent
    held.kill()
    held.live(2)
    assert sorted(player.unanswered) == [1, 2]
    player.greet()
    held.make_durable()
    (welcome,) = [message for message in player.line.heard if isinstance(message, Welcome)]
    assert welcome == Welcome(learner=2, answers=1, first_episodes=[3] * LANES, settled=2, unrolls=2)
    player.hear()
    assert player.unanswered == {}

    held.make_durable()
    player.play()
    held.kill()  # the third was admitted, and the journal never got it to the disk
    held.live(3)
    player.greet()
    held.make_durable()
    player.hear()
    held.make_durable()
    player.hear()
    assert player.unanswered == {}
    assert player.acknowledged == {3}
    assert admitted_of(held) == [(0, 1, 1), (0, 1, 2), (0, 1, 3)]


def test_what_is_held_of_an_actor_keeps_its_credit_over_the_restart(held: Bench) -> None:
    actor = held.actor()
    for _ in range(4):  # two fill the buffer and come back at once, two are held
        held.send(actor)
        held.make_durable()
    credits_in(actor)
    held.kill()
    held.live(2)
    assert len(held.loop.learner.ledger.unconsumed()) == IN_FLIGHT
    actor.hello()
    held.settle(actor)
    held.make_durable()
    assert credits_in(actor) == 0
    assert held.step_all() == 1
    held.make_durable()
    assert credits_in(actor) == 1, "consumed in this life, whoever admitted it"


def test_an_unroll_on_its_way_keeps_its_credit_over_the_restart(held: Bench) -> None:
    player = Player(held, 0)
    player.greet()
    held.make_durable()
    player.play()
    held.kill()
    held.live(2)
    player.greet()
    held.make_durable()
    assert credits_in(player.line) == IN_FLIGHT - 1, "one unroll comes again, on the credit that it had"
    player.hear()
    held.make_durable()
    player.hear()
    assert player.acknowledged == {1}
    assert player.credits == 1, "it only filled the buffer: its credit came back with the acknowledgement"


def test_what_arrives_before_the_greeting_is_counted_and_comes_again(held: Bench) -> None:
    """Sent to a dead learner, kept by the socket, and delivered to the next one."""
    player = Player(held, 0)
    player.greet()
    held.make_durable()
    player.hear()
    held.kill()
    player.credits -= 1
    player.line.sequence = 1
    player.unanswered[1] = player.line.message()
    player.send(1)
    held.live(2)
    held.settle(player.line)
    before = held.journal.next_position
    assert held.loop.counters() == {"refused.before_greeting": 1.0}
    held.make_durable()
    assert player.line.heard == []
    player.greet()
    held.make_durable()
    player.hear()
    held.make_durable()
    player.hear()
    assert player.acknowledged == {1}
    assert held.journal.next_position == before + 1, "the first arrival was not journaled"
    assert admitted_of(held) == [(0, 1, 1)]


def test_a_refusal_too_is_settled(held: Bench) -> None:
    actor = held.actor()
    held.send(actor, frames=[b"nonsense"])
    held.journal.sync()
    held.kill()
    held.live(2)
    actor.heard.clear()
    actor.hello((1,))
    held.settle(actor)
    held.make_durable()
    assert [message.settled for message in actor.take(Welcome)] == [1]
    assert credits_in(actor) == IN_FLIGHT


def test_a_greeting_said_again_to_the_new_life_moves_no_credits(held: Bench) -> None:
    actor = held.actor()
    held.kill()
    held.live(2)
    actor.heard.clear()
    for _ in range(3):
        actor.hello()
        held.settle(actor)
        held.make_durable()
    assert [message.learner for message in actor.take(Welcome)] == [2, 2, 2]
    assert credits_in(actor) == IN_FLIGHT


def test_a_new_life_of_an_actor_begins_where_the_journal_says_after_a_restart_too(held: Bench) -> None:
    old = held.actor()
    held.send(old, episode_numbers=[7] * LANES)
    held.make_durable()
    held.kill()
    held.live(2)
    new = held.actor(incarnation=2)
    assert new.heard[0] == Welcome(learner=2, answers=1, first_episodes=[8] * LANES, settled=0, unrolls=1)
    old.heard.clear()
    old.hello((1,))
    held.settle(old)
    held.make_durable()
    assert old.heard == [], "a life that is over is told nothing"
    assert credits_in(new) == IN_FLIGHT


def test_the_newest_weights_are_there_at_once(held: Bench) -> None:
    actor = held.actor()
    for _ in range(4):
        held.send(actor)
        held.make_durable()
    held.loop.step()
    held.make_durable()
    weights = held.loop._published[1]
    held.send(actor, 1)
    held.journal.sync()
    held.kill()
    held.live(2)
    credit = held.actor(1).take(Credit)[0]
    assert credit.policy_version == 1
    assert held.loop._published == (1, weights), "whatever was admitted since they were published"


# -- any history -------------------------------------------------------------------------------------------------------


class Troupe:
    """Two actors of any lives, and a learner of any lives."""

    def __init__(self, held: Bench) -> None:
        self.held = held
        self.learner = 1
        self.gone: list[Player] = []
        self.players = [Player(held, index) for index in range(2)]
        self.greet()
        held.make_durable()

    def greet(self) -> None:
        for player in self.players:
            player.greet()

    def move(self, name: str, player: Player) -> None:
        match name:
            case "play":
                player.play()
            case "step":
                self.held.step_all()
            case "sync":
                self.held.make_durable()
            case "pay":
                self.held.pay()
            case "kill":
                self.kill()
            case "die":
                self.gone.append(player)
                self.players[player.index] = Player(self.held, player.index, player.incarnation + 1)
                self.players[player.index].greet()
            case _:
                player.greet()

    def kill(self) -> None:
        durable = self.held.journal.durable_position
        self.held.kill()
        self.learner += 1
        self.held.live(self.learner)
        assert self.held.recovery.is_exact
        assert self.held.journal.next_position == durable + 1, "all that was durable, and the recovery"
        self.greet()

    def finish(self) -> None:
        """Go on until everybody has been answered."""
        for _ in range(8):
            self.held.make_durable()
            for player in self.players:
                player.play()
            self.held.step_all()
        self.held.make_durable()
        for player in (*self.players, *self.gone):
            player.hear()


MOVES = ["play"] * 5 + ["step", "sync", "pay", "kill", "die", "greet"]


@pytest.mark.parametrize("seed", range(6))
def test_over_any_lives_nothing_is_lost_nothing_doubled_and_no_credit_too_many(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with bench(tmp_path / "run", "simic_trainer.max_policy_lag=3") as held:
        troupe = Troupe(held)
        for _ in range(45):
            troupe.move(str(rng.choice(MOVES)), troupe.players[int(rng.integers(2))])
            expect_no_credit_too_many(held, troupe.players)
        troupe.finish()
        admitted = admitted_of(held)
        assert len(set(admitted)) == len(admitted), "nothing is taken twice"
        for player in (*troupe.players, *troupe.gone):
            who = (player.index, player.incarnation)
            mine = {sequence for *sender, sequence in admitted if tuple(sender) == who}
            assert player.acknowledged <= mine, "nothing acknowledged is lost"
            assert not mine & set(player.refused)
            if player in troupe.players:
                assert player.unanswered == {}, "everything is answered in the end"
                assert player.line.sequence >= 1
                settled = set(range(1, player.line.sequence + 1))
                assert mine | set(player.refused) | lost(held, who) == settled
        expect_the_journal_to_be_the_truth(held)


def lost(held: Bench, who: tuple[int, int]) -> set[int]:
    """Refused, as the journal has it: an actor need not have been told before the learner died."""
    refused = [record.header for record in held.records("ExperienceRefused")]
    return {event["sequence"] for event in refused if (event["actor"], event["incarnation"]) == who}


def expect_no_credit_too_many(held: Bench, players: list[Player]) -> None:
    """In hand, on the way, and held: of each actor never more than its number."""
    holds = Counter(unroll.actor for unroll in held.loop.learner.ledger.unconsumed())
    for player in players:
        if player.learner != held.recovery._incarnation:
            continue
        in_hand = player.credits + sum(m.count for m in player.line.heard if isinstance(m, Credit))
        on_the_way = sum(
            sequence > held.loop.learner.ledger.settled(player.index, player.incarnation)
            for sequence in player.unanswered
        )
        assert in_hand + on_the_way + holds[player.index] <= IN_FLIGHT


def expect_the_journal_to_be_the_truth(held: Bench) -> None:
    fold = LearnerFold(held.config, held.journal.directory, held.directory / "checkpoints")
    for record in held.records():
        folded = fold.take(record)
        if folded.report is not None:
            assert folded.report.digest == record.header["digest"]
    assert is_same_state(fold.learner.state(), held.loop.learner.state())
    assert contents(fold.learner) == contents(held.loop.learner)


# -- samples per insert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "per_insert"), [(0.25, 4 / 3), (0.5, 2.0), (0.0, 1.0)])
def test_every_experience_is_drawn_so_often_as_the_ratio_says(
    tmp_path: Path, ratio: float, per_insert: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`1 / (1 - replay_ratio)` draws for each that was consumed, over kills, refusals and slow and fast actors."""
    settings = (
        f"experience_buffer.replay_ratio={ratio}",
        "supervisor.unrolls_in_flight=3",
        "simic_trainer.max_policy_lag=2",
    )
    rng = np.random.default_rng(3)
    with bench(tmp_path / "run", *settings) as held:
        players = [Player(held, index) for index in range(2)]
        for player in players:
            player.greet()
        held.make_durable()
        for number in range(36):
            for player in players:
                for _ in range(int(rng.integers(4))):
                    if number % 9 == 8:
                        player.version = 0
                    player.play()
            if number % 3:
                held.step_all()
            held.make_durable()
            if number == 20:
                held.kill()
                held.live(2)
                for player in players:
                    player.greet()
                held.make_durable()
        held.step_all()
        learner = held.loop.learner
        drawn = 8 * len(held.records("LearnerStepped"))
        fills = held.config.experience_buffer.min_experiences
        assert learner.steps_done >= 12
        consumed = learner.buffer.consumed - fills
        assert drawn / consumed == pytest.approx(per_insert, abs=1e-12)
        assert learner.buffer.fresh < fresh_per_batch(held.config), "all that could be drawn was drawn"

        refused = held.records("ExperienceRefused")
        assert refused, "some were too old"
        assert {record.header["reason"] for record in refused} == {"too_old"}
        steps = sum(record.header["steps"] for record in refused)
        assert learner.environment_steps == T * learner.buffer.inserted + steps
        counted = held.loop.counters().get("refused.too_old", 0)
        assert 0 < counted <= len(refused), "of this life"


def test_a_learner_that_makes_no_step_stops_every_actor(held: Bench) -> None:
    players = [Player(held, index) for index in range(2)]
    for player in players:
        player.greet()
    held.make_durable()
    played = Counter[int]()
    for _ in range(12):
        for player in players:
            played[player.index] += player.play()
        held.make_durable()
    fills = held.config.experience_buffer.min_experiences // LANES
    assert sum(played.values()) == fills + 2 * IN_FLIGHT
    assert held.loop.learner.buffer.fresh == 2 * IN_FLIGHT * LANES
