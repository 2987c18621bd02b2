"""The process tree as a fold of the supervisor's journal.

`apply` is total: it refuses nothing, because refusing is `decide`'s work, before an event exists. `check` says
whether the result contradicts itself. Both are tables and copies, nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, assert_never

import msgspec

from esper_simic.curriculum_facts import CurriculumReply, CurriculumRequest
from esper_simic.errors import InvariantViolation
from supervisor.events import (
    AnyEvent,
    CheckpointReported,
    ChildAbandoned,
    ChildEvent,
    ChildExited,
    ChildGivenUp,
    ChildId,
    ChildReady,
    ChildScheduled,
    ChildStarted,
    ChildStopRequested,
    CommandRefused,
    CurriculumAnswered,
    CurriculumRequested,
    EvaluationAssigned,
    EvaluationFinished,
    EvaluationStarted,
    ExitReason,
    PolicyEvaluated,
    Role,
    RunConfigured,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    StopRequested,
    TrainingEnded,
    TrainingStarted,
)


class Phase(StrEnum):
    """Where the run stands. How it came there is kept in facts beside it, never here."""

    EMPTY = "empty"
    STARTING = "starting"
    TRAINING = "training"
    STOPPING = "stopping"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


TERMINAL: Final = frozenset({Phase.FINISHED, Phase.STOPPED, Phase.FAILED})
"""Phases after which nothing happens."""

NEXT_PHASE: Final[dict[tuple[Phase, type[AnyEvent]], Phase]] = {
    (Phase.EMPTY, RunStarted): Phase.STARTING,
    (Phase.STARTING, TrainingStarted): Phase.TRAINING,
    (Phase.STARTING, TrainingEnded): Phase.STOPPING,
    (Phase.STARTING, RunFailed): Phase.STOPPING,
    (Phase.TRAINING, TrainingEnded): Phase.STOPPING,
    (Phase.TRAINING, RunFailed): Phase.STOPPING,
    (Phase.STOPPING, EvaluationStarted): Phase.EVALUATING,
    (Phase.EVALUATING, EvaluationFinished): Phase.STOPPING,
    (Phase.EVALUATING, StopRequested): Phase.STOPPING,
    (Phase.EVALUATING, RunFailed): Phase.STOPPING,
}
"""The legal moves; an event without an entry leaves the phase as it is. `RunFinished` names its own outcome."""


class Status(StrEnum):
    """Where one life of one child stands."""

    SCHEDULED = "scheduled"
    STARTED = "started"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"
    ABANDONED = "abandoned"


LIVE: Final = frozenset({Status.STARTED, Status.READY, Status.STOPPING})
"""Statuses of a child that has a process."""


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """One life of one child.

    `since_s` is when the status began; `kill_at_s` has a meaning only while STOPPING, `start_at_s` only while
    SCHEDULED. `policy` is what an evaluator is measuring. `was_ready` outlasts the status.
    """

    status: Status
    since_s: float
    pid: int = 0
    start_at_s: float = 0.0
    attempt: int = 0
    kill_at_s: float = 0.0
    reason: str = ""
    detail: str = ""
    policy: str = ""
    was_ready: bool = False
    exit_reason: ExitReason | None = None


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """All that the supervisor decides from. A missing time is None.

    `incarnations` are the newest lives there ever were, `incarnations_before` those when this supervisor took over.
    `fruitless` counts the lives of a child in a row that ended before they were ready. `updates_before` and
    `steps_before` (of environments) are what the learner had done when it first became ready under this supervisor,
    `learner_step` where it stood when it last did. `lift` is the newest takeover in which an operator asked to let a
    halted training go on, until a learner has stood ready under it: whatever halts later was not meant. `data_digest`
    is that of the data on which the first child of the run grew hosts, `other_data` says who came later with other
    data. `commands` holds the refusal of each command that was answered, empty where it was obeyed; `asked` the
    requests about the curriculum that were not, `replies` what the learner said to the others. `execution` is how the
    newest life of the learner carries out its updates, for people.
    """

    phase: Phase = Phase.EMPTY
    phase_since_s: float = 0.0
    started: RunStarted | None = None
    children: dict[ChildId, Child] = {}
    incarnations: dict[tuple[Role, int], int] = {}
    incarnations_before: dict[tuple[Role, int], int] = {}
    restarts_s: dict[tuple[Role, int], tuple[float, ...]] = {}
    fruitless: dict[tuple[Role, int], int] = {}
    given_up: dict[tuple[Role, int], str] = {}
    training_started_s: float | None = None
    training_ended: TrainingEnded | None = None
    stop: StopRequested | None = None
    failure: str = ""
    failure_code: int = 1
    resumes: int = 0
    lift: int = 0
    updates_before: int | None = None
    steps_before: int | None = None
    learner_step: int = 0
    data_digest: str = ""
    other_data: str = ""
    execution: str = ""
    checkpoint: CheckpointReported | None = None
    evaluations: dict[str, PolicyEvaluated] = {}
    evaluated: bool = False
    commands: dict[str, str] = {}
    asked: dict[str, CurriculumRequest] = {}
    replies: dict[str, CurriculumReply] = {}
    finished: RunFinished | None = None

    def of_role(self, role: Role, *statuses: Status) -> dict[ChildId, Child]:
        """The lives of one role that have one of the statuses (all lives if none is named)."""
        return {
            who: child
            for who, child in self.children.items()
            if who.role == role and (not statuses or child.status in statuses)
        }

    @property
    def live(self) -> dict[ChildId, Child]:
        """The lives that have a process."""
        return {who: child for who, child in self.children.items() if child.status in LIVE}

    def next_life(self, role: Role, index: int) -> ChildId:
        """The child's next life; none is ever used twice in a run."""
        return ChildId(role, index, self.incarnations.get((role, index), 0) + 1)


def apply(state: RunState, event: AnyEvent) -> RunState:  # noqa: C901, PLR0911, PLR0912 (a table, closed)
    """Fold one event into the state. Total: no event is refused."""
    moved = NEXT_PHASE.get((state.phase, type(event)))
    if moved is not None:
        state = msgspec.structs.replace(state, phase=moved, phase_since_s=event.at_s)
    if isinstance(event, ChildEvent):
        return _apply_to_child(state, event)
    match event:
        case RunStarted():
            return msgspec.structs.replace(state, started=event)
        case RunResumed():
            return _resumed(state, event)
        case TrainingStarted():
            return msgspec.structs.replace(state, training_started_s=event.at_s)
        case TrainingEnded():
            return msgspec.structs.replace(state, training_ended=event)
        case StopRequested():
            return _stop_requested(state, event)
        case CommandRefused():
            return _answered(state, event.command_id, event.reason)
        case CurriculumRequested():
            asked = {**state.asked, event.request.request_id: event.request}
            return msgspec.structs.replace(state, asked=asked)
        case CurriculumAnswered(reply=reply):
            state = msgspec.structs.replace(state, replies={**state.replies, reply.request_id: reply})
            return _answered(state, reply.request_id, reply.refusal)
        case CheckpointReported():
            return msgspec.structs.replace(state, checkpoint=event)
        case PolicyEvaluated():
            return _policy_evaluated(state, event)
        case EvaluationStarted():
            return state
        case EvaluationFinished():
            return msgspec.structs.replace(state, evaluated=True)
        case RunFailed():
            if state.failure:
                return state
            return msgspec.structs.replace(state, failure=event.reason, failure_code=event.exit_code)
        case RunFinished():
            return msgspec.structs.replace(
                state, phase=Phase(event.outcome), phase_since_s=event.at_s, finished=event
            )
        case _:
            assert_never(event)


def check(state: RunState) -> None:
    """Say whether the state contradicts itself.

    Raises:
        InvariantViolation: Naming the invariant and the child that breaks it.
    """
    seen: dict[tuple[Role, int], ChildId] = {}
    for who, child in state.children.items():
        if child.status in LIVE and child.pid <= 0:
            raise InvariantViolation(f"{who} is {child.status} without a process id")
        if child.status in LIVE or child.status is Status.SCHEDULED:
            other = seen.setdefault((who.role, who.index), who)
            if other != who:
                raise InvariantViolation(f"two lives of {who.name} at once: {other} and {who}")
        if child.policy and child.status not in LIVE:
            raise InvariantViolation(
                f"{who} is {child.status} but still owes the evaluation of {child.policy!r}"
            )
    if state.phase in TERMINAL and state.live:
        raise InvariantViolation(f"the run is {state.phase} but {sorted(state.live)} still have processes")
    if state.phase is Phase.EVALUATING and state.of_role("learner", *LIVE):
        raise InvariantViolation("evaluation began while the learner still has a process")
    if (state.phase in TERMINAL) != (state.finished is not None):
        raise InvariantViolation(f"phase {state.phase} does not agree with RunFinished: {state.finished}")


def _apply_to_child(state: RunState, event: ChildEvent) -> RunState:
    who = event.child
    if isinstance(event, ChildGivenUp):
        given_up = {**state.given_up, (who.role, who.index): event.reason}
        return msgspec.structs.replace(state, given_up=given_up)
    if isinstance(event, ChildScheduled):
        return _scheduled(state, event)
    child = state.children.get(who, Child(status=Status.SCHEDULED, since_s=event.at_s))
    children = {**state.children, who: _next_child(child, event)}
    if isinstance(event, ChildReady):
        state = _stands(state, event) if event.role == "learner" else _grows_on(state, event)
    return msgspec.structs.replace(state, children=children, fruitless=_fruitless(state, child, event))


def _stands(state: RunState, ready: ChildReady) -> RunState:
    """Where the learner stands now, and, if nobody knows yet, where it stood at first.

    An order to lift a halt is spent: this life has obeyed it durably before it said READY, or had nothing to lift.
    """
    if state.steps_before is None:
        state = msgspec.structs.replace(
            state, updates_before=ready.learner_step, steps_before=ready.environment_steps
        )
    return msgspec.structs.replace(state, learner_step=ready.learner_step, execution=ready.execution, lift=0)


def _grows_on(state: RunState, ready: ChildReady) -> RunState:
    """On which data hosts are grown: the first digest is the run's."""
    if ready.data_digest in ("", state.data_digest):
        return state
    if not state.data_digest:
        return msgspec.structs.replace(state, data_digest=ready.data_digest)
    found, known = ready.data_digest[:16], state.data_digest[:16]
    return msgspec.structs.replace(
        state, other_data=f"{ready.child.name} found {found}, the run began with {known}"
    )


def _fruitless(state: RunState, child: Child, event: ChildEvent) -> dict[tuple[Role, int], int]:
    key = (event.role, event.index)
    match event:
        case ChildReady():
            return {**state.fruitless, key: 0}
        case ChildExited() | ChildAbandoned() if not child.was_ready:
            return {**state.fruitless, key: state.fruitless.get(key, 0) + 1}
        case _:
            return state.fruitless


def _next_child(child: Child, event: ChildEvent) -> Child:  # noqa: PLR0911 (a table)
    replace = msgspec.structs.replace
    match event:
        case ChildStarted():
            return replace(child, status=Status.STARTED, since_s=event.at_s, pid=event.pid)
        case ChildReady():
            return replace(child, status=Status.READY, since_s=event.at_s, was_ready=True)
        case ChildStopRequested():
            kill_at_s = event.kill_at_s
            if child.status is Status.STOPPING:
                kill_at_s = min(kill_at_s, child.kill_at_s)
            return replace(
                child, status=Status.STOPPING, since_s=event.at_s, kill_at_s=kill_at_s, reason=event.reason
            )
        case ChildExited():
            detail = f"{event.reason}: {event.detail}" if event.detail else str(event.reason)
            return replace(
                child,
                status=Status.EXITED,
                since_s=event.at_s,
                detail=detail,
                policy="",
                exit_reason=event.reason,
            )
        case ChildAbandoned():
            return replace(child, status=Status.ABANDONED, since_s=event.at_s, policy="")
        case EvaluationAssigned():
            return replace(child, policy=event.policy)
        case _:
            return child


def _scheduled(state: RunState, event: ChildScheduled) -> RunState:
    """Earlier lives that have ended are forgotten here; what matters of them is in `restarts_s`.

    `attempt` counts the restarts in the window with this one, so no more of their times are ever needed.
    """
    who = event.child
    children = {
        other: child
        for other, child in state.children.items()
        if (other.role, other.index) != (who.role, who.index)
        or child.status in LIVE
        or child.status is Status.SCHEDULED
    }
    children[who] = Child(
        status=Status.SCHEDULED, since_s=event.at_s, start_at_s=event.start_at_s, attempt=event.attempt
    )
    restarts_s = state.restarts_s
    if event.attempt > 0:
        key = (who.role, who.index)
        restarts_s = {**restarts_s, key: (*restarts_s.get(key, ()), event.at_s)[-event.attempt :]}
    newest = max(who.incarnation, state.incarnations.get((who.role, who.index), 0))
    incarnations = {**state.incarnations, (who.role, who.index): newest}
    return msgspec.structs.replace(state, children=children, restarts_s=restarts_s, incarnations=incarnations)


def _resumed(state: RunState, event: RunResumed) -> RunState:
    """What outlives a supervisor: the numbers of the lives, answered commands, the results of a training that ended."""
    kept = RunState(
        phase=Phase.STARTING,
        phase_since_s=event.at_s,
        started=_reconfigured(state.started, event),
        incarnations=state.incarnations,
        incarnations_before=state.incarnations,
        commands=state.commands,
        asked=state.asked,
        replies=state.replies,
        data_digest=state.data_digest,
        resumes=state.resumes + 1,
        lift=state.resumes + 1 if event.trains_on else state.lift,
    )
    if event.goes_on == "training":
        return kept
    kept = msgspec.structs.replace(
        kept,
        phase=Phase.STOPPING,
        training_started_s=state.training_started_s,
        training_ended=state.training_ended,
    )
    if event.goes_on == "checkpoint":
        return kept
    return msgspec.structs.replace(
        kept,
        phase=Phase.EVALUATING,
        checkpoint=state.checkpoint,
        evaluations=state.evaluations if _are_comparable(state.started, event) else {},
    )


def _reconfigured(started: RunStarted | None, event: RunResumed) -> RunStarted | None:
    """The same run under the configuration that holds now."""
    if started is None:
        return None
    facts = {name: getattr(event, name) for name in RunConfigured.__struct_fields__}
    return RunStarted(run_id=started.run_id, **facts)


def _are_comparable(started: RunStarted | None, event: RunResumed) -> bool:
    """Whether what was measured before belongs into one table with what will be."""
    key = "evaluation_episodes"
    return started is not None and limit_of(started, key) == limit_of(event, key)


def limit_of(configured: RunConfigured, key: str) -> Any:
    """A value of the `supervisor` section under which a supervisor ran; None where it had none."""
    section = configured.config.get("supervisor")
    return section.get(key) if isinstance(section, dict) else None


def _answered(state: RunState, command_id: str, refusal: str) -> RunState:
    """A command got its answer, and nobody waits for another."""
    asked = {known: request for known, request in state.asked.items() if known != command_id}
    return msgspec.structs.replace(state, asked=asked, commands={**state.commands, command_id: refusal})


def _stop_requested(state: RunState, event: StopRequested) -> RunState:
    commands = state.commands
    if event.command_id:
        commands = {**commands, event.command_id: ""}
    return msgspec.structs.replace(state, stop=event, commands=commands)


def _policy_evaluated(state: RunState, event: PolicyEvaluated) -> RunState:
    children = {
        who: msgspec.structs.replace(child, policy="") if child.policy == event.policy else child
        for who, child in state.children.items()
    }
    evaluations = {**state.evaluations, event.policy: event}
    return msgspec.structs.replace(state, children=children, evaluations=evaluations)
