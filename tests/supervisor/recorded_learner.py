"""Learners' journals as a living learner leaves them, made in this process: real folds, records and checkpoints, and no
actors, sockets or waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from esper_simic.config import Config, parse
from esper_simic.events import (
    EpisodeFinished,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerStepped,
    StepFailed,
)
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.learner import Learner
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.safety import StepInputs
from esper_simic.seeding import generator
from esper_simic.step_report import StepReport
from esper_simic.trajectory import decode, encode
from supervisor.clock import ManualClock
from supervisor.journal import Journal, Record, read
from supervisor.playback import ReplayReport, Request, replay
from supervisor.roles.attempts import Attempts
from supervisor.roles.checkpointing import Checkpointer
from supervisor.roles.recovery import Recovery
from tests.policies.synthetic import trajectory

RUN_ID = "run-1"
OWNER = "learner-0"
T, LANES = 3, 4

Rewriting = tuple[object, Sequence[bytes | memoryview]]
"""Another header and other frames of a record."""

SETTINGS = f"""
simic_trainer:
  {{batch_size: 8, unroll_length: {T}, hidden_size: 16, graph_layers: 1, warmup_epochs: 2, digest_every_steps: 4}}
experience_buffer: {{capacity: 40, min_experiences: 8, replay_ratio: 0.25}}
supervisor: {{num_actors: 2, unrolls_in_flight: 2, keep_last: 100}}
environment: {{environments_per_actor: {LANES}}}
"""


def make_config(*assignments: str) -> Config:
    return parse(SETTINGS, assignments=assignments)


class Life:
    """One life of a learner, moved by hand; a second passes with every move.

    `is_old`: it records nothing that comes from outside with an update, as journals once did.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        journal: Journal,
        learner: Learner,
        clock: ManualClock,
        is_old: bool = False,
    ) -> None:
        self.run_dir, self.config, self.is_old = run_dir, config, is_old
        self.journal, self.learner, self.clock = journal, learner, clock
        self.checkpointer = Checkpointer(run_dir / "checkpoints", journal, RUN_ID, config.supervisor, clock)
        self._spec = observation_spec_of(config.environment)
        self._acting = GraphPolicy(self._spec, config.simic_trainer, generator(1, "acting"))
        self._sequences = {0: 0, 1: 0}

    def admit(self, seed: int, actor: int = 0, frames: list[bytes] | None = None) -> int:
        """An unroll arrives; its position."""
        self.clock.advance(1.0)
        event = self._event(actor, seed)
        policy = self.learner.policy
        if frames is None:
            frames = self.frames(seed)
        decoded = decode(frames, policy.spec, T, LANES, policy.state_size)
        position = self._append(event, frames)
        self.learner.admit(position, event, decoded)
        return position

    def frames(self, seed: int) -> list[bytes]:
        """The frames of an unroll."""
        return encode(trajectory(self._acting, seed, T, LANES, spec=self._spec))

    def _event(self, actor: int, seed: int) -> ExperienceAdmitted:
        self._sequences[actor] += 1
        ended = EpisodeFinished(
            lane=seed % LANES,
            number=seed,
            episode_return=0.1 * seed,
            length=10 + seed,
            accuracy=40.0 + seed,
            parameters_added=seed,
            fossils=0,
            truncated=False,
        )
        return ExperienceAdmitted(
            actor=actor,
            incarnation=1,
            sequence=self._sequences[actor],
            policy_version=self.learner.steps_done,
            length=T,
            lanes=LANES,
            episode_numbers=[seed] * LANES,
            episodes=[ended],
        )

    def refuse(self, actor: int = 0) -> int:
        """One is not taken."""
        self.clock.advance(1.0)
        self._sequences[actor] += 1
        event = ExperienceRefused(
            actor=actor,
            incarnation=1,
            sequence=self._sequences[actor],
            policy_version=0,
            steps=T * LANES,
            reason="too_old",
        )
        self.learner.refuse(event)
        return self._append(event)

    def step_all(self) -> int:
        """Make every update that can be made; how many."""
        count = 0
        while self._may_step():
            self.clock.advance(1.0)
            inputs = None if self.is_old else StepInputs(at_s=self.clock.now_s())
            report = self.learner.step(inputs)
            self._append(_failed(report, inputs) if inputs and report.failure else _stepped(report, inputs))
            count += 1
        return count

    def _may_step(self) -> bool:
        if self.is_old:
            return self.learner.can_step()
        mode = self.learner.mode(self.clock.now_s() + 1.0)
        return mode.may_step and self.learner.can_step(mode.batch_size(self.config.simic_trainer.batch_size))

    def learn(self, seeds: Sequence[int]) -> None:
        """Unrolls of both actors in turn, and the updates they make possible."""
        for seed in seeds:
            self.admit(seed, seed % 2)
            self.step_all()

    def checkpoint(self) -> Path:
        """A checkpoint that counts."""
        self.clock.advance(1.0)
        return Path(self.checkpointer.save(self.learner).path)

    def _append(self, event: msgspec.Struct, frames: Sequence[bytes] = ()) -> int:
        return self.journal.append(type(event).__name__, event, frames)


def _stepped(report: StepReport, inputs: StepInputs | None) -> LearnerStepped:
    return LearnerStepped(
        step=report.step,
        environment_steps=report.environment_steps,
        digest=report.digest,
        state_digest=report.state_digest,
        metrics=report.metrics,
        inputs=inputs,
        facts=list(report.facts),
    )


def _failed(report: StepReport, inputs: StepInputs) -> StepFailed:
    return StepFailed(
        step=report.step,
        environment_steps=report.environment_steps,
        digest=report.digest,
        state_digest=report.state_digest,
        reason=report.failure,
        out_of_memory=report.out_of_memory,
        moved=report.moved,
        inputs=inputs,
        facts=list(report.facts),
    )


@contextmanager
def life(
    run_dir: Path, config: Config | None = None, incarnation: int = 1, *, is_old: bool = False
) -> Iterator[Life]:
    """A learner's life, from its recovery on; an inexact one is followed by a checkpoint."""
    config = config or make_config()
    clock = ManualClock(now_s=1_700_000_000.0 + 10_000 * incarnation)
    run_dir.mkdir(exist_ok=True)
    with (
        Journal(run_dir / "journal" / OWNER, owner=OWNER, run_id=RUN_ID, clock=clock) as journal,
        Attempts(run_dir / f"{OWNER}.attempts") as attempts,
    ):
        recovery = Recovery(run_dir, RUN_ID, incarnation, config, journal, attempts, clock, lambda _: None)
        living = Life(run_dir, config, journal, recovery.run().learner, clock, is_old)
        if not recovery.is_exact:
            living.checkpoint()
        yield living
        journal.sync()


def records(run_dir: Path, kind: str = "") -> list[Record]:
    return [record for record in read(run_dir / "journal" / OWNER) if kind in ("", record.kind)]


def rewritten(source: Path, target: Path, change: Callable[[Record], Rewriting | None]) -> Path:
    """The same run with its learner's journal written anew: `change` gives another header and frames of a record, or
    None to leave it as it is."""
    target.mkdir()
    clock = ManualClock()
    with Journal(target / "journal" / OWNER, owner=OWNER, run_id=RUN_ID, clock=clock) as journal:
        for record in records(source):
            clock.set_now(record.time_ns / 1e9)
            changed = change(record)
            header, frames = changed if changed is not None else (record.header, record.frames)
            journal.append(record.kind, header, [bytes(frame) for frame in frames])
        journal.sync()
    (target / "checkpoints").symlink_to(source / "checkpoints")
    return target


def changed_header(position: int, **changes: Any) -> Callable[[Record], Rewriting | None]:
    def change(record: Record) -> Rewriting | None:
        return (record.header | changes, record.frames) if record.position == position else None

    return change


def look(run_dir: Path, **asked: Any) -> ReplayReport:
    interact = asked.pop("interact", None)
    return replay(Request(run_dir, **asked), ManualClock(), interact=interact)


def last_step(run_dir: Path) -> int:
    return int(records(run_dir, "LearnerStepped")[-1].header["step"])
