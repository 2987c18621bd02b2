"""How a learner comes back: the newest good checkpoint, then the journal's tail, record by record.

It runs inside the learner's own memory budget: the journal is streamed, and the buffer is the only thing that grows.
Before it serves anybody it journals what it reached (`LearnerRecovered`).

A checkpoint that is not good is passed over for the one before, down to the start of the journal. What kills the
learner again and again is not tried for ever (see `attempts`): after `recovery_attempts_max` failures at one record it
is quarantined, at one checkpoint it is passed over, at one update it is skipped; each an event. The recovery is then
*inexact*, and so it is when an update that was made again came out with another digest, as it may where the way of
computing is not exact (`execution`). A checkpoint must follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from esper_simic.config import Config
from esper_simic.errors import ConfigError, ContractError, UnavailableError
from esper_simic.events import (
    LEARNER_EVENTS,
    CheckpointSaved,
    CheckpointStaged,
    FingerprintChanged,
    LearnerRecovered,
    LearnerStepped,
    PolicyImported,
    RecordQuarantined,
    RunStarted,
    StepFailed,
    StepSkipped,
)
from esper_simic.execution import CPU, Execution, unheard
from esper_simic.fingerprint import fingerprint
from esper_simic.updates.engine import check_heads
from supervisor import checkpoints, faults
from supervisor.clock import Clock
from supervisor.journal import Journal, JournalDamage, read
from supervisor.roles.attempts import Attempts, Work
from supervisor.roles.fold import Folded, LearnerFold
from supervisor.roles.initial_policy import InitialPolicy, read_initial_policy

REPORT_INTERVAL_S: Final = 0.5


class Progress(NamedTuple):
    """How far a recovery has come: records folded of all to fold, updates made again, seconds since it began."""

    done: int
    total: int
    steps_redone: int
    seconds: float


@dataclass(slots=True)
class _Tail:
    """What the records from a position on say before they are folded."""

    checkpoint: str
    records: int = 0
    quarantined: set[int] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)


def mend(damage: JournalDamage) -> ConfigError:
    """Damage to a journal as what it is to a run: it stops until a person has decided which copy to trust."""
    return ConfigError(
        f"{damage}. The run cannot go on exactly: restore {damage.segment.parent} from a copy, or begin a new run from "
        f"a checkpoint (`simic-supervisor checkpoint ls`, `simic-supervisor log verify`)"
    )


class Recovery:
    """One learner's way back, or its first steps.

    Args:
        run_dir: The run's directory.
        run_id: The run.
        incarnation: Which life of the learner this is.
        config: The run's configuration.
        journal: The learner's journal, opened for writing.
        attempts: What earlier lives died of.
        clock: Time.
        report: Told how far it has come, about twice a second.
        rank: Which learner of the run.
        execution: How it makes updates.
        compiling: Told, now and later, before an update may have to be compiled.
        consolidating: Told, now and later, while it is estimated what an old task needs; see `Engine`.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        incarnation: int,
        config: Config,
        journal: Journal,
        attempts: Attempts,
        clock: Clock,
        report: Callable[[Progress], None],
        *,
        rank: int = 0,
        execution: Execution = CPU,
        compiling: Callable[[], None] = unheard,
        consolidating: Callable[[], None] = unheard,
    ) -> None:
        self._execution, self._compiling, self._consolidating = execution, compiling, consolidating
        self._checkpoints = run_dir / "checkpoints"
        self._run_id, self._incarnation, self._config = run_id, incarnation, config
        self._journal, self._attempts = journal, attempts
        self._clock, self._report, self._rank = clock, report, rank
        self._began_s = clock.monotonic_s()
        self._next_report_s = 0.0
        self._passed_over: dict[str, str] = {}
        self._steps_redone = 0
        self.is_exact = True
        """Whether the state is the fold of all that stands in the journal."""
        self.checkpoint_step = 0
        """Step of the checkpoint from which it began; 0 for the start of the journal."""
        self.quarantined = 0
        """Records that it passed over for good."""
        self.divergent_step: int | None = None
        """First update after which a digest came out otherwise than it stands in the journal."""

    def metrics(self) -> dict[str, float]:
        """What an operator should know of it for as long as this life lasts."""
        return {"quarantined": float(self.quarantined), "inexact": float(not self.is_exact)}

    def run(self) -> LearnerFold:
        """Begin a journal, or fold what stands in it; in both cases journal that.

        Raises:
            ConfigError: The journal is damaged, or what is needed is gone: only a person can decide what to do.
            UnavailableError: The disk refused.
        """
        if self._journal.next_position == 0:
            return self._begin()
        faults.point("recovery.begin")
        try:
            if self._journal.next_position == 1:  # it died between the two first records
                self._begin_with(self._new_fold(_Tail("")), self._initial_policy())
            self._quarantine()
            fold, tail = self._start()
            faults.point("recovery.buffer.after")
            self._fold(fold, tail)
        except JournalDamage as error:
            raise mend(error) from error
        self._close(fold, tail)
        return fold

    def _begin(self) -> LearnerFold:
        fold = self._new_fold(_Tail(""))
        check_heads(self._config.simic_trainer, fold.learner.policy.spec)
        initial = self._initial_policy()  # what cannot be had leaves no journal behind
        fold.fingerprint = fingerprint(self._execution)
        started = RunStarted(
            run_id=self._run_id,
            config=self._config.model_dump(mode="json"),
            fingerprint=fold.fingerprint,
        )
        fold.position = self._journal.append("RunStarted", started) + 1
        self._begin_with(fold, initial)
        return fold

    def _initial_policy(self) -> InitialPolicy | None:
        """The weights from elsewhere to begin with, where the configuration names some."""
        trainer = self._config.simic_trainer
        if trainer.initial_policy is None:
            return None
        return read_initial_policy(trainer, self._new_fold(_Tail("")).learner.engine)

    def _begin_with(self, fold: LearnerFold, initial: InitialPolicy | None) -> None:
        """Journal the weights to begin with, if there are any, and take them over; all of it is durable then."""
        if initial is not None:
            digest = fold.learner.begin_with(*initial.frames)
            event = PolicyImported(
                source=initial.source, digest=digest, adapters_source=initial.adapters_source
            )
            fold.position = self._journal.append("PolicyImported", event, initial.frames) + 1
        self._journal.sync()

    def _quarantine(self) -> None:
        failed = self._attempts.failed
        # What never got to the disk is not there to be quarantined: its position will be another record's.
        is_there = failed.work is Work.RECORD and failed.number < self._journal.next_position
        if is_there and failed.failures >= self._config.supervisor.recovery_attempts_max:
            reason = "the learner died each time it folded this record"
            self._append(RecordQuarantined(position=failed.number, failures=failed.failures, reason=reason))
            self._journal.sync()

    # -- where to begin ------------------------------------------------------------------------------------------

    def _start(self) -> tuple[LearnerFold, _Tail]:
        """The fold at the newest checkpoint that is good and counts, and what follows it in the journal."""
        for directory, position in self._candidates():
            tail = self._look_ahead(directory.name, position)
            if directory.name not in tail.saved:
                self._drop(directory)
                continue
            fold = self._restored(directory, position, tail)
            if fold is not None:
                faults.point("recovery.checkpoint.after")
                self.checkpoint_step = fold.learner.steps_done
                return fold, tail
        tail = self._look_ahead("", 0)
        return self._new_fold(tail), tail

    def _drop(self, directory: Path) -> None:
        """Remove a checkpoint that does not count."""
        reason = "no CheckpointSaved in the journal names it"
        try:
            checkpoints.remove(directory)
        except UnavailableError as error:
            reason += f"; {error}"
        self._passed_over[directory.name] = reason

    def _restored(self, directory: Path, position: int, tail: _Tail) -> LearnerFold | None:
        """The fold in a checkpoint; None, with the reason noted, where it is not good."""
        failed = self._attempts.failed
        limit = self._config.supervisor.recovery_attempts_max
        if (failed.work, failed.number) == (Work.CHECKPOINT, position) and failed.failures >= limit:
            self._pass_over(directory, f"the learner died {failed.failures} times while it loaded it")
            return None
        fold = self._new_fold(tail)
        self._attempts.begin(Work.CHECKPOINT, position)
        restored: LearnerFold | None = fold
        try:
            fold.restore(directory)
        except JournalDamage:
            self._attempts.end()  # not the checkpoint's fault, however often it is met
            raise
        except ContractError as error:
            restored = None
            self._pass_over(directory, str(error))
        except UnavailableError as error:
            restored = None
            self._passed_over[directory.name] = str(error)
        self._attempts.end()
        return restored

    def _pass_over(self, directory: Path, reason: str) -> None:
        """Set a bad checkpoint aside under another name: what is kept and pruned is counted among good ones."""
        self._passed_over[directory.name] = reason
        checkpoints.set_aside(directory)

    def _new_fold(self, tail: _Tail) -> LearnerFold:
        return LearnerFold(
            self._config,
            self._journal.directory,
            self._checkpoints,
            rank=self._rank,
            quarantined=tail.quarantined,
            execution=self._execution,
            compiling=self._compiling,
            consolidating=self._consolidating,
        )

    def _candidates(self) -> list[tuple[Path, int]]:
        """Checkpoints of this run with a readable manifest, the newest in the journal first."""
        found = []
        for listed in checkpoints.list_checkpoints(self._checkpoints):
            if isinstance(listed, checkpoints.BadCheckpoint):
                self._pass_over(listed.path, listed.reason)
            elif listed.manifest.run_id != self._run_id:
                self._passed_over[listed.path.name] = f"it belongs to run {listed.manifest.run_id}"
            else:
                found.append((listed.manifest.journal_position, listed.path))
        return [(path, position) for position, path in sorted(found, reverse=True)]

    def _look_ahead(self, checkpoint: str, position: int) -> _Tail:
        tail = _Tail(checkpoint)
        for record in read(self._journal.directory, position):
            tail.records += 1
            if record.kind not in LEARNER_EVENTS:
                raise ConfigError(
                    f"record {record.position} of {self._journal.directory} is of unknown kind {record.kind!r}: it was "
                    f"written by a newer version; go on with that one"
                )
            if record.kind == RecordQuarantined.__name__:
                tail.quarantined.add(record.header_as(RecordQuarantined).position)
            elif record.kind == CheckpointSaved.__name__:
                tail.saved.add(record.header_as(CheckpointSaved).directory)
        return tail

    # -- the tail ------------------------------------------------------------------------------------------------

    def _fold(self, fold: LearnerFold, tail: _Tail) -> None:
        first = fold.position
        self.quarantined = len(tail.quarantined)
        self.is_exact = not any(position >= first for position in tail.quarantined)
        for record in read(self._journal.directory, first):
            self._attempts.begin(Work.RECORD, record.position)
            self._compare(fold.take(record))
            self._attempts.end()
            self._tell(fold.position - first, tail.records)
            faults.point("recovery.fold.after")
        self.is_exact = self.is_exact and self.divergent_step is None and not fold.is_waiting_for_checkpoint

    def _compare(self, folded: Folded) -> None:
        event, report = folded.event, folded.report
        if not isinstance(event, LearnerStepped | StepFailed | CheckpointStaged):
            return
        is_equal = folded.state_digest is None or folded.state_digest == event.state_digest
        if isinstance(event, LearnerStepped | StepFailed):
            self._steps_redone += 1
            is_equal = is_equal and (report is None or report.digest == event.digest)
        if not is_equal and self.divergent_step is None:
            self.divergent_step = event.step

    def _tell(self, done: int, total: int) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + REPORT_INTERVAL_S
            self._report(Progress(done, total, self._steps_redone, now_s - self._began_s))

    # -- the end -------------------------------------------------------------------------------------------------

    def _close(self, fold: LearnerFold, tail: _Tail) -> None:
        learner, now = fold.learner, fingerprint(self._execution)
        if fold.fingerprint != now:
            self._append(FingerprintChanged(before=fold.fingerprint, after=now))
            fold.fingerprint = now
        failed = self._attempts.failed
        if (failed.work, failed.number) == (Work.STEP, learner.steps_done + 1) and (
            failed.failures >= self._config.supervisor.recovery_attempts_max
        ):
            reason = f"the learner died {failed.failures} times while it made this update"
            self._append(StepSkipped(step=failed.number, reason=reason))
            learner.skip()
        faults.point("recovery.recovered.before")
        self._append(
            LearnerRecovered(
                incarnation=self._incarnation,
                checkpoint=tail.checkpoint,
                passed_over=self._passed_over,
                records_folded=tail.records,
                steps_redone=self._steps_redone,
                step=learner.steps_done,
                environment_steps=learner.environment_steps,
                state_digest=learner.state().digest,
                is_exact=self.is_exact,
                seconds=self._clock.monotonic_s() - self._began_s,
            )
        )
        fold.position = self._journal.sync()
        faults.point("recovery.recovered.after")

    def _append(self, event: msgspec.Struct) -> None:
        self._journal.append(type(event).__name__, event)
