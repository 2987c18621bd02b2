"""What follows from an observation, and what is owed to the world.

`decide` turns one input into the events that follow from it. It first answers the input itself, then lets the state
draw its own conclusions (`_advance`) until nothing new follows: a last actor gone makes the learner's turn to stop, a
learner gone with a checkpoint makes the evaluators' turn to start. `plan` reads from a state which effects are owed.

Both are pure: time comes in as `now_s`, seconds since the supervisor started, and the policy as the `supervisor`
section of the configuration. Notices about earlier lives of a child, or about lives already over, decide nothing.

How a run ends is in `stopping`, which child lives again in `restarts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, assert_never

from esper_simic.config import SupervisorConfig
from esper_simic.errors import InvariantViolation
from supervisor import coordination
from supervisor.events import (
    RELENTED,
    AnyEffect,
    AnyEvent,
    AnyInput,
    AskStop,
    CheckpointReported,
    ChildAbandoned,
    ChildExited,
    ChildGone,
    ChildId,
    ChildReady,
    ChildSaidReady,
    ChildSpawned,
    ChildStarted,
    CommandReceived,
    CommandRefused,
    CurriculumHeard,
    DumpStacks,
    EvaluationAssigned,
    EvaluationFinished,
    EvaluationHeard,
    GoesOn,
    KillChild,
    LearnerReported,
    PolicyEvaluated,
    ProgressHeard,
    Role,
    RunBegun,
    RunResumed,
    RunStarted,
    SendEvaluationTask,
    SignalReceived,
    StartChild,
    StopRequested,
    Tick,
    TrainingEnded,
    TrainingStarted,
)
from supervisor.restarts import needs_a_person, replace_the_fallen, schedule
from supervisor.state import LIVE, TERMINAL, Child, Phase, RunState, Status, apply, limit_of
from supervisor.stopping import (
    ask,
    evaluators,
    is_checkpoint_owed,
    open_tasks,
    while_stopping,
)

Events = tuple[AnyEvent, ...]

STACK_DUMP_S: Final = 0.5
"""Time a hung child gets to write its stacks before it is killed; its signal handler needs milliseconds."""

KILL_CONFIRM_S: Final = 10.0
"""A killed process that is still there after so long sits in the kernel; waiting longer would hang the run too."""

CONCLUSIONS_MAX: Final = 100
"""Rounds of conclusions from one input; a run needs fewer than ten, so more is a loop in this file."""

WANTED: Final[dict[Phase, frozenset[Role]]] = {
    Phase.STARTING: frozenset({"learner", "actor"}),
    Phase.TRAINING: frozenset({"learner", "actor"}),
    Phase.EVALUATING: frozenset({"evaluate"}),
}
"""Whose processes a phase wants; every other live child is asked to go."""

LIMITS: Final = ("max_seconds", "max_steps", "max_updates")
"""Keys that end a training."""

COMMANDS: Final = ("stop", coordination.COMMAND)
"""Commands an operator may send."""


def decide(state: RunState, observed: AnyInput, now_s: float, config: SupervisorConfig) -> Events:
    """Give the events that follow from one observation, in order; possibly none.

    Args:
        state: The fold of everything journaled so far.
        observed: What the shell saw.
        now_s: Seconds since this supervisor started.
        config: Limits and timeouts.

    Raises:
        InvariantViolation: The conclusions do not come to an end.
    """
    events: list[AnyEvent] = []
    batch = _respond(state, observed, now_s, config)
    for _ in range(CONCLUSIONS_MAX):
        for event in batch:
            state = apply(state, event)
        events.extend(batch)
        batch = _advance(state, now_s, config)
        if not batch:
            return tuple(events)
    raise InvariantViolation(f"conclusions from {observed} do not end; the last were {batch}")


def plan(state: RunState, now_s: float, config: SupervisorConfig) -> tuple[AnyEffect, ...]:
    """Give the effects still owed. The shell may carry each out more than once; the second time does nothing."""
    effects: list[AnyEffect] = []
    for who, child in sorted(state.children.items()):
        match child.status:
            case Status.SCHEDULED:
                if _is_wanted(state, who) and child.start_at_s <= now_s:
                    effects.append(StartChild(child=who))
            case Status.STOPPING:
                effects.append(_rung(who, child, now_s))
            case Status.READY:
                if child.policy:
                    effects.append(SendEvaluationTask(child=who, policy=child.policy))
            case _:
                pass
    return (*effects, *coordination.owed(state))


def _rung(who: ChildId, child: Child, now_s: float) -> AnyEffect:
    """The step of the stop ladder that the clock has reached: ask, dump, kill."""
    if now_s < child.kill_at_s:
        return AskStop(child=who, reason=child.reason)
    if now_s < child.kill_at_s + STACK_DUMP_S:
        return DumpStacks(child=who)
    return KillChild(child=who)


# Answers to inputs


def _respond(  # noqa: PLR0911 (a table)
    state: RunState, observed: AnyInput, now_s: float, config: SupervisorConfig
) -> Events:
    if state.phase in TERMINAL and not isinstance(observed, RunBegun):
        return ()
    match observed:
        case RunBegun():
            return _begin(state, observed, now_s, config)
        case ChildSpawned():
            return _spawned(state, observed, now_s)
        case ChildSaidReady():
            return _said_ready(state, observed, now_s)
        case ChildGone():
            return _gone(state, observed, now_s)
        case ProgressHeard():
            return _progressed(state, observed, now_s, config)
        case LearnerReported():
            return _learner_reported(state, observed, now_s)
        case EvaluationHeard():
            return _evaluation_heard(state, observed, now_s)
        case SignalReceived():
            return _stop(state, now_s, source=observed.name, command_id="")
        case CommandReceived() | CurriculumHeard():
            return _command(state, observed, now_s)
        case Tick():
            return _tick(state, observed, now_s, config)
        case _:
            assert_never(observed)


def _begin(state: RunState, observed: RunBegun, now_s: float, config: SupervisorConfig) -> Events:
    """Begin a run, or go on with one: however it ended, but one that is finished only with other limits."""
    facts: dict[str, Any] = {
        "at_s": now_s,
        "preset": observed.preset,
        "config_text": observed.config_text,
        "config": observed.config,
        "fingerprint": observed.fingerprint,
        "versions": observed.versions,
        "started_unix_s": observed.started_unix_s,
        "num_actors": config.num_actors,
        "evaluation_workers": config.evaluation_workers,
        "evaluation_policies": observed.evaluation_policies,
        "controller": observed.controller,
    }
    begun: AnyEvent
    if state.phase is Phase.EMPTY:
        begun = RunStarted(run_id=observed.run_id, **facts)
    elif is_done(state, config, is_extended=observed.is_extended, trains_on=observed.trains_on):
        return ()
    else:
        goes_on = _goes_on(state, config, trains_on=observed.trains_on)
        begun = RunResumed(goes_on=goes_on, trains_on=observed.trains_on, **facts)
    state = apply(state, begun)
    wanted: list[tuple[Role, int]]
    if state.phase is Phase.EVALUATING:
        wanted = [("evaluate", index) for index in range(evaluators(state))]
    elif state.phase is Phase.STOPPING:
        wanted = [("learner", 0)]
    else:
        wanted = [("learner", 0), *(("actor", index) for index in range(config.num_actors))]
    return (
        begun,
        *(schedule(state.next_life(role, index), now_s, now_s, attempt=0) for role, index in wanted),
    )


def _goes_on(state: RunState, config: SupervisorConfig, *, trains_on: bool) -> GoesOn:
    """What a run that is resumed has still to do. Its training is over only under the limits that ended it."""
    ended, checkpoint = state.training_ended, state.checkpoint
    if ended is None or ended.reason == "requested" or state.training_started_s is None:
        return "training"
    if _are_limits_others(state, config) or (trains_on and _is_relented(state)):
        return "training"
    if checkpoint is not None and checkpoint.learner_step == 0:
        return "training"
    # If measuring failed, the checkpoint may be why: the learner makes another one of its journal.
    return "checkpoint" if checkpoint is None or state.failure else "evaluation"


def is_done(state: RunState, config: SupervisorConfig, *, is_extended: bool, trains_on: bool = False) -> bool:
    """Whether a run is finished and stays so.

    It does not where somebody names other limits for it than those that ended its training, or asks that it go on
    although it met its timeout.
    """
    is_more_wanted = is_extended and _are_limits_others(state, config)
    return state.phase is Phase.FINISHED and not (is_more_wanted or (trains_on and _is_relented(state)))


def _is_relented(state: RunState) -> bool:
    """Whether the training came to an end that an operator can lift."""
    return state.training_ended is not None and state.training_ended.reason in RELENTED


def _are_limits_others(state: RunState, config: SupervisorConfig) -> bool:
    """Whether the training would end elsewhere now than under the configuration that it had."""
    return state.started is None or any(
        limit_of(state.started, key) != getattr(config, key) for key in LIMITS
    )


def _spawned(state: RunState, observed: ChildSpawned, now_s: float) -> Events:
    who = observed.child
    if not _is(state, who, Status.SCHEDULED):
        return ()
    started = ChildStarted(
        at_s=now_s, role=who.role, index=who.index, incarnation=who.incarnation, pid=observed.pid
    )
    if _is_wanted(state, who):
        return (started,)
    return (started, ask(who, now_s, reason="no longer wanted", kill_at_s=now_s))


def _said_ready(state: RunState, observed: ChildSaidReady, now_s: float) -> Events:
    """READY proves a process, so it may overtake the launcher's word that there is one."""
    who = observed.child
    started: Events = ()
    if _is(state, who, Status.SCHEDULED):
        started = _spawned(state, ChildSpawned(child=who, pid=observed.pid), now_s)
        if len(started) > 1:
            return started
    elif not _is(state, who, Status.STARTED) or state.children[who].pid != observed.pid:
        return ()
    ready = ChildReady(
        at_s=now_s,
        role=who.role,
        index=who.index,
        incarnation=who.incarnation,
        learner_step=observed.learner_step,
        environment_steps=observed.environment_steps,
        data_digest=observed.data_digest,
        execution=observed.execution,
    )
    return (*started, ready)


def _gone(state: RunState, observed: ChildGone, now_s: float) -> Events:
    who = observed.child
    if not _is(state, who, Status.SCHEDULED, *LIVE):
        return ()
    return (
        ChildExited(
            at_s=now_s,
            role=who.role,
            index=who.index,
            incarnation=who.incarnation,
            reason=observed.reason,
            detail=observed.detail,
        ),
    )


def _progressed(state: RunState, observed: ProgressHeard, now_s: float, config: SupervisorConfig) -> Events:
    who = observed.child
    if who.role != "learner" or not _is(state, who, *LIVE) or state.phase is not Phase.TRAINING:
        return ()
    if observed.is_halted:
        return (TrainingEnded(at_s=now_s, reason="halted"),)
    if _was_last(observed.learner_step, config):
        return (TrainingEnded(at_s=now_s, reason="max_updates"),)
    made = observed.environment_steps - (state.steps_before or 0)
    if config.max_steps is not None and made >= config.max_steps:
        return (TrainingEnded(at_s=now_s, reason="max_steps"),)
    return ()


def _learner_reported(state: RunState, observed: LearnerReported, now_s: float) -> Events:
    who = observed.child
    if who.role != "learner" or not _is(state, who, *LIVE):
        return ()
    return (
        CheckpointReported(
            at_s=now_s,
            path=observed.path,
            learner_step=observed.learner_step,
            environment_steps=observed.environment_steps,
            digest=observed.digest,
        ),
    )


def _evaluation_heard(state: RunState, observed: EvaluationHeard, now_s: float) -> Events:
    who = observed.child
    if not _is(state, who, *LIVE) or state.children[who].policy != observed.policy:
        return ()
    return (
        PolicyEvaluated(
            at_s=now_s,
            policy=observed.policy,
            returns=observed.returns,
            accuracies=observed.accuracies,
            parameters=observed.parameters,
            summary=observed.summary,
        ),
    )


def _stop(state: RunState, now_s: float, *, source: str, command_id: str) -> Events:
    """The first request stops in order, a second one at once."""
    requested = StopRequested(at_s=now_s, source=source, command_id=command_id, urgent=state.stop is not None)
    if state.phase in (Phase.STARTING, Phase.TRAINING):
        return (requested, TrainingEnded(at_s=now_s, reason="requested"))
    return (requested,)


def _command(state: RunState, observed: CommandReceived | CurriculumHeard, now_s: float) -> Events:
    """An operator's command, or the learner's answer to one."""
    if isinstance(observed, CurriculumHeard):
        return coordination.heard(state, observed, now_s)
    if observed.command_id in state.commands:
        return ()
    if observed.name == "stop":
        return _stop(state, now_s, source="command", command_id=observed.command_id)
    if observed.name == coordination.COMMAND:
        return coordination.ask(state, observed, now_s)
    reason = f"unknown command {observed.name!r}; known: {', '.join(COMMANDS)}"
    return (CommandRefused(at_s=now_s, command_id=observed.command_id, reason=reason),)


def _tick(state: RunState, observed: Tick, now_s: float, config: SupervisorConfig) -> Events:
    events: list[AnyEvent] = []
    for who, child in sorted(state.live.items()):
        reason = ""
        match child.status:
            case Status.STARTED:
                silent_s = now_s - max(child.since_s, observed.progressed_at_s.get(who, child.since_s))
                if silent_s > config.ready_timeout_s:
                    reason = f"not ready within {config.ready_timeout_s:g} s"
            case Status.READY:
                silent_s = now_s - max(child.since_s, observed.progressed_at_s.get(who, child.since_s))
                if silent_s > config.progress_timeout_s:
                    reason = f"no progress for {silent_s:.1f} s"
            case Status.STOPPING if now_s > child.kill_at_s + STACK_DUMP_S + KILL_CONFIRM_S:
                events.append(
                    ChildAbandoned(
                        at_s=now_s, role=who.role, index=who.index, incarnation=who.incarnation, pid=child.pid
                    )
                )
            case _:
                pass
        if reason:
            events.append(ask(who, now_s, reason=reason, kill_at_s=now_s))
    if state.phase is Phase.TRAINING:
        if _has_passed(state, now_s, config.max_seconds):
            events.append(TrainingEnded(at_s=now_s, reason="max_seconds"))
        elif _has_passed(state, now_s, _training_timeout_s(state)):
            events.append(TrainingEnded(at_s=now_s, reason="training_timeout"))
    return tuple(events)


# Conclusions from the state


def _advance(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    """The next conclusions the state allows, none when it has to wait for the world."""
    if state.phase is Phase.EMPTY or state.phase in TERMINAL:
        return ()
    concluded = needs_a_person(state, now_s) or coordination.unanswerable(state, now_s)
    if concluded:
        return concluded
    by_phase: dict[Phase, Callable[[RunState, float, SupervisorConfig], Events]] = {
        Phase.STARTING: _while_starting,
        Phase.TRAINING: _while_training,
        Phase.STOPPING: while_stopping,
        Phase.EVALUATING: _while_evaluating,
    }
    return by_phase[state.phase](state, now_s, config)


def _while_starting(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    # A run that stands at its last update already needs no actor.
    is_served = state.of_role("actor", Status.READY) or _was_last(state.learner_step, config)
    if state.of_role("learner", Status.READY) and is_served:
        return (TrainingStarted(at_s=now_s),)
    return _replace(state, now_s, config)


def _while_training(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    # One that died with its last update on its lips says where it stands when it is back.
    if state.of_role("learner", Status.READY) and _was_last(state.learner_step, config):
        return (TrainingEnded(at_s=now_s, reason="max_updates"),)
    return _replace(state, now_s, config)


def _replace(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    learner = replace_the_fallen(state, "learner", now_s, config)
    return learner or replace_the_fallen(state, "actor", now_s, config)


def _while_evaluating(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    waiting = open_tasks(state)
    if not waiting and not any(child.policy for child in state.children.values()):
        return (EvaluationFinished(at_s=now_s),)
    idle = [who for who, child in state.of_role("evaluate", Status.READY).items() if not child.policy]
    if idle and waiting:
        return tuple(
            EvaluationAssigned(
                at_s=now_s, role=who.role, index=who.index, incarnation=who.incarnation, policy=policy
            )
            for who, policy in zip(sorted(idle), waiting, strict=False)
        )
    return replace_the_fallen(state, "evaluate", now_s, config)


# Small words


def _is_wanted(state: RunState, who: ChildId) -> bool:
    if state.phase is Phase.STOPPING:
        return who.role == "learner" and is_checkpoint_owed(state)
    return who.role in WANTED.get(state.phase, ())


def _was_last(learner_step: int, config: SupervisorConfig) -> bool:
    return config.max_updates is not None and learner_step >= config.max_updates


def _has_passed(state: RunState, now_s: float, limit_s: float | None) -> bool:
    """Whether this invocation's training has gone on for so long."""
    began_s = state.training_started_s
    return began_s is not None and limit_s is not None and now_s - began_s >= limit_s


def _training_timeout_s(state: RunState) -> float | None:
    """`simic_trainer.training_timeout_hours` of the run, in seconds; None where its configuration knows no such key."""
    section = state.started.config.get("simic_trainer") if state.started else None
    hours = section.get("training_timeout_hours") if isinstance(section, dict) else None
    return None if hours is None else 3600.0 * float(hours)


def _is(state: RunState, who: ChildId, *statuses: Status) -> bool:
    child = state.children.get(who)
    return child is not None and child.status in statuses
