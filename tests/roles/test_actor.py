"""An actor beside a real learner's loop: credits, weights, waiting, leaving, and learners that die."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.events import ExperienceAdmitted
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import encode
from esper_simic.unroll import begin, unroll
from esper_simic.worlds.growing import GrowingWorld
from supervisor import faults
from supervisor.bus import Client, Poller, Server
from supervisor.clock import ManualClock
from supervisor.journal import Record
from supervisor.protocol import Progress, Ready, Stop, Stopped, Unroll
from supervisor.roles import actor, learner_line
from supervisor.roles.learner_line import LearnerLine
from tests.roles.bench import LANES, Bench, T, bench, spec_of
from tests.roles.pair import DEADLINE_S, SMALL, Pair, control_line


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with bench(tmp_path, *SMALL) as held, control_line() as control:
        yield Pair(held, control)


def admitted(pair: Pair) -> list[ExperienceAdmitted]:
    return [record.header_as(ExperienceAdmitted) for record in pair.held.records("ExperienceAdmitted")]


def test_an_actor_says_ready_sends_and_leaves_when_it_is_told_to(pair: Pair) -> None:
    child = pair.begin()
    pair.until(4)  # two fill the buffer and come back at once, two stay: all credits are spent
    pair.stop(child)
    assert isinstance(pair.control.heard[0], Ready)
    assert pair.control.said(Stopped) == [Stopped(role="actor", index=0, incarnation=1)]
    events = admitted(pair)
    assert [event.sequence for event in events] == [1, 2, 3, 4], (
        "never more than its credits, however long it waited"
    )
    assert {event.policy_version for event in events} == {0}
    last = pair.control.said(Progress)[-1]
    assert (last.work, last.environment_steps) == (4, 4 * T * LANES)


def resimulate(
    pair: Pair, records: list[Record], weights: dict[str, Tensor], first_episodes: list[int]
) -> None:
    """Make the unrolls of one life again from seeds and weights; they must be the journaled bytes."""
    trainer = pair.held.config.simic_trainer
    seeds = [seeding.derive(trainer.seed, "actor", 0, lane) for lane in range(LANES)]
    config = pair.held.config.environment
    world = GrowingWorld(config, trainer.gamma)
    environment = world.lanes(seeds, first_episodes, stagger=config.stagger)
    observation, _ = environment.reset()
    policy = GraphPolicy(observation_spec_of(config), trainer, np.random.default_rng(99))
    policy.load_state_dict(weights)
    carry = begin(policy, observation, seeds, np.array(first_episodes, dtype=np.int64))
    for record in records:
        numbers = carry.episode_numbers.tolist()
        trajectory, finished = unroll(policy, environment, carry, T)
        event = record.header_as(ExperienceAdmitted)
        assert [bytes(frame) for frame in record.frames] == encode(trajectory)
        assert (event.episode_numbers, event.episodes) == (numbers, finished)


def test_what_it_sends_is_what_its_seeds_and_weights_give(pair: Pair) -> None:
    """An actor owns nothing: run, actor, lane and episode number name all its chance."""
    child = pair.begin()
    pair.until(3)
    pair.stop(child)
    resimulate(pair, pair.held.records("ExperienceAdmitted"), pair.held.initial_weights, [0] * LANES)


def test_it_acts_with_the_newest_announced_weights(pair: Pair) -> None:
    child = pair.begin()
    pair.until(4)
    pair.held.loop.step()
    pair.held.make_durable()
    pair.until(5)
    pair.stop(child)
    assert [event.policy_version for event in admitted(pair)][-1] == 1


def test_its_next_life_goes_on_behind_its_episodes(pair: Pair) -> None:
    child = pair.begin()
    pair.until(4)
    pair.stop(child)
    pair.held.step_all()
    pair.held.make_durable()
    first_episodes = pair.held.loop.learner.ledger.next_episodes(0)
    weights = safetensors.torch.load(pair.held.loop.learner.weights())
    child = pair.begin(incarnation=2)
    pair.until(5)
    pair.stop(child, incarnation=2)
    records = pair.held.records("ExperienceAdmitted")
    second = [record for record in records if record.header["incarnation"] == 2]
    resimulate(pair, second, weights, first_episodes)
    events = admitted(pair)
    lives = {life: [event for event in events if event.incarnation == life] for life in (1, 2)}
    for lane in range(LANES):
        last = max(event.episode_numbers[lane] for event in lives[1])
        assert lives[2][0].episode_numbers[lane] > last


def test_a_stop_before_the_welcome_is_obeyed(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        deadline_s = time.monotonic() + DEADLINE_S
        while not control.said(Ready):
            control.hear()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        control.server.send("actor-0-1", Stop(reason="enough"))
        while child.is_alive():
            control.hear()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        child.finish()
        assert held.records("ExperienceAdmitted") == []
        assert {message.waiting_for for message in control.said(Progress)} <= {"learner"}


def test_it_passes_its_fault_points_in_order_and_witnesses_what_it_was_promised(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []

    def point(name: str, *_: object) -> None:  # the learner passes points in this process too
        if name.startswith("actor."):
            passed.append(name)

    monkeypatch.setattr(faults, "point", point)
    monkeypatch.setattr(faults, "witness", passed.append)
    child = pair.begin()
    pair.until(1)
    pair.wait(lambda: passed.count("actor.acknowledged.after") >= 1, pair.turn)
    pair.stop(child)
    position = pair.held.records("ExperienceAdmitted")[0].position
    assert passed[:5] == [
        "version 0",
        "actor.weights.after",
        "actor.unroll.after",
        "actor.send.before",
        "actor.send.after",
    ]
    assert passed.count("version 0") == 1, "it held that version for the next unroll"
    promised = passed.index(f"acknowledged 0 1 1 {position}")
    assert passed[promised + 1] == "actor.acknowledged.after"


# -- learners that die -------------------------------------------------------------------------------------------------


def test_an_actor_outlives_its_learner(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_line, "GREETING_INTERVAL_S", 0.1)
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)
    child = pair.begin()
    pair.until(4)
    pair.held.kill()
    # It waits, says so, and does not give up.
    pair.wait(
        lambda: any(message.waiting_for == "learner" for message in pair.control.said(Progress)[1:]),
        pair.control.hear,
    )
    assert child.is_alive()
    pair.held.live(2)
    pair.wait(lambda: pair.held.loop.learner.ledger.unrolls(0) >= 10, pair.step_turn)
    pair.stop(child)
    events = admitted(pair)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.incarnation for event in events} == {1}
    assert events[-1].policy_version > 0
    assert pair.held.records("ExperienceRefused") == []


def _await(end: Client | Server) -> None:
    """Give the sockets' own threads a moment to bring what was said."""
    poller = Poller()
    poller.add(end)
    poller.wait(3)


class Lives:
    """One life of an actor's line and many of a learner, moved by chance."""

    def __init__(self, held: Bench, seed: int) -> None:
        self.held, self.random = held, random.Random(seed)
        self.clock = ManualClock()
        spec = spec_of("actor", 0, held.directory, held.config, {"experience": held.endpoint})
        self.line = LearnerLine(spec, held.config, self.clock)
        self.life, self.sequence = 1, 0
        self.acknowledged: dict[int, int] = {}
        self._frames = held.frames(0)

    def witness(self, promise: str) -> None:
        kind, *numbers = promise.split()
        assert kind == "acknowledged"
        _, _, sequence, position = map(int, numbers)
        self.acknowledged[sequence] = position

    def act(self) -> None:
        """As an actor does, but for the work."""
        _await(self.line.client)
        if not self.line.seek_turn():
            return
        self.line.take_weights()
        self.sequence += 1
        message = Unroll(
            actor=0,
            incarnation=1,
            sequence=self.sequence,
            policy_version=self.line.version,
            lanes=LANES,
            steps=T,
            episode_numbers=[0] * LANES,
            episodes=[],
        )
        self.line.send(message, self._frames)

    def wait(self) -> None:
        self.clock.advance(1.1)
        self.act()

    def hear(self) -> None:
        _await(self.held.server)
        self.held.loop.take_messages()

    def sync(self) -> None:
        self.held.journal.sync()
        self.held.loop.pay()

    def step(self) -> None:
        if self.held.loop.may_step:
            self.held.loop.step()

    def die(self) -> None:
        self.life += 1
        self.held.kill()
        if self.random.random() < 0.5:  # it is noticed now or later
            self.act()
            self.wait()
        self.held.live(self.life)

    def move(self) -> None:
        moves = [self.act, self.hear, self.sync, self.step, self.wait, self.die]
        self.random.choices(moves, [24, 24, 18, 12, 6, 1])[0]()
        assert (
            len(self.held.loop.learner.ledger.unconsumed()) <= self.held.config.supervisor.unrolls_in_flight
        )

    def is_quiet(self) -> bool:
        """Whether all was said, and every credit is in the actor's hands or held by an unroll not consumed yet."""
        out = self.line.credits + len(self.held.loop.learner.ledger.unconsumed())
        return not self.line.unanswered and out == self.held.config.supervisor.unrolls_in_flight

    def settle(self) -> None:
        """Let them talk until all is quiet."""
        poller = Poller()
        poller.add(self.line.client)
        poller.add(self.held.server)
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.is_quiet():
            assert time.monotonic() < deadline_s, (self.line.unanswered, self.line.credits)
            poller.wait(20)
            self.clock.advance(0.1)
            self.line.take()
            self.held.loop.take_messages()
            self.sync()


@pytest.mark.parametrize("seed", range(4))
def test_whenever_learners_die_each_unroll_is_admitted_once_in_order_and_no_credit_is_lost_or_made(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tmp_path) as held:
        lives = Lives(held, seed)
        monkeypatch.setattr(faults, "witness", lives.witness)
        try:
            moves = 0
            while lives.sequence < 8 or lives.life < 5:
                lives.move()
                moves += 1
                assert moves < 5_000, "nothing goes on"
            lives.settle()
        finally:
            lives.line.close()
        events = {record.position: record.header["sequence"] for record in held.records("ExperienceAdmitted")}
        assert list(events.values()) == list(range(1, lives.sequence + 1))
        assert {sequence: position for position, sequence in events.items()} == lives.acknowledged
        assert held.records("ExperienceRefused") == []
