"""A learner's journal, written as the living learner writes it but without sockets, and the state at every record."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np

from esper_simic.config import Config
from esper_simic.events import (
    CheckpointSaved,
    CheckpointStaged,
    EpisodeFinished,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerStepped,
    RunStarted,
    StepSkipped,
)
from esper_simic.fingerprint import fingerprint
from esper_simic.growing_host.spaces import observation_spec_of
from esper_simic.learner import Learner
from esper_simic.learner_state import LearnerState
from esper_simic.policies.graph_policy import GraphPolicy
from esper_simic.step_report import StepReport
from esper_simic.trajectory import decode, encode
from supervisor import checkpoints
from supervisor.journal import Journal
from supervisor.roles.fold import checkpoint_files
from tests.policies.synthetic import trajectory
from tests.roles.bench import LANES, NEVER_MS, RUN_ID, T, episode, make_config

UNROLLS = 7
"""Different unrolls that are admitted in turn."""


@lru_cache
def unroll_frames(seed: int) -> tuple[bytes, ...]:
    config = make_config()
    spec = observation_spec_of(config.environment)
    policy = GraphPolicy(spec, config.simic_trainer, np.random.default_rng(0))
    return tuple(encode(trajectory(policy, seed, T, LANES, spec=spec)))


class Held(NamedTuple):
    """All that can be read from a buffer, bit for bit."""

    tensors: dict[str, bytes]
    versions: list[int]
    counts: tuple[int, int, int]
    addresses: dict[str, Any]


def contents(learner: Learner) -> Held:
    """What a learner's buffer holds, oldest first."""
    buffer = learner.buffer
    serials = np.arange(buffer.inserted - len(buffer), buffer.inserted, dtype=np.int64)
    sample = buffer.read(serials, 0)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in sample.trajectory.tensors().items()}
    counts = (len(buffer), buffer.inserted, buffer.consumed)
    return Held(tensors, sample.versions.tolist(), counts, buffer.addresses())


def is_same_state(one: LearnerState, two: LearnerState) -> bool:
    """Whether digest and addresses agree."""
    return (one.digest, one.addresses) == (two.digest, two.addresses)


class Scribe:
    """The truth that folds are compared with: a learner and its journal, moved together.

    Args:
        directory: The run's directory.
        config: Of the run.
        begin: Whether to write `RunStarted`.
    """

    def __init__(self, directory: Path, config: Config, *, interval_ms: float = NEVER_MS) -> None:
        self.directory, self.config = directory, config
        self.checkpoints = directory / "checkpoints"
        self.journal = Journal(
            directory / "journal" / "learner-0",
            owner="learner-0",
            run_id=RUN_ID,
            commit_interval_ms=interval_ms,
            segment_bytes_max=2**17,
        )
        self.learner = Learner(config, observation_spec_of(config.environment))
        self.digests: list[str] = []
        """Of the whole state after each record."""
        self.reports: dict[int, StepReport] = {}
        """Of each update, by the position of its record."""
        self.consumed: dict[int, tuple[int, ...]] = {}
        self._sequences: dict[int, int] = {}
        started = RunStarted(run_id=RUN_ID, config=config.model_dump(mode="json"), fingerprint=fingerprint())
        self.note(started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()

    def note(self, event: msgspec.Struct, frames: tuple[bytes, ...] = ()) -> int:
        """Append an event that moves nothing."""
        position = self.journal.append(type(event).__name__, event, frames)
        while len(self.digests) <= position:
            self.digests.append(self.learner.state().digest)
        return position

    def _moved(self, position: int, consumed: tuple[int, ...] = ()) -> None:
        self.digests[position] = self.learner.state().digest
        self.consumed[position] = consumed

    def admit(
        self,
        actor: int = 0,
        *,
        incarnation: int = 1,
        seed: int | None = None,
        frames: tuple[bytes, ...] | None = None,
        episodes: tuple[EpisodeFinished, ...] = (),
        numbers: tuple[int, ...] = (0,) * LANES,
    ) -> int:
        """Admit an actor's next unroll."""
        event = ExperienceAdmitted(
            actor=actor,
            incarnation=incarnation,
            sequence=self._next_sequence(actor),
            policy_version=self.learner.steps_done,
            length=T,
            lanes=LANES,
            episode_numbers=list(numbers),
            episodes=list(episodes),
        )
        if frames is None:
            frames = unroll_frames(len(self.digests) % UNROLLS if seed is None else seed)
        position = self.note(event, frames)
        learner = self.learner
        unroll = decode(frames[:15], learner.policy.spec, T, LANES, learner.policy.state_size)
        self._moved(position, learner.admit(position, event, unroll))
        return position

    def _next_sequence(self, actor: int) -> int:
        self._sequences[actor] = self._sequences.get(actor, 0) + 1
        return self._sequences[actor]

    def refuse(self, actor: int = 0, *, steps: int = T * LANES, reason: str = "too_old") -> int:
        """Refuse an actor's next unroll."""
        event = ExperienceRefused(
            actor=actor,
            incarnation=1,
            sequence=self._next_sequence(actor),
            policy_version=0,
            steps=steps,
            reason=reason,
        )
        position = self.note(event)
        self.learner.refuse(event)
        self._moved(position)
        return position

    def step(self) -> int:
        """Make an update."""
        report = self.learner.step()
        event = LearnerStepped(
            step=report.step,
            environment_steps=report.environment_steps,
            digest=report.digest,
            state_digest=report.state_digest,
            metrics=report.metrics,
        )
        position = self.note(event)
        self.reports[position] = report
        self._moved(position, report.unrolls_consumed)
        return position

    def skip(self) -> int:
        """Give an update up."""
        position = self.note(StepSkipped(step=self.learner.steps_done + 1, reason="it was in the script"))
        self._moved(position, self.learner.skip())
        return position

    def stage(self) -> tuple[int, CheckpointStaged, LearnerState]:
        """Journal that the state was copied, and copy it."""
        learner = self.learner
        state = learner.state().copy()
        event = CheckpointStaged(
            step=learner.steps_done,
            environment_steps=learner.environment_steps,
            state_digest=state.digest,
            score=learner.score,
        )
        return self.note(event), event, state

    def checkpoint(self, *, is_noted: bool = True) -> Path:
        """Stage, write, and journal that it counts."""
        position, staged, state = self.stage()
        manifest = {
            "run_id": RUN_ID,
            "step": staged.step,
            "environment_steps": staged.environment_steps,
            "journal_position": position,
            "state_digest": staged.state_digest,
            "fingerprint": fingerprint(),
            "score": staged.score,
        }
        directory = checkpoints.save(self.checkpoints, checkpoint_files(state), manifest)
        if is_noted:
            files = checkpoints.read_manifest(directory).files
            self.note(
                CheckpointSaved(
                    step=staged.step,
                    environment_steps=staged.environment_steps,
                    directory=directory.name,
                    state_digest=staged.state_digest,
                    files={name: file.sha256 for name, file in files.items()},
                    staged_at=position,
                )
            )
        return directory

    def move(self, name: str, actor: int = 0) -> None:
        """One move of a script, or the nearest one that is possible."""
        buffer = self.learner.buffer
        match name:
            case "admit" if buffer.fresh + LANES <= buffer.capacity:
                ended = (episode(lane=actor, number=len(self.digests), episode_return=actor - 0.5),)
                self.admit(actor, episodes=ended if len(self.digests) % 3 else ())
            case "refuse":
                self.refuse(actor)
            case "skip":
                self.skip()
            case "stage":
                self.stage()
            case _:
                if self.learner.can_step():
                    self.step()

    def teach(self, unrolls: int) -> None:
        """Admit unrolls of both actors in turn, and make every update that can be made."""
        for number in range(unrolls):
            self.admit(number % 2)
            while self.learner.can_step():
                self.step()
