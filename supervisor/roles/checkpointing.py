"""Checkpoints beside the training: staged in the loop, written by a thread, real once the journal says so.

A checkpoint takes four moves, each begun by `advance` when the one before it is done:

1. `stage`: the state is copied and `CheckpointStaged` journaled with its digest. This is all that training waits for.
2. Once the journal is durable up to there (a checkpoint must never be ahead of its journal), a thread writes, syncs,
   reads back and renames it.
3. `CheckpointSaved` is journaled. From now on it counts.
4. Once that is durable, older ones are pruned.

One checkpoint at a time; what becomes due meanwhile waits. A checkpoint that cannot be written or removed (a full disk)
is counted and tried again when the next one is due: nothing that was acknowledged depends on it.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from esper_simic.config import SupervisorConfig
from esper_simic.errors import UnavailableError
from esper_simic.events import CheckpointSaved, CheckpointStaged
from esper_simic.execution import CPU, Execution
from esper_simic.fingerprint import fingerprint
from esper_simic.learner import Learner
from esper_simic.learner_state import LearnerState
from supervisor import checkpoints, faults
from supervisor.clock import Clock
from supervisor.journal import Journal
from supervisor.protocol import Checkpoint
from supervisor.roles.fold import checkpoint_files


@dataclass(frozen=True, slots=True)
class _Staged:
    position: int
    event: CheckpointStaged
    state: LearnerState


@dataclass(slots=True)
class _Writing:
    """A checkpoint in the hands of a thread, which leaves the directory or the error here."""

    staged: _Staged
    thread: threading.Thread | None = None
    directory: Path | None = None
    error: UnavailableError | None = None


class Checkpointer:
    """Makes and prunes the checkpoints of one learner.

    Args:
        directory: The run's `checkpoints/`.
        journal: The learner's journal.
        run_id: Goes into the manifests.
        limits: How often, and how many are kept.
        clock: Time.
        execution: How the learner makes updates; for the fingerprint.
        controller: Whose policies they are; goes into the manifests.
    """

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        run_id: str,
        limits: SupervisorConfig,
        clock: Clock,
        execution: Execution = CPU,
        controller: str = "",
    ) -> None:
        self._directory, self._journal, self._run_id = directory, journal, run_id
        self._limits, self._clock, self._controller = limits, clock, controller
        self._fingerprint = fingerprint(execution)
        self._staged: _Staged | None = None
        self._writing: _Writing | None = None
        self._prune_from: int | None = None
        self._last_step = 0
        self._last_s = self._saved_s = clock.monotonic_s()
        self._saved_step = 0
        self._saved_name = ""
        self._failures = 0

    def begin(self, step: int, saved_step: int) -> None:
        """Count from here: the learner stands at `step`, its newest checkpoint at `saved_step`."""
        self._last_step, self._saved_step = step, saved_step

    def is_due(self, step: int) -> bool:
        """Whether it is time to stage the state of this step."""
        if self._staged is not None or self._writing is not None or step == self._last_step:
            return False
        every = self._limits.checkpoint_interval_steps
        if every is not None and step - self._last_step >= every:
            return True
        return self._clock.monotonic_s() - self._last_s >= self._limits.checkpoint_interval_s

    def stage(self, learner: Learner) -> None:
        """Copy the state and journal that it was."""
        self._staged = self._stage(learner)

    def _stage(self, learner: Learner) -> _Staged:
        faults.point("checkpoint.stage.before")
        state = learner.state().copy()
        event = CheckpointStaged(
            step=learner.steps_done,
            environment_steps=learner.environment_steps,
            state_digest=state.digest,
            score=learner.score,
        )
        position = self._journal.append("CheckpointStaged", event)
        self._last_step, self._last_s = learner.steps_done, self._clock.monotonic_s()
        faults.point("checkpoint.stage.after")
        return _Staged(position, event, state)

    def advance(self, durable_position: int) -> None:
        """Begin whatever can begin now that the journal is durable up to there."""
        if self._staged is not None and self._staged.position < durable_position:
            self._write(self._staged)
            self._staged = None
        writing = self._writing
        if writing is not None and writing.thread is not None and not writing.thread.is_alive():
            self._writing = None
            self._finish(writing)
        if self._prune_from is not None and self._prune_from < durable_position:
            self._prune_from = None
            self.prune()

    def save(self, learner: Learner) -> Checkpoint:
        """Make a checkpoint of the present state and wait until it counts.

        Raises:
            UnavailableError: The disk refused.
        """
        self.drain()
        staged = self._stage(learner)
        self._journal.sync()
        directory = self._store(staged)
        self._saved(staged, directory)
        self._journal.sync()
        self._prune_from = None
        self.prune()
        return Checkpoint(
            path=str(directory),
            learner_step=staged.event.step,
            environment_steps=staged.event.environment_steps,
            digest=staged.event.state_digest,
        )

    def drain(self) -> None:
        """Wait for the thread, and journal what it has written. What was only staged is dropped."""
        self._staged = None
        writing, self._writing = self._writing, None
        if writing is not None and writing.thread is not None:
            writing.thread.join()
            self._finish(writing)

    def prune(self) -> None:
        """Remove the checkpoints that need not be kept; what cannot be removed is counted and tried again next time."""
        try:
            checkpoints.prune(
                self._directory,
                keep_last=self._limits.keep_last,
                keep_best=self._limits.keep_best,
                # Not the newest on the disk, of which the journal may not know yet.
                protected={self._saved_name},
            )
        except UnavailableError as error:
            self._failed("old checkpoints", error)

    def metrics(self) -> dict[str, float]:
        """Step and age of the newest checkpoint of this life, and how many could not be written or removed."""
        return {
            "checkpoint.step": float(self._saved_step),
            "checkpoint.age_s": self._clock.monotonic_s() - self._saved_s,
            "checkpoint.failures": float(self._failures),
        }

    def _write(self, staged: _Staged) -> None:
        writing = _Writing(staged)

        def write() -> None:
            try:
                writing.directory = self._store(staged)
            except UnavailableError as error:
                writing.error = error

        writing.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._writing = writing
        writing.thread.start()

    def _store(self, staged: _Staged) -> Path:
        manifest = {
            "run_id": self._run_id,
            "step": staged.event.step,
            "environment_steps": staged.event.environment_steps,
            "journal_position": staged.position,
            "state_digest": staged.event.state_digest,
            "fingerprint": self._fingerprint,
            "score": staged.event.score,
            "controller": self._controller,
        }
        return checkpoints.save(self._directory, checkpoint_files(staged.state), manifest)

    def _finish(self, writing: _Writing) -> None:
        if writing.directory is not None:
            self._prune_from = self._saved(writing.staged, writing.directory)
            return
        self._failed(f"checkpoint of step {writing.staged.event.step}", writing.error or "the thread died")

    def _failed(self, what: str, why: UnavailableError | str) -> None:
        self._failures += 1
        sys.stderr.write(f"{what}: {why}\n")

    def _saved(self, staged: _Staged, directory: Path) -> int:
        files = checkpoints.read_manifest(directory).files
        faults.point("checkpoint.saved.before")
        position = self._journal.append(
            "CheckpointSaved",
            CheckpointSaved(
                step=staged.event.step,
                environment_steps=staged.event.environment_steps,
                directory=directory.name,
                state_digest=staged.event.state_digest,
                files={name: file.sha256 for name, file in files.items()},
                staged_at=staged.position,
            ),
        )
        faults.point("checkpoint.saved.after")
        self._saved_step, self._saved_s = staged.event.step, self._clock.monotonic_s()
        self._saved_name = directory.name
        return position
