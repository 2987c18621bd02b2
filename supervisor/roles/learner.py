"""A learner's main: fold the journal, serve the actors until told to stop, leave a checkpoint."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from esper_simic.config import SupervisorConfig, parse
from esper_simic.events import AdmissionPaused, AdmissionResumed
from esper_simic.telemetry import Observers
from supervisor.bus import Poller, Server
from supervisor.child import ChildSpec
from supervisor.clock import SystemClock
from supervisor.files import Reserve, free_bytes
from supervisor.journal import Journal, JournalDamage
from supervisor.protocol import ACCEPTS, COMPILING, CONSOLIDATING, HALTED, Stopped
from supervisor.roles import way
from supervisor.roles.attempts import Attempts
from supervisor.roles.channel import ControlChannel
from supervisor.roles.checkpointing import Checkpointer
from supervisor.roles.learner_loop import LearnerLoop
from supervisor.roles.recovery import Progress, Recovery, mend
from supervisor.roles.step_log import StepLog
from supervisor.roles.surroundings import Surroundings
from supervisor.tracing import tracing

WAIT_MS: Final = 50.0


class Admission:
    """Whether there is disk enough to take anything in; a pause and its end are journaled."""

    def __init__(self, journal: Journal, run_dir: Path) -> None:
        self._journal, self._run_dir = journal, run_dir
        self.is_paused = False

    def look(self) -> None:
        """Pause when the journal has had to give up its reserve; resume once it holds it again."""
        if not self.is_paused and self._journal.is_on_reserve:
            self.is_paused = True
            reason = "the disk is full: the journal lives on its reserve"
            event = AdmissionPaused(free_bytes=free_bytes(self._run_dir), reason=reason)
            self._journal.append("AdmissionPaused", event)
        elif self.is_paused and self._journal.hold_reserve():
            self.is_paused = False
            self._journal.append("AdmissionResumed", AdmissionResumed(free_bytes=free_bytes(self._run_dir)))


def main(spec: ChildSpec) -> None:
    """Be learner `spec.who.index` until told to stop; leave a checkpoint."""
    config = parse(spec.config_text, is_recorded=True)
    torch.set_num_threads(config.supervisor.learner_threads)
    limits = config.supervisor
    run_dir = Path(spec.run_dir)
    clock = SystemClock()
    with (
        # First, so that it ends last: a collector that hangs delays nothing else.
        tracing(os.environ, spec.who.name) as traces,
        _journal(spec, limits) as journal,
        Attempts(run_dir / f"{spec.who.name}.attempts") as attempts,
        ControlChannel(spec, limits.frame_bytes_max) as control,
    ):
        checkpoints = run_dir / "checkpoints"
        execution = way.choose(config.simic_trainer, journal.directory, checkpoints, spec.who.index)
        execution.apply()
        recovery = Recovery(
            run_dir,
            spec.run_id,
            spec.who.incarnation,
            config,
            journal,
            attempts,
            clock,
            lambda progress: _report_recovery(control, progress),
            rank=spec.who.index,
            execution=execution,
            compiling=partial(control.report, phase=COMPILING, now=True),
            consolidating=partial(_report_consolidation, control),
        )
        learner = recovery.run().learner
        checkpointer = Checkpointer(
            checkpoints, journal, spec.run_id, limits, clock, execution, config.controller
        )
        checkpointer.begin(learner.steps_done, recovery.checkpoint_step)
        if not recovery.is_exact:
            checkpointer.save(learner)
        with Server(
            spec.endpoints["experience"],
            run_id=spec.run_id,
            accepts=ACCEPTS["learner"],
            frame_bytes_max=limits.frame_bytes_max,
        ) as server:
            surroundings = Surroundings(clock, execution.memory_fraction)
            observer = Observers(traces.observer, StepLog(sys.stderr))
            loop = LearnerLoop(spec, config, learner, journal, server, attempts, surroundings, observer)
            loop.lift_halt(spec.lift)
            loop.begin()
            journal.sync()  # where it stands is told below
            control.ready(
                learner_step=learner.steps_done,
                environment_steps=learner.environment_steps,
                execution=str(execution),
            )
            admission = Admission(journal, run_dir)
            _learn(_Organs(loop, journal, server, control, checkpointer, admission, recovery.metrics()))
        checkpoint = checkpointer.save(learner)
        role, index, incarnation = spec.who
        control.tell(Stopped(role=role, index=index, incarnation=incarnation, checkpoint=checkpoint))


def _journal(spec: ChildSpec, limits: SupervisorConfig) -> Journal:
    run_dir = Path(spec.run_dir)
    try:
        return Journal(
            run_dir / "journal" / spec.who.name,
            owner=spec.who.name,
            run_id=spec.run_id,
            segment_bytes_max=limits.journal_segment_bytes_max,
            commit_interval_ms=limits.journal_commit_interval_ms,
            commit_records_max=limits.journal_commit_records_max,
            commit_bytes_max=limits.journal_commit_bytes_max,
            reserve=Reserve(run_dir / f"{spec.who.name}.reserve", limits.disk_reserve_bytes),
        )
    except JournalDamage as error:
        raise mend(error) from error


@dataclass(frozen=True, slots=True)
class _Organs:
    loop: LearnerLoop
    journal: Journal
    server: Server
    control: ControlChannel
    checkpointer: Checkpointer
    admission: Admission
    recovered: dict[str, float]
    """Of the recovery with which this life began."""

    def report(self, *, waiting_for: str = "", now: bool = False) -> None:
        """Say how far the work has come."""
        learner = self.loop.learner
        self.control.report(
            phase=HALTED if learner.is_halted else "",
            learner_step=learner.steps_done,
            environment_steps=learner.environment_steps,
            waiting_for=waiting_for,
            metrics=self.loop.metrics
            | learner.curriculum_figures()
            | self.loop.counters()
            | self.checkpointer.metrics()
            | {"admission_paused": float(self.admission.is_paused)}
            | self.recovered,
            histograms=self.loop.histograms.by_source,
            notes=learner.engine.computation.notes,
            now=now,
        )


def _learn(organs: _Organs) -> None:
    loop, checkpointer = organs.loop, organs.checkpointer
    idle, busy = Poller(), Poller()
    idle.add(organs.control.client)
    for source in (organs.server, organs.control.client, organs.journal.durable_fd):
        busy.add(source)
    while organs.control.stop_requested() is None:
        organs.admission.look()
        if organs.admission.is_paused:
            idle.wait(WAIT_MS)
            checkpointer.advance(loop.pay())
            organs.report(waiting_for="disk")
            continue
        if not loop.may_step:
            loop.idle(busy, WAIT_MS)
        loop.take_messages()
        checkpointer.advance(loop.pay())
        may_step = loop.may_step
        if may_step:
            loop.step()
            organs.control.worked()
        for request in organs.control.take_requests():
            loop.ask(request, organs.control.answer)
        loop.answer_requests()
        loop.open_round()
        if checkpointer.is_due(loop.learner.steps_done):
            checkpointer.stage(loop.learner)
        organs.report(waiting_for="" if may_step else loop.waiting_for)
    # What was obeyed is told, too, before nobody is there to tell it.
    organs.journal.sync()
    loop.pay()
    # The last update is shown too, however short ago the report before it was.
    organs.report(now=True)


def _report_consolidation(control: ControlChannel) -> None:
    control.worked()
    control.report(phase=CONSOLIDATING)


def _report_recovery(control: ControlChannel, progress: Progress) -> None:
    control.worked()
    left_s = progress.seconds / max(progress.done, 1) * (progress.total - progress.done)
    control.report(
        phase="recovering",
        metrics={
            "recovery.done": float(progress.done),
            "recovery.total": float(progress.total),
            "recovery.seconds_left": left_s,
        },
    )
