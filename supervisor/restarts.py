"""Which dead children live again, when, and when it is enough. Pure.

A child may be restarted `max_restarts` times within `restart_window_s`; each restart within the window waits twice as
long as the one before, up to a bound. One death more and the child is given up; when no child of its role is left, the
run has failed and says what the last ones died of.
"""

from __future__ import annotations

from collections.abc import Iterable

from esper_simic.config import SupervisorConfig
from supervisor.events import AnyEvent, ChildGivenUp, ChildId, ChildScheduled, Role, RunFailed
from supervisor.state import LIVE, Child, RunState, Status


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


def _next_life(
    state: RunState, who: ChildId, child: Child, now_s: float, config: SupervisorConfig
) -> AnyEvent:
    recent = [
        at for at in state.restarts_s.get((who.role, who.index), ()) if now_s - at < config.restart_window_s
    ]
    if len(recent) >= config.max_restarts:
        reason = f"{len(recent)} restarts within {config.restart_window_s:g} s; the last end: {why(child)}"
        return ChildGivenUp(
            at_s=now_s, role=who.role, index=who.index, incarnation=who.incarnation, reason=reason
        )
    next_life = ChildId(who.role, who.index, who.incarnation + 1)
    return schedule(next_life, now_s, now_s + backoff_s(len(recent), config), attempt=len(recent) + 1)


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
