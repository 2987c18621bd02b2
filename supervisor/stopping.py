"""How a run empties its process tree, and what comes when nobody is left. Pure.

Actors and evaluators go first, then the learner, which is asked for its checkpoint. What comes next the facts say: a
failure, an answered stop, the evaluation, or the end. A learner that dies before it has reported the checkpoint that
the evaluation needs is started once more: its journal has everything, and a new life makes the checkpoint of it.
"""

from __future__ import annotations

from typing import Final

from esper_simic.config import SupervisorConfig
from supervisor.events import (
    AnyEvent,
    ChildId,
    ChildStopRequested,
    EvaluationStarted,
    RunFailed,
    RunFinished,
)
from supervisor.restarts import replace_the_fallen, schedule
from supervisor.state import Child, RunState, Status

Events = tuple[AnyEvent, ...]

EVALUATOR_PATIENCE_S: Final = 1.0
"""How long an evaluator is asked to stop: it has nothing to save."""


def while_stopping(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    """The next conclusions while the process tree is emptied."""
    urgent = state.stop is not None and state.stop.urgent
    others = {who: child for who, child in state.live.items() if who.role != "learner"}
    leaving = others or state.live
    if urgent:
        leaving = {
            who: child
            for who, child in state.live.items()
            if child.status is not Status.STOPPING or child.kill_at_s > now_s
        }
    asked = tuple(
        ask(who, now_s, reason=_reason_to_stop(state), kill_at_s=_patience(state, who, child, now_s, config))
        for who, child in sorted(leaving.items())
        if urgent or (child.status is not Status.STOPPING and not _is_coming(state, who, child))
    )
    if asked or state.live:
        return asked
    if is_checkpoint_owed(state):
        return _learner_for_its_checkpoint(state, now_s, config)
    return _after_the_last_child(state, now_s)


def is_checkpoint_owed(state: RunState) -> bool:
    """Whether training came to its limit and the learner died before it reported the last checkpoint."""
    ended = state.training_ended
    is_wanted = ended is not None and ended.reason != "requested" and state.stop is None
    return (
        is_wanted and not state.failure and state.checkpoint is None and state.training_started_s is not None
    )


def _is_coming(state: RunState, who: ChildId, child: Child) -> bool:
    """Whether this is a learner on its way back to make the last checkpoint."""
    return who.role == "learner" and child.status is Status.STARTED and is_checkpoint_owed(state)


def _learner_for_its_checkpoint(state: RunState, now_s: float, config: SupervisorConfig) -> Events:
    """The journal has everything; a new life of the learner makes the checkpoint of it."""
    if state.of_role("learner", Status.SCHEDULED):
        return ()
    return replace_the_fallen(state, "learner", now_s, config)


def _patience(state: RunState, who: ChildId, child: Child, now_s: float, config: SupervisorConfig) -> float:
    """Until when a child is asked. One that is not ready yet cannot hear, and has nothing to save."""
    if (state.stop is not None and state.stop.urgent) or child.status is Status.STARTED:
        return now_s
    if who.role == "evaluate":
        return now_s + min(EVALUATOR_PATIENCE_S, config.stop_timeout_s)
    return now_s + config.stop_timeout_s


def _reason_to_stop(state: RunState) -> str:
    if state.failure:
        return state.failure
    if state.stop is not None:
        return f"stop requested by {state.stop.source}"
    if state.evaluated:
        return "evaluation finished"
    return f"training ended: {state.training_ended.reason}" if state.training_ended else "the run ends"


def _after_the_last_child(state: RunState, now_s: float) -> Events:
    if state.failure:
        return (
            RunFinished(at_s=now_s, exit_code=state.failure_code, outcome="failed", reason=state.failure),
        )
    if state.stop is not None:
        return (RunFinished(at_s=now_s, exit_code=0, outcome="stopped", reason=_how_stopped(state)),)
    if state.checkpoint is not None and state.checkpoint.learner_step == 0:
        reason = "training ended before the first update: the limit is too short, or nothing was learned from"
        return (RunFailed(at_s=now_s, reason=reason),)
    if state.training_ended is not None and state.training_ended.reason == "halted":
        return (RunFailed(at_s=now_s, reason=_how_halted(state)),)
    if state.evaluated or not open_tasks(state):
        return (RunFinished(at_s=now_s, exit_code=0, outcome="finished", reason=_how_finished(state)),)
    children = [state.next_life("evaluate", index) for index in range(evaluators(state))]
    return (
        EvaluationStarted(at_s=now_s),
        *(schedule(who, now_s, now_s, attempt=0) for who in children),
    )


def _how_finished(state: RunState) -> str:
    if state.training_ended is None or state.training_ended.reason != "training_timeout":
        return "the run is complete"
    return (
        "the run is complete: its training met simic_trainer.training_timeout_hours; simic-supervisor run --resume RUN "
        "--train-on lets it go on"
    )


def _how_halted(state: RunState) -> str:
    kept = (
        f"the last good policy is in {state.checkpoint.path}"
        if state.checkpoint
        else "there is no checkpoint"
    )
    return (
        f"the training halted itself: updates failed time and again although all measures were taken; {kept}. "
        f"simic-supervisor log cat --owner learner-0 --kind StepFailed tells what they died of. After mending, "
        f"simic-supervisor run --resume RUN --train-on lets it go on, on TD(0) targets first; or begin anew with "
        f"gentler settings, such as a lower simic_trainer.learning_rate"
    )


def _how_stopped(state: RunState) -> str:
    source = state.stop.source if state.stop is not None else "nobody"
    if state.training_started_s is None and state.checkpoint is None:
        return f"stopped by {source} before training {'went on' if state.resumes else 'began'}"
    if state.checkpoint is None:
        return f"stopped by {source}; no last checkpoint was reported, the journal has everything"
    return f"stopped by {source}"


def evaluators(state: RunState) -> int:
    """How many evaluators the open tasks keep busy."""
    return min(state.started.evaluation_workers if state.started else 1, len(open_tasks(state)))


def open_tasks(state: RunState) -> list[str]:
    """Policies neither measured nor in an evaluator's hands, in the order given at the start."""
    policies = state.started.evaluation_policies if state.started else ()
    taken = {child.policy for child in state.children.values()}
    return [policy for policy in policies if policy not in state.evaluations and policy not in taken]


def ask(who: ChildId, now_s: float, *, reason: str, kill_at_s: float) -> ChildStopRequested:
    """The decision that a child shall go."""
    return ChildStopRequested(
        at_s=now_s,
        role=who.role,
        index=who.index,
        incarnation=who.incarnation,
        reason=reason,
        kill_at_s=kill_at_s,
    )
