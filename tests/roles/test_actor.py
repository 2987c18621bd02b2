"""An actor beside a real learner's loop, in threads instead of processes: credits, weights, waiting, leaving."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.errors import UnavailableError
from esper_simic.events import ExperienceAdmitted
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import encode
from esper_simic.unroll import begin, unroll
from supervisor.bus import Poller, Received, Server, ipc_endpoint, runtime_directory
from supervisor.child import ChildSpec
from supervisor.journal import Record
from supervisor.protocol import (
    ACCEPTS,
    Acknowledged,
    Credit,
    FromChild,
    Hello,
    Message,
    Noted,
    Progress,
    PullWeights,
    Ready,
    Refused,
    Stop,
    Stopped,
    Unroll,
    Weights,
    Welcome,
)
from supervisor.roles import actor
from supervisor.roles.channel import ControlChannel
from tests.policies.synthetic import make_policy
from tests.roles.bench import LANES, RUN_ID, Bench, T, bench, make_config, spec_of

DEADLINE_S = 60.0
BYTES_MAX = 2**26
SMALL = (
    "environment.max_epochs=6",
    "environment.training_epochs_min=2",
    "environment.train_batches=1",
    "environment.train_batch_size=4",
    "environment.validation_samples=20",
)


class Control:
    """A supervisor's end of control lines, by hand: it notes whatever is to be noted."""

    def __init__(self, server: Server, endpoint: str) -> None:
        self.server, self.endpoint = server, endpoint
        self.heard: list[Message] = []

    def hear(self) -> None:
        while (received := self.server.receive()) is not None:
            assert isinstance(received, Received), received
            self.heard.append(received.message)
            if isinstance(received.message, Stopped):
                self.server.send(received.peer, Noted(of="Stopped"))

    def said(self, kind: type[FromChild]) -> list[Message]:
        return [message for message in self.heard if isinstance(message, kind)]


@contextmanager
def control_line(name: str = "control") -> Iterator[Control]:
    with runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, name)
        with Server(endpoint, run_id=RUN_ID, accepts=ACCEPTS["control"], frame_bytes_max=BYTES_MAX) as server:
            yield Control(server, endpoint)


class Thread(threading.Thread):
    """A child's main; what it raised is raised again by `finish`."""

    def __init__(self, spec: ChildSpec) -> None:
        super().__init__(daemon=True)
        self._spec = spec
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            actor.main(self._spec)
        except Exception as error:  # noqa: BLE001 - handed to the test
            self._error = error

    def finish(self) -> None:
        self.join(DEADLINE_S)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error


class Pair:
    """The loop of a learner, moved by hand, and an actor that lives its own life in a thread."""

    def __init__(self, held: Bench, control: Control) -> None:
        self.held, self.control = held, control

    def begin(self, incarnation: int = 1) -> Thread:
        endpoints = {"control": self.control.endpoint, "experience": self.held.endpoint}
        child = Thread(spec_of("actor", 0, self.held.directory, self.held.config, endpoints, incarnation))
        child.start()
        return child

    def turn(self) -> None:
        self.control.hear()
        self.held.loop.take_messages()
        self.held.journal.sync()
        self.held.loop.pay()

    def until(self, admitted: int) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while self.held.loop.learner.buffer.inserted < admitted * LANES:
            self.turn()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)

    def stop(self, child: Thread, incarnation: int = 1) -> None:
        self.control.server.send(f"actor-0-{incarnation}", Stop(reason="enough"))
        deadline_s = time.monotonic() + DEADLINE_S
        while child.is_alive():
            self.turn()
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        child.finish()


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
    last = [message for message in pair.control.said(Progress) if isinstance(message, Progress)][-1]
    assert (last.work, last.environment_steps) == (4, 4 * T * LANES)


def resimulate(
    pair: Pair, records: list[Record], weights: dict[str, Tensor], first_episodes: list[int]
) -> None:
    """Make the unrolls of one life again from seeds and weights; they must be the journaled bytes."""
    trainer = pair.held.config.simic_trainer
    seeds = [seeding.derive(trainer.seed, "actor", 0, lane) for lane in range(LANES)]
    environment = GrowingHostVectorEnv(
        LANES,
        pair.held.config.environment,
        gamma=trainer.gamma,
        lane_seeds=seeds,
        first_episodes=first_episodes,
    )
    observation, _ = environment.reset()
    policy = GraphPolicy(environment.spec_observation, trainer, np.random.default_rng(99))
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
    first_episodes = pair.held.loop.learner.next_episodes(0)
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
        waits = [message.waiting_for for message in control.said(Progress) if isinstance(message, Progress)]
        assert set(waits) <= {"learner"}


# -- the line alone ----------------------------------------------------------------------------------------------------


class LearnerEnd:
    """A learner's socket without a learner."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def hear(self) -> tuple[Message, tuple[bytes, ...]]:
        poller = Poller()
        poller.add(self.server)
        assert poller.wait(10_000)
        received = self.server.receive()
        assert isinstance(received, Received)
        return received.message, received.frames

    def say(self, message: Message, frames: tuple[bytes, ...] = ()) -> None:
        self.server.send("actor-0-1", message, frames)


class Ends:
    def __init__(
        self, learner: LearnerEnd, line: actor.LearnerLine, channel: ControlChannel, held: Control
    ) -> None:
        self.learner, self.line, self.channel, self.control = learner, line, channel, held

    def arrive(self, policy: GraphPolicy | None = None) -> bool:
        """Wait until something is there, then take it."""
        poller = Poller()
        poller.add(self.line.client)
        assert poller.wait(10_000)
        return self.line.take(policy)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    config = make_config(*SMALL)
    with control_line() as control, runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, "experience")
        spec = spec_of("actor", 0, tmp_path, config, {"control": control.endpoint, "experience": endpoint})
        with Server(endpoint, run_id=RUN_ID, accepts=ACCEPTS["learner"], frame_bytes_max=BYTES_MAX) as server:
            line = actor.LearnerLine(spec, config)
            with ControlChannel(spec, BYTES_MAX) as channel:
                channel.ready()
                learner = LearnerEnd(server)
                assert learner.hear()[0] == Hello(actor=0, incarnation=1)
                yield Ends(learner, line, channel, control)
            line.close()


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


def test_the_line_counts_credits_and_what_is_not_answered(ends: Ends) -> None:
    ends.learner.say(Welcome(first_episodes=[5, 6, 7, 8]))
    ends.learner.say(Credit(count=2, policy_version=9))
    while ends.line.credits < 2:
        assert not ends.arrive()
    assert (ends.line.first_episodes, ends.line.newest_version) == ([5, 6, 7, 8], 9)
    for sequence in (1, 2):
        ends.line.send(make_unroll(sequence), [b"frame"])
        assert ends.learner.hear() == (make_unroll(sequence), (b"frame",))
    assert (ends.line.credits, ends.line.unacknowledged) == (0, {1, 2})
    ends.learner.say(Acknowledged(sequence=1, position=3))
    ends.learner.say(Refused(sequence=2, reason="too_old"))
    while ends.line.unacknowledged:
        assert not ends.arrive()
    assert (ends.line.refused, ends.line.credits) == (1, 0), "a credit is a message of its own"


def test_new_weights_are_loaded_and_an_empty_answer_is_one_too(ends: Ends) -> None:
    policy = make_policy(1)
    other = {name: tensor + 1 for name, tensor in policy.state_dict().items()}
    ends.line.ask_weights()
    assert ends.learner.hear()[0] == PullWeights(have_version=-1)
    ends.learner.say(Weights(version=7), (safetensors.torch.save(other),))
    assert ends.arrive(policy)
    assert ends.line.version == 7
    assert all(tensor.equal(other[name]) for name, tensor in policy.state_dict().items())
    ends.line.ask_weights()
    assert ends.learner.hear()[0] == PullWeights(have_version=7)
    ends.learner.say(Weights(version=7))
    assert ends.arrive(policy)
    assert ends.line.version == 7
    assert all(tensor.equal(other[name]) for name, tensor in policy.state_dict().items())


class CountingPoller(Poller):
    """Counts waits that came to their end and waits that were cut short; moves the learner's end meanwhile.

    After `credit_after` quiet waits the learner gives a credit; the question that follows is answered if wanted.
    """

    def __init__(self, ends: Ends, *, credit_after: int, is_answering: bool) -> None:
        super().__init__()
        self._ends, self._credit_after, self._is_answering = ends, credit_after, is_answering
        self.quiet = self.woken = 0
        self.add(ends.channel.client)
        self.add(ends.line.client)

    def wait(self, timeout_ms: float) -> frozenset[Any]:
        if self._is_answering and self._ends.line.credits > 0:
            assert self._ends.learner.hear()[0] == PullWeights(have_version=-1)
            self._ends.learner.say(Weights(version=-1))
        seen = super().wait(timeout_ms)
        self.woken += bool(seen)
        self.quiet += not seen
        if not seen and self.quiet == self._credit_after:
            self._ends.learner.say(Credit(count=1, policy_version=0))
        return seen


def test_waiting_for_a_credit_sleeps_and_only_then_asks_for_weights(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)
    poller = CountingPoller(ends, credit_after=5, is_answering=True)
    began_s = time.monotonic()
    assert actor._await_turn(ends.channel, ends.line, poller, make_policy(), 0)
    assert time.monotonic() - began_s >= 5 * 0.02, "five quiet waits take their time"
    assert poller.quiet >= 5
    assert poller.woken <= 2, "it looked only when something had come: the credit, the weights"
    ends.control.hear()
    waits = [message.waiting_for for message in ends.control.said(Progress) if isinstance(message, Progress)]
    assert waits[0] == "credit"


def test_waiting_ends_with_a_stop(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)
    while not ends.control.said(Ready):
        ends.control.hear()
    ends.control.server.send("actor-0-1", Stop(reason="enough"))
    poller = CountingPoller(ends, credit_after=0, is_answering=False)
    assert not actor._await_turn(ends.channel, ends.line, poller, make_policy(), 0)


def test_a_learner_that_gives_no_weights_is_unavailable(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "WAIT_MS", 5.0)
    monkeypatch.setattr(actor, "ANSWER_TIMEOUT_POLLS", 4)
    poller = CountingPoller(ends, credit_after=3, is_answering=False)
    with pytest.raises(UnavailableError, match="no weights in 0.02 s"):
        actor._await_turn(ends.channel, ends.line, poller, make_policy(), 0)
    assert poller.quiet == 3 + 5, "a credit may be long in coming, an answer may not"
