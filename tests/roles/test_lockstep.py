"""The learner's loop in lockstep: rounds, whoever comes first and whoever dies; the run is a function of its seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervisor.protocol import Acknowledged, Credit, Message, Refused, Unroll, Welcome
from supervisor.roles.fold import LearnerFold
from tests.roles.bench import LANES, Bench, bench, credits_in
from tests.roles.scribe import contents, is_same_state

LOCKSTEP = ("supervisor.lockstep=true", "simic_trainer.digest_every_steps=1")
UPDATES = 7
ACTORS = 2


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    """A loop in lockstep whose journal becomes durable only when a test says so."""
    with bench(tmp_path / "run", *LOCKSTEP) as made:
        yield made


class Player:
    """An actor whose unroll is a function of its round, as that of a real one is of its seed and the weights."""

    def __init__(self, held: Bench, index: int, incarnation: int = 1) -> None:
        self.held, self.index, self.incarnation = held, index, incarnation
        self.line = held.stranger(index, incarnation)
        self.unanswered: dict[int, Unroll] = {}
        self.credits = self.learner = self.version = 0
        self.is_greeting = False
        self.refused: list[str] = []
        self.greet()

    def greet(self) -> None:
        self.hear()
        self.is_greeting = True
        self.line.hello(tuple(sorted(self.unanswered)))
        self.held.settle(self.line)

    def play(self) -> bool:
        """Make the unroll of the round, if there is a credit."""
        self.hear()
        if not self.credits or self.is_greeting:
            return False
        self.credits -= 1
        self.line.sequence += 1
        number = self.line.sequence
        self.unanswered[number] = self.line.message(self.version, episode_numbers=[number] * LANES)
        self.send(number)
        self.held.settle(self.line)
        return True

    def send(self, number: int) -> None:
        self.line.client.send(self.unanswered[number], self.held.frames(1000 * self.index + number))

    def hear(self) -> None:
        heard, self.line.heard = self.line.heard, []
        for message in heard:
            self._hear(message)

    def _hear(self, message: Message) -> None:
        match message:
            case Welcome(learner=learner):
                self.is_greeting = False
                if learner != self.learner:
                    self._begin_anew(message)
            case Credit(count=count, policy_version=version):
                self.credits, self.version = self.credits + count, version
            case Acknowledged(sequence=sequence):
                self.unanswered.pop(sequence, None)
            case Refused(sequence=sequence, reason=reason):
                self.unanswered.pop(sequence, None)
                self.refused.append(reason)
            case _:
                pass

    def _begin_anew(self, welcome: Welcome) -> None:
        if self.learner == 0:  # it re-simulates what the journal has of its index
            assert welcome.first_episodes == [0] * LANES, "from the start of the run"
            self.line.sequence = welcome.unrolls
        self.learner, self.credits = welcome.learner, 0
        self.unanswered = {n: unroll for n, unroll in self.unanswered.items() if n > welcome.settled}
        for number in sorted(self.unanswered):
            self.send(number)
        self.held.settle(self.line)


def turn(held: Bench) -> None:
    """What the learner's main does between two looks at its sockets."""
    held.make_durable()
    while held.loop.may_step:
        held.loop.step()
    held.loop.open_round()
    held.make_durable()


def may_step(held: Bench) -> bool:
    return held.loop.may_step


def history(held: Bench) -> list[tuple[str, dict[str, Any], list[bytes]]]:
    """What was learned from and what came of it, without the lives of processes."""
    kept = []
    for record in held.records():
        if record.kind in ("ExperienceAdmitted", "LearnerStepped"):
            header = {key: value for key, value in record.header.items() if key != "incarnation"}
            kept.append((record.kind, header, [bytes(frame) for frame in record.frames]))
    return kept


def play_to_the_end(held: Bench, players: list[Player], orders: np.random.Generator) -> None:
    for _ in range(40):
        turn(held)
        for index in orders.permutation(ACTORS):
            players[index].play()
    turn(held)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """A run to the last update in which nothing happens: the digest of its state, and its history."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    with bench(directory, *LOCKSTEP, f"supervisor.max_updates={UPDATES}") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        for _ in range(40):
            turn(held)
            for player in players:
                player.play()
        assert held.loop.is_over
        assert held.loop.learner.steps_done == UPDATES
        return held.loop.learner.state().digest, history(held)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_round_gives_each_actor_one_credit_and_steps_come_between_rounds(held: Bench) -> None:
    players = [Player(held, index) for index in range(ACTORS)]
    for number in range(1, 6):
        turn(held)
        published = held.loop.learner.steps_done
        assert [player.play() for player in players[:1]] == [True]
        assert not players[0].play(), "one credit a round"
        held.make_durable()
        assert not may_step(held), "one is missing, however much experience there is"
        assert not players[0].play(), "what comes back with a consumed unroll is no credit here"
        assert players[1].play()
        assert {player.version for player in players} == {published}, "the weights of the round before"
        assert held.loop.learner.ledger.unrolls(0) == held.loop.learner.ledger.unrolls(1) == number
    assert held.loop.learner.steps_done >= 4


def test_the_order_of_arrival_decides_nothing(tmp_path: Path, reference: tuple[str, list[Any]]) -> None:
    with bench(tmp_path / "run", *LOCKSTEP, f"supervisor.max_updates={UPDATES}") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        play_to_the_end(held, players, np.random.default_rng(5))
        digest, expected = reference
        assert held.loop.learner.state().digest == digest
        assert history(held) == expected


def test_the_second_actor_waits_in_the_round_for_the_first(held: Bench) -> None:
    first, second = (Player(held, index) for index in range(ACTORS))
    turn(held)
    second.play()
    held.make_durable()
    assert second.line.take(Acknowledged) == []
    assert held.records("ExperienceAdmitted") == []
    first.play()
    held.make_durable()
    assert [record.header["actor"] for record in held.records("ExperienceAdmitted")] == [0, 1]
    assert len(second.line.take(Acknowledged)) == 1


def test_a_run_with_a_last_update_ends_with_exactly_that(tmp_path: Path) -> None:
    for updates in (1, 2, 3, 4):
        with bench(tmp_path / str(updates), *LOCKSTEP, f"supervisor.max_updates={updates}") as held:
            players = [Player(held, index) for index in range(ACTORS)]
            play_to_the_end(held, players, np.random.default_rng(0))
            assert held.loop.learner.steps_done == updates
            assert held.loop.is_over
            assert not may_step(held)
            assert [player.play() for player in players] == [False, False], "and no round is begun any more"
            assert held.loop.learner.can_step() == (updates == 3), "in the middle of a round's updates too"


def test_without_lockstep_a_run_ends_with_exactly_that_too(tmp_path: Path) -> None:
    with bench(tmp_path / "run", "supervisor.max_updates=1") as held:
        actor = held.actor()
        for _ in range(4):
            held.send(actor)
            held.make_durable()
        assert held.step_all() == 1
        other = held.actor(1)
        for _ in range(2):
            held.send(other, 1)
        assert held.loop.learner.can_step()
        assert not may_step(held)


@pytest.mark.parametrize("shift", [-1, 1, 5])
def test_an_unroll_of_another_round_is_not_taken(held: Bench, shift: int) -> None:
    players = [Player(held, index) for index in range(ACTORS)]
    for _ in range(2):
        turn(held)
        for player in players:
            player.play()
    turn(held)
    player = players[0]
    player.hear()
    before = len(held.records("ExperienceAdmitted"))
    player.line.sequence += shift
    player.play()
    held.make_durable()
    player.hear()
    assert player.unanswered == {}
    assert len(held.records("ExperienceAdmitted")) == before
    assert held.loop.learner.ledger.unrolls(0) == 2
    if shift < 0:
        assert player.refused == [], "it gets the first answer again"
        assert held.records("ExperienceRefused") == []
    else:
        assert player.refused == ["malformed"]
        (refusal,) = held.records("ExperienceRefused")
        assert "round 3 of actor 0 is due" in refusal.header["reason"]


def test_an_unroll_without_the_actors_state_is_refused(held: Bench) -> None:
    player = Player(held, 0)
    turn(held)
    player.hear()
    held.send(player.line, frames=held.frames(1)[:-1])
    held.make_durable()
    player.hear()
    assert player.refused == ["malformed"]


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_a_learner_killed_in_the_middle_of_a_round_finishes_it(
    tmp_path: Path, reference: tuple[str, list[Any]]
) -> None:
    """One unroll of the round is durable, the other was never sent: who has it gets no credit, who has not gets one."""
    with bench(tmp_path / "run", *LOCKSTEP, f"supervisor.max_updates={UPDATES}") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        for _ in range(3):
            turn(held)
            for player in players:
                player.play()
        turn(held)
        players[0].play()
        held.make_durable()
        unrolls = [held.loop.learner.ledger.unrolls(index) for index in range(ACTORS)]
        assert unrolls[0] == unrolls[1] + 1
        steps = held.loop.learner.steps_done
        held.kill()
        held.live(2)
        assert [held.loop.learner.ledger.unrolls(index) for index in range(ACTORS)] == unrolls
        assert held.loop.learner.steps_done == steps
        assert not may_step(held), "the round is open"
        for player in players:
            player.greet()
        held.make_durable()
        assert [credits_in(player.line) for player in players] == [0, 1]
        for player in players:
            player.credits = player.index
            player.is_greeting = False
            player.learner = 2
        play_to_the_end(held, players, np.random.default_rng(1))
        digest, expected = reference
        assert held.loop.learner.state().digest == digest
        assert history(held) == expected


def test_a_learner_killed_between_two_rounds_makes_the_updates_that_are_left(held: Bench) -> None:
    players = [Player(held, index) for index in range(ACTORS)]
    for _ in range(4):
        turn(held)
        for player in players:
            player.play()
    assert may_step(held)
    held.loop.step()
    held.journal.sync()
    steps = held.loop.learner.steps_done
    assert may_step(held), "the fourth round allows two updates"
    held.kill()
    held.live(2)
    assert held.recovery.is_exact
    assert held.loop.learner.steps_done == steps + 1, "before it serves anybody"
    assert not may_step(held)
    for player in players:
        player.greet()
    held.make_durable()
    assert [credits_in(player.line) for player in players] == [1, 1], "the next round is open"


def test_a_learner_that_comes_back_to_a_finished_run_begins_no_round(tmp_path: Path) -> None:
    with bench(tmp_path / "run", *LOCKSTEP, "supervisor.max_updates=2") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        play_to_the_end(held, players, np.random.default_rng(0))
        held.journal.sync()
        held.kill()
        held.live(2)
        assert held.loop.is_over
        for player in players:
            player.greet()
        turn(held)
        assert [player.play() for player in players] == [False, False]
        assert held.loop.learner.steps_done == 2


def test_an_actor_that_dies_with_its_round_on_the_way_makes_it_again(
    tmp_path: Path, reference: tuple[str, list[Any]]
) -> None:
    with bench(tmp_path / "run", *LOCKSTEP, f"supervisor.max_updates={UPDATES}") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        for _ in range(2):
            turn(held)
            for player in players:
                player.play()
        turn(held)
        players[1].play()  # offered, and waits for the first
        players[1] = Player(held, 1, incarnation=2)
        players[0].play()
        held.make_durable()
        assert [held.loop.learner.ledger.unrolls(index) for index in range(ACTORS)] == [3, 2], (
            "what it sent is forgotten"
        )
        assert players[1].play(), "and did not use up the credit of its new life"
        assert players[1].line.sequence == 3
        held.make_durable()
        admitted = [(r.header["actor"], r.header["incarnation"]) for r in held.records("ExperienceAdmitted")]
        assert admitted[-2:] == [(0, 1), (1, 2)]
        play_to_the_end(held, players, np.random.default_rng(2))
        digest, expected = reference
        assert held.loop.learner.state().digest == digest
        assert history(held) == expected


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_killed_whenever_the_run_is_the_same(
    tmp_path: Path, reference: tuple[str, list[Any]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with bench(tmp_path / "run", *LOCKSTEP, f"supervisor.max_updates={UPDATES}") as held:
        players = [Player(held, index) for index in range(ACTORS)]
        learner, kills = 1, 0
        moves = ["play"] * 6 + ["turn"] * 3 + ["sync", "pay", "step", "kill", "die", "greet"]
        for _ in range(60):
            index = int(rng.integers(ACTORS))
            match rng.choice(moves):
                case "play":
                    players[index].play()
                case "turn":
                    turn(held)
                case "sync":
                    held.journal.sync()
                case "pay":
                    held.pay()
                case "step":
                    held.step_all()
                case "kill":
                    held.kill()
                    learner, kills = learner + 1, kills + 1
                    held.live(learner)
                    assert held.recovery.is_exact
                    for player in players:
                        player.greet()
                case "die":
                    players[index] = Player(held, index, players[index].incarnation + 1)
                case _:
                    players[index].greet()
        assert kills >= 1
        play_to_the_end(held, players, rng)
        digest, expected = reference
        assert held.loop.learner.state().digest == digest
        assert history(held) == expected
        assert [player.refused for player in players] == [[], []], "nothing is refused in lockstep"
        assert held.records("ExperienceRefused") == []
        fold = LearnerFold(held.config, held.journal.directory, held.directory / "checkpoints")
        for record in held.records():
            fold.take(record)
        assert is_same_state(fold.learner.state(), held.loop.learner.state())
        assert contents(fold.learner) == contents(held.loop.learner)
