"""Doing a learner's run again from its journal alone: no environments, no sockets, one process.

The journal is streamed twice, first to see how much there is (`survey`), then to fold it; the buffer is the only thing
that grows. Where the learner recovered inexactly the records up to the next checkpoint cannot be folded as the learner
folded them: the replay crosses them through that checkpoint and says so.

At the first divergence the folding goes on to the next checkpoint on disk, to tell which tensors differ there, and
ends.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import torch

from esper_simic.errors import BudgetExceeded, ContractError, InvariantViolation, UnavailableError
from esper_simic.events import LearnerRecovered, LearnerStepped, RunStarted, StepFailed, StepSkipped
from esper_simic.execution import Execution, in_words
from esper_simic.fingerprint import fingerprint, promises_bits
from esper_simic.safety import StepInputs
from supervisor.clock import Clock
from supervisor.journal import JournalDamage, Record, read
from supervisor.playback.breaks import AtStep, NotFinite, RequestError, check_metric
from supervisor.playback.compare import fingerprint_differences
from supervisor.playback.judge import Judge, compare_checkpoint
from supervisor.playback.pause import Pause
from supervisor.playback.report import Crossing, Damage, Divergence, ReplayReport, Stopped
from supervisor.playback.request import START, Request
from supervisor.playback.survey import Gap, OnDisk, list_on_disk, survey
from supervisor.roles.fold import Folded, LearnerFold, config_of_journal, event_of

PROGRESS_INTERVAL_S: Final = 0.2
FOLD_ERRORS: Final = (ContractError, InvariantViolation, BudgetExceeded)

NEW_LIFE: Final = frozenset("LearnerRecovered RecordQuarantined FingerprintChanged StepSkipped".split())
"""Kinds of the first record of a later life; the time before it is not the run's."""


class Progress(NamedTuple):
    """How far a replay has come."""

    steps: int
    steps_total: int
    seconds: float

    @property
    def steps_per_second(self) -> float:
        """Since it began."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At that speed; None before the first step."""
        rate = self.steps_per_second
        return (self.steps_total - self.steps) / rate if rate > 0 else None


class _End(Exception):
    """Nothing more is to be folded."""


def replay(
    request: Request,
    clock: Clock,
    *,
    interact: Callable[[Pause], None] | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ReplayReport:
    """Replay a learner's journal. Sets torch's thread count to the run's.

    Args:
        request: What, and where to stop.
        clock: For speed and time left.
        interact: Called where the condition says to stop; without it the replay ends there.
        progress: Told how far it has come, a few times a second.

    Returns:
        What was found. Damage of the journal is in it, not raised.

    Raises:
        RequestError: What was asked for is not there: the checkpoint, the step, the metric.
        ContractError: The journal is none of a learner.
        UnavailableError: The journal or the checkpoint cannot be read.
    """
    return _Replay(request, clock, interact, progress).run()


class _Replay:
    def __init__(
        self,
        request: Request,
        clock: Clock,
        interact: Callable[[Pause], None] | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self._request, self._clock = request, clock
        self._interact, self._progress = interact, progress
        self._journal = request.run_dir / "journal" / request.owner
        self._checkpoints = request.run_dir / "checkpoints"
        self._report = ReplayReport(run_id="", journal=str(self._journal), origin=request.origin)
        self._next_progress_s = 0.0
        self._paused_s = 0.0
        self._pauses = 0
        self._judge = Judge({})
        self._began_s = clock.monotonic_s()
        self._ended_s: float | None = None
        self._is_stopped = False
        self._before: tuple[str, int] | None = None
        """Kind and time of the record before, where the one to come follows it in the run's own time."""
        self._run_ns = 0

    def run(self) -> ReplayReport:
        report = self._report
        try:
            self._prepare()
            self._fold_all()
        except _End:
            pass
        except JournalDamage as damage:
            report.damage = [Damage(damage.segment.name, damage.offset, damage.reason)]
            report.outcome = "damaged"
        return self._finish()

    # -- before ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        request, report = self._request, self._report
        if not re.fullmatch(r"learner-\d+", request.owner):
            raise RequestError(f"{request.owner} is no learner: only a learner's journal can be replayed")
        config = config_of_journal(self._journal)
        report.run_id = _started(self._journal).run_id
        torch.set_num_threads(config.supervisor.learner_threads)
        execution = Execution.recorded(_started(self._journal).fingerprint)
        execution.apply()
        self._judge = Judge(fingerprint(execution))
        rank = int(request.owner.rpartition("-")[2])
        self._batch_size = config.simic_trainer.batch_size
        self._fold = LearnerFold(config, self._journal, self._checkpoints, rank=rank, execution=execution)
        self._began_s = self._clock.monotonic_s()  # what was before are imports, not replaying
        if request.origin != START:
            self._fold.restore(self._named(request.origin).directory)
        report.first_position = report.next_position = self._fold.position
        report.first_step = report.last_step = self._fold.learner.steps_done
        self._survey = survey(self._journal, self._checkpoints, report.run_id, self._fold.position)
        self._check()

    def _named(self, name: str) -> OnDisk:
        present = list_on_disk(self._checkpoints, self._report.run_id)
        for found in present:
            if found.directory.name == name:
                return found
        names = ", ".join(found.directory.name for found in present) or "none"
        raise RequestError(
            f"there is no checkpoint {name!r} of this run in {self._checkpoints}; there: {names}"
        )

    def _check(self) -> None:
        """Refuse what cannot be reached."""
        until, first, last = self._request.until, self._report.first_step, self._survey.last_step
        if self._survey.is_damaged:
            return  # how far it goes is told by the damage
        if until is not None and not first < until <= last:
            raise RequestError(
                f"step {until} is not among those to replay: from {self._request.origin} the journal holds "
                f"{f'steps {first + 1} to {last}' if last > first else 'none'}"
            )
        condition = self._request.condition
        if condition is None:
            return
        check_metric(condition, self._survey.metrics)
        if isinstance(condition, AtStep) and not first < condition.step <= last + 1:
            raise RequestError(
                f"step {condition.step} is not among those to stop at: {first + 1} to {last + 1}"
            )

    # -- the fold --------------------------------------------------------------------------------------------------

    def _fold_all(self) -> None:
        if self._request.verify:
            self._note_absent()
        for gap in self._survey.gaps:
            self._fold_until(gap.first_position)
            self._cross(gap)
        self._fold_until(None)
        self._pause_at_the_end()

    def _fold_until(self, position: int | None) -> None:
        for record in self._records():
            if position is not None and record.position >= position:
                return
            self._take(record)

    def _records(self) -> Iterator[Record]:
        return read(self._journal, self._fold.position)

    def _cross(self, gap: Gap) -> None:
        """Go on behind a gap, from the first good checkpoint after it."""
        if self._fold.position > gap.first_position:
            return  # the checkpoint after the gap before was bad, and the one that served stands behind this one too
        report, step = self._report, self._fold.learner.steps_done
        resume = self._resumed(gap)
        report.crossings.append(
            Crossing(
                position=gap.first_position,
                step=step,
                reason=f"{gap.reason}: the recovery at record {gap.recovered_at} was not exact",
                checkpoint=resume.directory.name if resume else "",
                resumed_at=resume.position if resume else None,
                resumed_step=resume.step if resume else None,
            )
        )
        until = self._request.until
        is_between = resume is not None and until is not None and resume.step >= until
        if is_between:
            report.notes.append(f"step {until} is among those that were not replayed")
        if resume is None or is_between:
            report.outcome = "incomplete"
            raise _End

    def _resumed(self, gap: Gap) -> OnDisk | None:
        for found in gap.resumes:
            try:
                self._restore(found)
            except (ContractError, UnavailableError) as error:
                self._report.notes.append(f"checkpoint {found.directory.name} cannot be restored: {error}")
                continue
            return found
        return None

    def _restore(self, found: OnDisk) -> None:
        self._fold.restore(found.directory)
        self._judge.begin()
        self._before = None

    def _take(self, record: Record) -> None:
        self._pass_checkpoints(record)
        event = event_of(record)
        folded = (
            self._pause_before(record, event)
            if isinstance(event, LearnerStepped | StepFailed | StepSkipped)
            else None
        )
        self._judge.note(record)
        if folded is None:
            try:
                folded = self._fold.take(record)
            except FOLD_ERRORS as error:
                self._diverged(self._judge.error(record, error, self._fold.fingerprint))
                raise _End from None
        self._account(record, folded)
        divergence = self._judge.judge(record, folded, self._fold.fingerprint)
        if divergence is not None:
            self._diverged(divergence)
            raise _End
        self._stop_after(record, folded)
        if self._is_stopped:
            raise _End

    def _account(self, record: Record, folded: Folded) -> None:
        report, before = self._report, self._before
        if before is not None and record.kind not in NEW_LIFE and before[0] != RunStarted.__name__:
            self._run_ns += max(0, record.time_ns - before[1])
        self._before = (record.kind, record.time_ns)
        report.next_position = record.position + 1
        if isinstance(folded.event, RunStarted) or not report.fingerprint_differences:
            differing = fingerprint_differences(self._fold.fingerprint, self._judge.fingerprint_here)
            report.fingerprint_differences = differing
        if not promises_bits(self._fold.fingerprint):
            report.inexact_way = in_words(self._fold.fingerprint)
        if isinstance(folded.event, LearnerStepped | StepFailed | StepSkipped):
            report.steps += 1
            report.steps_failed += isinstance(folded.event, StepFailed)
            report.last_step = folded.event.step
            self._tell()

    def _tell(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s < self._next_progress_s:
            return
        self._next_progress_s = now_s + PROGRESS_INTERVAL_S
        last = self._request.until or self._survey.last_step
        total = max(last - self._report.first_step, self._report.steps)
        self._progress(Progress(self._report.steps, total, now_s - self._began_s - self._paused_s))

    def _stop_after(self, record: Record, folded: Folded) -> None:
        event = folded.event
        if (
            not isinstance(event, LearnerStepped | StepFailed | StepSkipped)
            or event.step != self._request.until
        ):
            return
        report = folded.report
        self._report.stopped = Stopped(
            position=record.position,
            step=event.step,
            is_before=False,
            digest=report.digest if report else "",
            metrics=report.metrics if report else {},
            failure=report.failure if report else "",
        )
        raise _End

    # -- checkpoints on the way ------------------------------------------------------------------------------------

    def _pass_checkpoints(self, record: Record) -> None:
        """Compare the checkpoints of this very state; go on from one where the state is exact no more."""
        here = [found for found in self._survey.on_disk if found.position == record.position]
        is_exact = self._judge.is_exact
        if not here or not (self._request.verify or not is_exact):
            return
        for found in here:
            comparison = compare_checkpoint(found, self._fold.learner.state(), is_exact=is_exact)
            self._report.checkpoints.append(comparison)
            if not comparison.is_equal:
                is_drift = not comparison.error and not promises_bits(self._fold.fingerprint)
                self._report.outcome = "drifted" if is_drift else "divergent"
        if not is_exact and not self._report.checkpoints[-1].error:
            self._restore(here[-1])

    def _note_absent(self) -> None:
        """With `verify`: checkpoints that should be there and cannot be read are no silence."""
        known = {found.directory.name for found in self._survey.on_disk}
        for name in self._survey.saved.keys() - known:
            if (self._checkpoints / name).exists():
                self._report.outcome = "divergent"
                self._report.notes.append(f"checkpoint {name} stands in the journal, but not so on the disk")

    def _diverged(self, divergence: Divergence) -> None:
        self._ended_s = self._clock.monotonic_s()
        self._report.outcome = "divergent"
        found = next((one for one in self._survey.on_disk if one.position >= divergence.position), None)
        if found is None:
            note = "no checkpoint on disk was staged after it"
            self._report.divergence = msgspec.structs.replace(divergence, note=note)
            return
        try:
            if divergence.what == "error":
                raise InvariantViolation("the record cannot be folded")
            self._fold_silently(found.position)
            comparison = compare_checkpoint(found, self._fold.learner.state(), is_exact=True)
            self._report.divergence = msgspec.structs.replace(divergence, checkpoint=comparison)
        except FOLD_ERRORS as error:
            note = f"the state at checkpoint {found.directory.name} cannot be computed: {error}"
            self._report.divergence = msgspec.structs.replace(divergence, note=note)

    def _fold_silently(self, position: int) -> None:
        for record in self._records() if self._fold.position < position else ():
            if record.position == position:
                return
            if isinstance(event := event_of(record), LearnerRecovered) and not event.is_exact:
                raise InvariantViolation(f"an inexact recovery stands between, at record {record.position}")
            self._fold.take(record)

    # -- stopping before a step ------------------------------------------------------------------------------------

    def _pause_before(
        self, record: Record, event: LearnerStepped | StepFailed | StepSkipped
    ) -> Folded | None:
        condition = self._request.condition
        if condition is None:
            return None
        metrics = event.metrics if isinstance(event, LearnerStepped) else {}
        is_lost = isinstance(event, StepFailed | StepSkipped) and isinstance(condition, NotFinite)
        if not is_lost and not condition.matches(event.step, metrics):
            return None
        inputs = None if isinstance(event, StepSkipped) else event.inputs
        size = self._batch_size_of(inputs)
        return self._pause(
            Pause(self._fold.learner, event.step, record, event, lambda: self._fold.take(record), size)
        )

    def _batch_size_of(self, inputs: StepInputs | None) -> int:
        """Of the next update, if these come with it; the configured one for a journal that has none."""
        if inputs is None:
            return self._batch_size
        return self._fold.learner.mode(inputs.at_s).batch_size(self._batch_size)

    def _pause_at_the_end(self) -> None:
        """The journal ends, and an update is possible: the run may have died of it."""
        condition, learner = self._request.condition, self._fold.learner
        if condition is None:
            return
        step, inputs = learner.steps_done + 1, self._inputs_unrecorded()
        size = self._batch_size_of(inputs)
        may_step = learner.can_step(size) and (inputs is None or learner.mode(inputs.at_s).may_step)
        if may_step and (
            condition.matches(step, {}) or (isinstance(condition, NotFinite) and self._fails(inputs))
        ):
            self._pause(Pause(learner, step, None, None, lambda: learner.step(inputs), size))
        elif not self._pauses:
            self._report.notes.append("nothing was there to stop before")

    def _inputs_unrecorded(self) -> StepInputs | None:
        """What would come with the next update: a moment later. None in journals of before there was such a thing."""
        learner = self._fold.learner
        if learner.steps_done and learner.safety.clock.reading_s is None:
            return None
        return StepInputs(at_s=learner.lockstep_time_s())

    def _fails(self, inputs: StepInputs | None) -> bool:
        """Whether the next update gives no new weights; tried on a copy."""
        try:
            return bool(copy.deepcopy(self._fold.learner).step(inputs).failure)
        except InvariantViolation:
            return True

    def _pause(self, pause: Pause) -> Folded | None:
        """Let somebody look; what the step did, if they made it."""
        self._pauses += 1
        began_s = self._clock.monotonic_s()
        if self._interact is not None:
            self._interact(pause)
        self._paused_s += self._clock.monotonic_s() - began_s
        self._is_stopped = self._interact is None or pause.is_stopped
        has_failed = pause.is_made and pause.made is None
        if self._is_stopped or has_failed:
            self._report.stopped = Stopped(
                position=pause.record.position if pause.record else None,
                step=pause.step,
                is_before=pause.made is None and pause.unrecorded is None,
                digest=pause.report.digest if pause.report else "",
                metrics=pause.metrics,
                failure=pause.failure,
            )
            if pause.made is None:
                raise _End
        return pause.made

    # -- after -----------------------------------------------------------------------------------------------------

    def _finish(self) -> ReplayReport:
        report, tally = self._report, self._judge.tally
        report.steps_by_digest, report.steps_by_tolerance = tally.steps_by_digest, tally.steps_by_tolerance
        report.states_equal = tally.states_equal
        report.steps_beyond, report.largest = tally.steps_beyond, tally.largest
        if report.outcome == "equal" and tally.steps_by_tolerance:
            report.outcome = "within_tolerance"
        if report.outcome in ("equal", "within_tolerance") and tally.steps_beyond:
            report.outcome = "drifted"
        if tally.metrics_differing:
            report.notes.append(
                f"metrics of {tally.metrics_differing} steps with equal digests differ, the first at "
                f"{tally.metrics_differing_first}"
            )
        ended_s = self._clock.monotonic_s() if self._ended_s is None else self._ended_s
        report.seconds = ended_s - self._began_s - self._paused_s
        report.run_seconds = self._run_ns / 1e9
        return report


def _started(journal: Path) -> RunStarted:
    for record in read(journal):
        return record.header_as(RunStarted)
    raise UnavailableError(f"{journal} is empty")
