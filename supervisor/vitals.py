"""What the supervisor knows about its children and does not keep: last progress, memory; and the picture made of it.

Heartbeats report progress, not life. A report counts as progress when the child's `work` has grown since the last one.
A child that says it waits for something it cannot make itself is not blamed while any other child makes progress;
when nobody does, everybody is to blame, so two children that wait for each other are noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from esper_simic.config import SupervisorConfig
from supervisor.events import ChildId, Role
from supervisor.protocol import Progress
from supervisor.state import RunState

SCHEMA: Final = 1
"""Version of `Snapshot` as JSON; a field that changes its meaning raises it, a new field does not."""


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the run; memory is the resident set, 0 when there is no process."""

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


class LearnerView(msgspec.Struct, frozen=True, kw_only=True):
    """Updates made, and the learner's newest metrics by name."""

    step: int = 0
    metrics: dict[str, float] = {}


class EnvironmentView(msgspec.Struct, frozen=True, kw_only=True):
    """Environment steps the learner has admitted."""

    steps: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment, for people and machines; times in seconds."""

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
    schema: int = SCHEMA


class Vitals:
    """Collects what children report; owned by the loop, lost with it."""

    def __init__(self) -> None:
        self._last: dict[ChildId, Progress] = {}
        self._progressed_at_s: dict[ChildId, float] = {}
        self._anybody_at_s = 0.0
        self._learner = LearnerView()
        self._steps = 0

    def heard(self, report: Progress, now_s: float) -> None:
        """Take one report."""
        who = ChildId(report.role, report.index, report.incarnation)
        last = self._last.get(who)
        self._last[who] = report
        if last is None or report.work > last.work:
            self._progressed_at_s[who] = now_s
            self._anybody_at_s = max(self._anybody_at_s, now_s)
        if who.role == "learner":
            self._steps = max(self._steps, report.environment_steps)
            metrics = {**self._learner.metrics, **report.metrics}
            self._learner = LearnerView(step=report.learner_step, metrics=metrics)

    def forget(self, who: ChildId) -> None:
        """Drop a child that is gone."""
        self._last.pop(who, None)
        self._progressed_at_s.pop(who, None)

    def progressed_at_s(self) -> dict[ChildId, float]:
        """When each child last did some work of its own, or, while it waits, when anybody did."""
        return {
            who: max(at_s, self._anybody_at_s) if self._last[who].waiting_for else at_s
            for who, at_s in self._progressed_at_s.items()
        }

    def snapshot(
        self,
        state: RunState,
        *,
        now_s: float,
        run_dir: str,
        config: SupervisorConfig,
        memory_bytes: Mapping[int, int],
        refused: Mapping[str, int],
    ) -> Snapshot:
        """The picture of this moment; `memory_bytes` by process id."""
        started = state.started
        until_s = state.training_ended.at_s if state.training_ended else now_s
        began_s = state.training_started_s
        policies = list(started.evaluation_policies) if started else []
        return Snapshot(
            run_id=started.run_id if started else "",
            preset=started.preset if started else "",
            run_dir=run_dir,
            state=str(state.phase),
            elapsed_s=now_s,
            training_elapsed_s=0.0 if began_s is None else max(0.0, until_s - began_s),
            max_seconds=config.max_seconds,
            max_steps=config.max_steps,
            learner=self._learner,
            environment=EnvironmentView(steps=self._steps),
            processes=self._processes(state, memory_bytes),
            evaluated=[policy for policy in policies if policy in state.evaluations],
            to_evaluate=policies,
            refused_messages=dict(refused),
            checkpoint=state.checkpoint.path if state.checkpoint else "",
            reason=state.finished.reason if state.finished else state.failure,
        )

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
                    restarts=who.incarnation - 1,
                    waiting_for=report.waiting_for if report else "",
                    environment_steps=report.environment_steps if report else 0,
                    detail=child.detail or child.reason,
                )
            )
        return views
