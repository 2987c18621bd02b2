"""Requests about the curriculum on their way from an operator to the learner and back. Pure.

A request is a command like any other: written down before anybody hears of it, owed to the learner until it has
answered, whatever becomes of the learner's lives, and repeated without harm, for the learner answers a known id as it
did before. Where nobody is left who could answer, it is refused.
"""

from __future__ import annotations

from typing import Final

from supervisor.events import (
    AnyEvent,
    CommandReceived,
    CommandRefused,
    CurriculumAnswered,
    CurriculumHeard,
    CurriculumRequested,
    SendCurriculumRequest,
)
from supervisor.state import LIVE, Phase, RunState, Status

Events = tuple[AnyEvent, ...]

COMMAND: Final = "curriculum"

OPEN_REQUESTS_MAX: Final = 8
"""Requests that may wait for the learner; more are refused."""


def ask(state: RunState, observed: CommandReceived, now_s: float) -> Events:
    """The decision about a request; one that waits already is not asked again."""
    command_id, request = observed.command_id, observed.request
    if command_id in state.asked:
        return ()
    refusal = ""
    if request is None or request.request_id != command_id:
        refusal = f"the command {COMMAND!r} comes with a request of its own id"
    elif state.phase not in (Phase.STARTING, Phase.TRAINING):
        refusal = f"there is no training: the run is {state.phase}"
    elif len(state.asked) >= OPEN_REQUESTS_MAX:
        refusal = f"{OPEN_REQUESTS_MAX} requests wait for the learner already"
    if refusal or request is None:
        return (CommandRefused(at_s=now_s, command_id=command_id, reason=refusal),)
    return (CurriculumRequested(at_s=now_s, request=request),)


def heard(state: RunState, observed: CurriculumHeard, now_s: float) -> Events:
    """The learner's answer, if it is the first."""
    if observed.reply.request_id not in state.asked:
        return ()
    return (CurriculumAnswered(at_s=now_s, reply=observed.reply),)


def unanswerable(state: RunState, now_s: float) -> Events:
    """Refusals of what nobody will answer any more: the training is over, and the learner is gone."""
    if state.phase in (Phase.STARTING, Phase.TRAINING) or state.of_role("learner", *LIVE):
        return ()
    reason = "the training ended before the learner answered"
    return tuple(
        CommandRefused(at_s=now_s, command_id=command_id, reason=reason) for command_id in state.asked
    )


def owed(state: RunState) -> tuple[SendCurriculumRequest, ...]:
    """What the learner that is there has not answered yet."""
    return tuple(
        SendCurriculumRequest(child=who, request=request)
        for who in sorted(state.of_role("learner", Status.READY))
        for request in state.asked.values()
    )
