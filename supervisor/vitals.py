"""What the supervisor knows about its children and does not keep: last progress, memory; and the picture made of it.

Heartbeats report progress, not life. A report counts as progress when the child's `work` has grown since the last one.
A child that says, and goes on saying, that it waits for something it cannot make itself is not blamed as long as
another one is the likelier culprit: one that does not wait, one that says nothing any more, one that has not been heard
yet (a learner on its way back), the disk, or a breaker that is open for a while. When all of them wait and say so,
everybody is to blame: two children that wait for each other are noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from esper_simic.config import SupervisorConfig
from esper_simic.telemetry import HistogramCounts, Totals
from supervisor.events import ChildId, Role
from supervisor.protocol import BREAKER, COMPILING, CONSOLIDATING, Progress
from supervisor.state import RunState

SCHEMA: Final = 1
"""Version of `Snapshot` as JSON; a field that changes its meaning raises it, a new field does not."""


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the run; memory is the resident set, 0 when there is no process; `restarts` in this invocation."""

    role: str
    index: int
    incarnation: int
    pid: int
    state: str
    memory_bytes: int
    restarts: int
    waiting_for: str = ""
    environment_steps: int = 0
    detail: str = ""
    phase: str = ""
    """What it is at that is not its usual work, as it says itself; empty when it is gone."""


class LearnerView(msgspec.Struct, frozen=True, kw_only=True):
    """Updates made, `before` of them when this supervisor took the run over, and the newest metrics by name."""

    step: int = 0
    before: int = 0
    metrics: dict[str, float] = {}


class EnvironmentView(msgspec.Struct, frozen=True, kw_only=True):
    """Environment steps the learner has admitted; `before` of them when this supervisor took the run over."""

    steps: int = 0
    before: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment, for people and machines; times in seconds.

    `max_seconds` and `max_steps` count this invocation, as `elapsed_s` does; `max_updates` is of the whole run. While
    the run goes on, `troubles` say why it is not as well as it should be, `notes` what else is worth knowing.
    `counters` and `histograms` add up over the learner's lives under this supervisor.
    """

    run_id: str
    preset: str
    run_dir: str
    state: str
    elapsed_s: float
    training_elapsed_s: float
    max_seconds: float | None
    max_steps: int | None
    learner: LearnerView
    environment: EnvironmentView
    processes: list[ProcessView]
    evaluated: list[str]
    to_evaluate: list[str]
    refused_messages: dict[str, int]
    checkpoint: str
    reason: str
    resumes: int = 0
    max_updates: int | None = None
    troubles: list[str] = []
    notes: list[str] = []
    execution: str = ""
    """How the learner carries out its updates, as it said when it was ready."""
    counters: dict[str, float] = {}
    histograms: dict[str, HistogramCounts] = {}
    controller: str = ""
    schema: int = SCHEMA


RECOVERING: Final = "recovering"
"""The phase that a learner reports while it folds its journal; how far it has come is in metrics `recovery.…`."""

COMPILING_GRACE_S: Final = 1800.0
"""How long a learner that said it compiles may say nothing more, beyond what everybody may."""

DISK: Final = "disk"
"""What a learner waits for that only a person can give."""

EXCUSES: Final = ("", DISK, BREAKER)
"""What nobody is to blame for whom others wait for: that it works, or lacks what no process can give."""

SILENCE_S: Final = 5.0
"""Children that wait say so several times a second; one that has said nothing for so long does not wait, it hangs."""

BREAKER_OPEN: Final = 2.0
"""As a learner reports it in `breaker.<name>`."""

BUDGET_LEFT: Final = "slo_budget_left."
"""Prefix of the shares of error budgets that are left."""

DISK_FULL: Final = "the disk is full: nothing is taken in until there is room again"


class Vitals:
    """Collects what children report; owned by the loop, lost with it."""

    def __init__(self) -> None:
        self._last: dict[ChildId, Progress] = {}
        self._spoke_at_s: dict[ChildId, float] = {}
        self._progressed_at_s: dict[ChildId, float] = {}
        self._anybody_at_s = 0.0
        self._learner: LearnerView | None = None
        self._steps = 0
        self._totals = Totals()

    def heard(self, report: Progress, now_s: float) -> None:
        """Take one report."""
        who = ChildId(report.role, report.index, report.incarnation)
        last = self._last.get(who)
        self._last[who] = report
        self._spoke_at_s[who] = now_s
        if last is None or report.work > last.work:
            self._progressed_at_s[who] = now_s
            self._anybody_at_s = max(self._anybody_at_s, now_s)
        if who.role == "learner":
            self._hear_learner(report)

    def _hear_learner(self, report: Progress) -> None:
        """Its counts and metrics; while it recovers it has no new ones, and the last ones stand."""
        self._totals = self._totals.followed(report.incarnation, report.metrics, report.histograms)
        before = self._learner or LearnerView()
        metrics = _without_recovery(before.metrics) | report.metrics
        if report.phase == CONSOLIDATING:
            return  # it tells nothing else, whether it recovers meanwhile or is at work
        if report.phase in (RECOVERING, COMPILING):
            self._learner = LearnerView(step=before.step, metrics=metrics)
            return
        self._learner = LearnerView(step=report.learner_step, metrics=metrics)
        self._steps = report.environment_steps

    def learner_stands_at(self, learner_step: int, environment_steps: int) -> None:
        """Take the counts with which a learner became ready."""
        metrics = self._learner.metrics if self._learner else {}
        self._learner = LearnerView(step=learner_step, metrics=_without_recovery(metrics))
        self._steps = environment_steps

    def forget(self, who: ChildId) -> None:
        """Drop a child that is gone."""
        for table in (self._last, self._spoke_at_s, self._progressed_at_s):
            table.pop(who, None)
        if who.role == "learner" and self._learner is not None:
            self._learner = LearnerView(
                step=self._learner.step, metrics=_without_recovery(self._learner.metrics)
            )

    def progressed_at_s(self, now_s: float, expected: Collection[ChildId]) -> dict[ChildId, float]:
        """When each child last did some work of its own, or had a good reason not to.

        Args:
            now_s: Now.
            expected: The children that are or will be there.
        """
        excused_at_s = now_s if self._is_somebody_else_late(now_s, expected) else self._anybody_at_s
        times_s = {}
        for who, at_s in self._progressed_at_s.items():
            if self._last[who].phase == COMPILING:
                times_s[who] = min(now_s, self._spoke_at_s[who] + COMPILING_GRACE_S)
            elif not self._last[who].waiting_for:
                times_s[who] = at_s
            elif self._is_silent(who, now_s):
                times_s[who] = max(at_s, self._spoke_at_s[who])
            else:
                times_s[who] = max(at_s, excused_at_s)
        return times_s

    def _is_somebody_else_late(self, now_s: float, expected: Collection[ChildId]) -> bool:
        """Whether anybody but those who wait and say so can be what they wait for."""
        return any(
            who not in self._last or self._is_silent(who, now_s) or self._last[who].waiting_for in EXCUSES
            for who in expected
        )

    def _is_silent(self, who: ChildId, now_s: float) -> bool:
        return now_s - self._spoke_at_s[who] > SILENCE_S

    def snapshot(
        self,
        state: RunState,
        *,
        now_s: float,
        run_dir: str,
        config: SupervisorConfig,
        memory_bytes: Mapping[int, int],
        refused: Mapping[str, int],
        is_disk_full: bool = False,
    ) -> Snapshot:
        """The picture of this moment; `memory_bytes` by process id, `is_disk_full` for the supervisor's journal."""
        started = state.started
        until_s = state.training_ended.at_s if state.training_ended else now_s
        began_s = state.training_started_s
        policies = list(started.evaluation_policies) if started else []
        learner, steps, steps_before = self._standing(state)
        return Snapshot(
            run_id=started.run_id if started else "",
            preset=started.preset if started else "",
            run_dir=run_dir,
            state=str(state.phase),
            elapsed_s=now_s,
            training_elapsed_s=0.0 if began_s is None else max(0.0, until_s - began_s),
            max_seconds=config.max_seconds,
            max_steps=config.max_steps,
            learner=learner,
            environment=EnvironmentView(steps=steps, before=steps_before),
            processes=self._processes(state, memory_bytes),
            evaluated=[policy for policy in policies if policy in state.evaluations],
            to_evaluate=policies,
            refused_messages=dict(refused),
            checkpoint=state.checkpoint.path if state.checkpoint else "",
            reason=state.finished.reason if state.finished else state.failure,
            resumes=state.resumes,
            max_updates=config.max_updates,
            troubles=troubles(learner.metrics, is_disk_full=is_disk_full),
            notes=[*notes(learner.metrics), *self._own_notes()],
            execution=state.execution,
            counters=self._totals.counters(),
            histograms=self._totals.histograms(),
            controller=started.controller if started else "",
        )

    def _own_notes(self) -> list[str]:
        """What the learner itself thinks worth knowing."""
        return [note for who, last in self._last.items() if who.role == "learner" for note in last.notes]

    def _standing(self, state: RunState) -> tuple[LearnerView, int, int]:
        """Where the learner stands, in updates and in environment steps, and how many of these it had at first.

        A supervisor that only measures has never seen it: then the last checkpoint tells.
        """
        last, updates_before = state.checkpoint, state.updates_before
        if updates_before is None and last is not None:
            learner = LearnerView(step=last.learner_step, before=last.learner_step)
            return learner, last.environment_steps, last.environment_steps
        learner = self._learner or LearnerView(step=state.learner_step)
        learner = msgspec.structs.replace(learner, before=updates_before or 0)
        steps = self._steps if self._learner else state.steps_before or 0
        return learner, steps, state.steps_before or 0

    def _processes(self, state: RunState, memory_bytes: Mapping[int, int]) -> list[ProcessView]:
        newest: dict[tuple[Role, int], ChildId] = {}
        for who in sorted(state.children):
            newest[who.role, who.index] = who
        views = []
        for who in newest.values():
            child = state.children[who]
            report = self._last.get(who)
            views.append(
                ProcessView(
                    role=who.role,
                    index=who.index,
                    incarnation=who.incarnation,
                    pid=child.pid if who in state.live else 0,
                    state=str(child.status),
                    memory_bytes=memory_bytes.get(child.pid, 0) if who in state.live else 0,
                    restarts=who.incarnation - 1 - state.incarnations_before.get((who.role, who.index), 0),
                    waiting_for=report.waiting_for if report else "",
                    environment_steps=report.environment_steps if report else 0,
                    detail=child.detail or child.reason,
                    phase=report.phase if report else "",
                )
            )
        return views


def troubles(metrics: Mapping[str, float], *, is_disk_full: bool = False) -> list[str]:
    """Why a run that goes on is not as well as it should be, by its learner's metrics."""
    found = []
    if is_disk_full or metrics.get("admission_paused", 0.0) > 0:
        found.append(DISK_FULL)
    quarantined = metrics.get("quarantined", 0.0)
    if quarantined > 0:
        found.append(f"{quarantined:.0f} records of the learner's journal are quarantined: not learned from")
    if metrics.get("breaker.training") == BREAKER_OPEN:
        found.append("the training's breaker is open: updates failed in a row, none is made for a while")
    return found


def notes(metrics: Mapping[str, float]) -> list[str]:
    """What else is worth knowing, by the learner's metrics."""
    found = []
    if metrics.get("inexact", 0.0) > 0:
        found.append("the learner's last recovery was not exact: see LearnerRecovered in its journal")
    if metrics.get("conservative_mode", 0.0) > 0:
        found.append(
            "conservative mode: smaller batches, lower rates, more time; simic-supervisor report says when and why"
        )
    if metrics.get("breaker.vtrace") == BREAKER_OPEN:
        found.append("V-trace's breaker is open: targets are TD(0) for now")
    used_up = sorted(
        name.removeprefix(BUDGET_LEFT)
        for name, left in metrics.items()
        if name.startswith(BUDGET_LEFT) and left <= 0
    )
    if used_up:
        found.append(f"objectives out of their error budget: {', '.join(used_up)}")
    return found


def _without_recovery(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("recovery.")}
