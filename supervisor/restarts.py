"""Which dead children live again, when, and when it is enough. Pure.

A child may be restarted `max_restarts` times within `restart_window_s`; each restart within the window waits twice as
long as the one before, up to a bound. One death more and the child is given up; when no child of its role is left, the
run has failed and says what the last ones died of.

Two kinds of deaths count however far apart they are, because a life may well last longer than the window and come to
nothing: those of lives that never became ready, and those while the run stops, where a learner has one thing left to
do. A child that ends with status 78 asks for a person: it would end so again, and the run ends with it.
So does one that grows hosts on other data than the run began with.
"""

from __future__ import annotations

from collections.abc import Iterable

from esper_simic.config import SupervisorConfig
from supervisor.events import (
    AnyEvent,
    ChildGivenUp,
    ChildId,
    ChildScheduled,
    ExitReason,
    Role,
    RunFailed,
)
from supervisor.state import LIVE, Child, Phase, RunState, Status


def replace_the_fallen(
    state: RunState, role: Role, now_s: float, config: SupervisorConfig
) -> tuple[AnyEvent, ...]:
    """Schedule the next life of each child that is gone, or give it up; fail the run when none of its role is left."""
    events: list[AnyEvent] = []
    lives = state.of_role(role)
    for who, child in sorted(lives.items()):
        gone = child.status in (Status.EXITED, Status.ABANDONED) and _is_newest(who, lives)
        if gone and (who.role, who.index) not in state.given_up:
            events.append(_next_life(state, who, child, now_s, config))
    if events:
        return tuple(events)
    if not any(child.status in LIVE or child.status is Status.SCHEDULED for child in lives.values()):
        last = "; ".join(f"{who.name} {why(child)}" for who, child in sorted(lives.items()))
        return (RunFailed(at_s=now_s, reason=f"every {role} was given up; last seen: {last}"),)
    return ()


def needs_a_person(state: RunState, now_s: float) -> tuple[AnyEvent, ...]:
    """Fail the run, if it has not failed yet, because a child found what only a person can mend."""
    if state.failure:
        return ()
    if state.other_data:
        reason = (
            f"the data of environment.task are not those of this run (digests: {state.other_data}); put them back, or "
            f"begin a new run with --restart-behavior restart"
        )
        return (RunFailed(at_s=now_s, reason=reason, exit_code=78),)
    for who, child in sorted(state.children.items()):
        if child.exit_reason is ExitReason.CONFIGURATION:
            return (RunFailed(at_s=now_s, reason=f"{who.name} cannot go on: {why(child)}", exit_code=78),)
    return ()


def _next_life(
    state: RunState, who: ChildId, child: Child, now_s: float, config: SupervisorConfig
) -> AnyEvent:
    key = (who.role, who.index)
    since_s = now_s - config.restart_window_s
    if state.phase is Phase.STOPPING:
        since_s = min(since_s, state.phase_since_s)
    recent = sum(at_s > since_s for at_s in state.restarts_s.get(key, ()))
    fruitless = state.fruitless.get(key, 0)
    if recent < config.max_restarts and fruitless <= config.max_restarts:
        next_life = state.next_life(who.role, who.index)
        return schedule(next_life, now_s, now_s + backoff_s(recent, config), attempt=recent + 1)
    within = f"{recent} restarts within {now_s - since_s:g} s"
    reason = f"{within if recent >= config.max_restarts else f'{fruitless} lives in a row were never ready'}"
    return ChildGivenUp(
        at_s=now_s,
        role=who.role,
        index=who.index,
        incarnation=who.incarnation,
        reason=f"{reason}; the last end: {why(child)}",
    )


def backoff_s(restarts: int, config: SupervisorConfig) -> float:
    """Delay before a restart that follows `restarts` others in the window: doubling, up to its bound, seconds."""
    # The exponent is bounded so that a huge max_restarts cannot overflow a float.
    return min(config.restart_backoff_max_s, config.restart_backoff_s * 2.0 ** min(restarts, 60))


def _is_newest(who: ChildId, lives: Iterable[ChildId]) -> bool:
    return all(who.incarnation >= other.incarnation for other in lives if other.index == who.index)


def why(child: Child) -> str:
    """Why a child is gone, in words."""
    if child.status is Status.ABANDONED:
        return f"process {child.pid} could not be killed"
    return child.detail or str(child.status)


def schedule(who: ChildId, now_s: float, start_at_s: float, *, attempt: int) -> ChildScheduled:
    """One life of a child, wanted from `start_at_s` on."""
    return ChildScheduled(
        at_s=now_s,
        role=who.role,
        index=who.index,
        incarnation=who.incarnation,
        start_at_s=start_at_s,
        attempt=attempt,
    )
