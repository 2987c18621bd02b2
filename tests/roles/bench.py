"""A learner's life between a real journal and real sockets, moved by hand: nothing happens that a test does not do.

A life can be killed (`Bench.kill`: what was not durable is gone) and followed by the next one (`Bench.live`), while the
actors, their sockets and what they have heard stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from esper_simic.config import Config, parse, to_yaml
from esper_simic.errors import SimicError
from esper_simic.events import EpisodeFinished
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.trajectory import encode
from supervisor.bus import Client, Poller, Received, Server, ipc_endpoint, runtime_directory
from supervisor.child import ChildSpec
from supervisor.clock import ManualClock
from supervisor.events import ChildId
from supervisor.journal import Journal, Record, read
from supervisor.protocol import (
    ACCEPTS,
    Credit,
    Hello,
    Message,
    PullWeights,
    Unroll,
    Weights,
)
from supervisor.roles.attempts import Attempts
from supervisor.roles.checkpointing import Checkpointer
from supervisor.roles.learner_loop import LearnerLoop
from supervisor.roles.recovery import Progress, Recovery
from supervisor.roles.surroundings import Surroundings
from tests.policies.synthetic import trajectory

RUN_ID = "run-1"
T, LANES = 3, 4
WAIT_MS = 20
DEADLINE_S = 20.0
NEVER_MS = 3_600_000.0
"""A commit interval that no test lives to see: what is appended becomes durable at the next `sync` and not before."""

SETTINGS = f"""
simic_trainer: {{batch_size: 8, unroll_length: {T}, hidden_size: 16, graph_layers: 1, warmup_epochs: 2}}
experience_buffer: {{capacity: 40, min_experiences: 8, replay_ratio: 0.25}}
supervisor: {{num_actors: 2, unrolls_in_flight: 2}}
environment: {{environments_per_actor: {LANES}}}
"""


def make_config(*assignments: str) -> Config:
    return parse(SETTINGS, assignments=assignments)


def spec_of(
    role: str, index: int, run_dir: Path, config: Config, endpoints: dict[str, str], life: int = 1
) -> ChildSpec:
    return ChildSpec(
        who=ChildId(role, index, life),  # type: ignore[arg-type]
        run_id=RUN_ID,
        run_dir=str(run_dir),
        endpoints=endpoints,
        config_text=to_yaml(config),
    )


class Actor:
    """The line of one actor's life, spoken by a test: what was heard stays in `heard` until it is taken."""

    def __init__(self, endpoint: str, index: int, incarnation: int) -> None:
        self.index, self.incarnation = index, incarnation
        self.sequence = 0
        self.heard: list[Message] = []
        self.weights: list[bytes] = []
        self.client = Client(
            endpoint,
            f"actor-{index}-{incarnation}",
            run_id=RUN_ID,
            accepts=ACCEPTS["actor"],
            frame_bytes_max=2**26,
        )

    def hello(self, unacknowledged: tuple[int, ...] = ()) -> Self:
        self.client.send(Hello(actor=self.index, incarnation=self.incarnation, unacknowledged=unacknowledged))
        return self

    def message(self, version: int = 0, **changed: Any) -> Unroll:
        fields: dict[str, Any] = {
            "actor": self.index,
            "incarnation": self.incarnation,
            "sequence": self.sequence,
            "policy_version": version,
            "lanes": LANES,
            "steps": T,
            "episode_numbers": [0] * LANES,
            "episodes": [],
        }
        return Unroll(**fields | changed)

    def take(self, kind: type[Message]) -> list[Any]:
        """The messages of one kind heard since they were last taken."""
        taken = [message for message in self.heard if isinstance(message, kind)]
        self.heard = [message for message in self.heard if not isinstance(message, kind)]
        return taken


class Bench:
    """The loop, its journal, its socket, and what actors hear."""

    def __init__(self, directory: Path, config: Config, endpoint: str, commit_interval_ms: float) -> None:
        self.directory, self.config, self.endpoint = directory, config, endpoint
        self._commit_interval_ms = commit_interval_ms
        self.clock = ManualClock()
        self.actors: list[Actor] = []
        self.told: list[Progress] = []
        self.live(1)
        self.spec = observation_spec_of(config.environment)
        self.policy = GraphPolicy(self.spec, config.simic_trainer, np.random.default_rng(0))
        self.initial_weights = {n: t.clone() for n, t in self.loop.learner.policy.state_dict().items()}

    def live(self, life: int) -> Recovery:
        """Begin a life of the learner as its main does: journal, recovery, loop."""
        self.journal = Journal(
            self.directory / "journal" / "learner-0",
            owner="learner-0",
            run_id=RUN_ID,
            commit_interval_ms=self._commit_interval_ms,
        )
        self.attempts = Attempts(self.directory / "learner-0.attempts")
        self.recovery = Recovery(
            self.directory,
            RUN_ID,
            life,
            self.config,
            self.journal,
            self.attempts,
            self.clock,
            self.told.append,
        )
        try:
            learner = self.recovery.run().learner
        except SimicError:
            self.journal.close()
            self.attempts.close()
            raise
        limits = self.config.supervisor
        self.checkpointer = Checkpointer(
            self.directory / "checkpoints", self.journal, RUN_ID, limits, self.clock
        )
        self.checkpointer.begin(learner.steps_done, self.recovery.checkpoint_step)
        self.server = Server(self.endpoint, run_id=RUN_ID, accepts=ACCEPTS["learner"], frame_bytes_max=2**26)
        spec = spec_of("learner", 0, self.directory, self.config, {"experience": self.endpoint}, life)
        surroundings = Surroundings(self.clock)
        self.loop = LearnerLoop(
            spec, self.config, learner, self.journal, self.server, self.attempts, surroundings
        )
        self.loop.begin()
        return self.recovery

    def kill(self) -> None:
        """End this life as SIGKILL does: what is not on the disk by now never gets there."""
        on_disk = {path: path.read_bytes() for path in self.journal.directory.glob("*.log")}
        self.close()
        for path in self.journal.directory.glob("*.log"):
            if path in on_disk:
                path.write_bytes(on_disk[path])
            else:
                path.unlink()

    def close(self) -> None:
        """End this life in order."""
        self.server.close()
        self.journal.close()
        self.attempts.close()

    def actor(self, index: int = 0, incarnation: int = 1) -> Actor:
        """A new life of an actor that has said Hello and has heard the answer; everything is durable."""
        actor = self.stranger(index, incarnation).hello()
        self.settle(actor)
        self.make_durable()
        return actor

    def stranger(self, index: int = 0, incarnation: int = 1) -> Actor:
        """A new life of an actor that has said nothing yet."""
        actor = Actor(self.endpoint, index, incarnation)
        self.actors.append(actor)
        return actor

    def frames(self, seed: int, length: int = T, lanes: int = LANES) -> list[bytes]:
        """An unroll's frames; in lockstep the actor's state after the last step follows."""
        unroll = encode(trajectory(self.policy, seed, length, lanes, spec=self.spec))
        if self.config.supervisor.lockstep:
            unroll.append(np.full((lanes, self.policy.state_size), seed, dtype="<f4").tobytes())
        return unroll

    def send(
        self, actor: Actor, version: int = 0, *, frames: list[bytes] | None = None, **changed: Any
    ) -> Unroll:
        """Send the actor's next unroll and have it handled; nothing is paid."""
        actor.sequence += 1
        message = actor.message(version, **changed)
        seed = 1000 * actor.index + 100 * actor.incarnation + actor.sequence
        actor.client.send(message, self.frames(seed) if frames is None else frames)
        self.settle(actor)
        return message

    def settle(self, actor: Actor) -> None:
        """Return when all that the actor said was handled and all that it was told was heard.

        A socket keeps the order, so an answer to a question asked last proves it for all before; the answer itself,
        one without weights, is not kept.
        """
        actor.client.send(PullWeights(have_version=10**9))
        poller = Poller()
        poller.add(self.server)
        poller.add(actor.client)
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            poller.wait(WAIT_MS)
            self.loop.take_messages()
            while (received := actor.client.receive()) is not None:
                assert isinstance(received, Received), received
                if isinstance(received.message, Weights) and not received.frames:
                    return
                actor.heard.append(received.message)
                actor.weights.extend(received.frames)
        raise AssertionError("the learner did not answer")

    def make_durable(self) -> None:
        """Sync the journal, have the debts paid, and have the actors hear it."""
        self.journal.sync()
        self.pay()

    def pay(self) -> None:
        """Have the debts paid whose ground is durable already."""
        self.loop.pay()
        for actor in self.actors:
            self.settle(actor)

    def step_all(self) -> int:
        """Make every update that may be made; how many."""
        count = 0
        while self.loop.may_step:
            self.loop.step()
            count += 1
        return count

    def records(self, kind: str = "") -> list[Record]:
        """What is in the journal, durable or not."""
        self.journal.sync()
        return [record for record in read(self.journal.directory) if kind in ("", record.kind)]


@contextmanager
def bench(directory: Path, *assignments: str, commit_interval_ms: float = NEVER_MS) -> Iterator[Bench]:
    with runtime_directory() as sockets:
        endpoint = ipc_endpoint(sockets, "experience")
        made = Bench(directory, make_config(*assignments), endpoint, commit_interval_ms)
        try:
            yield made
        finally:
            made.close()
            for actor in made.actors:
                actor.client.close()


def credits_in(actor: Actor) -> int:
    """Credits heard and not yet taken."""
    return sum(credit.count for credit in actor.take(Credit))


def episode(lane: int = 0, **changed: Any) -> EpisodeFinished:
    fields: dict[str, Any] = {
        "lane": lane,
        "number": 0,
        "episode_return": 1.5,
        "length": T,
        "accuracy": 40.0,
        "parameters_added": 10,
        "fossils": 1,
        "truncated": False,
    }
    return EpisodeFinished(**fields | changed)
