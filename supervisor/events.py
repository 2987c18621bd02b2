"""What happened to the process tree, what the shell observed, and what is still owed.

Three closed families, all frozen values:

* **Events** are past-tense facts. They are journaled before anybody hears of them, and `state.apply` folds them.
  A new meaning is a new event; an old one never changes.
* **Inputs** are what the shell observed since it last looked. They are not journaled; what `decide` makes of them is.
* **Effects** are debts of the shell to the world. `decide.plan` derives them from the state; carrying one out twice
  must do nothing the second time, which is why each names a child and its incarnation.

Every time here is `at_s`: seconds since this supervisor started, on a monotonic clock. The one wall-clock reading is
`RunConfigured.started_unix_s`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from esper_simic.curriculum_facts import CurriculumReply, CurriculumRequest
from esper_simic.errors import ContractError

Role = Literal["learner", "actor", "evaluate"]

EndOfTraining = Literal["max_seconds", "max_steps", "max_updates", "training_timeout", "halted", "requested"]
RELENTED: Final[frozenset[EndOfTraining]] = frozenset({"halted", "training_timeout"})
"""Ends that an operator can lift: `run --resume RUN --train-on`."""

Outcome = Literal["finished", "stopped", "failed"]

GoesOn = Literal["training", "checkpoint", "evaluation"]

LEARNED: Final = "learned"
"""The policy that a run trained; the others that are measured are its rivals."""

FIXED: Final = "fixed-network"
"""The networks that the learned policy grew, trained whole from the start: measured beside the rivals; nobody acts."""


class ExitReason(StrEnum):
    """Why a child is gone, as far as the evidence goes."""

    CLEAN = "clean"
    ERROR = "error"
    CONFIGURATION = "configuration"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_STARTED = "not_started"
    UNKNOWN = "unknown"


class ChildId(NamedTuple):
    """One life of one child. A restarted child has the same role and index and the next incarnation."""

    role: Role
    index: int  # type: ignore[assignment]  # a child has an index; nobody searches this tuple
    incarnation: int

    @property
    def name(self) -> str:
        """The child's name without its incarnation, such as `actor-3`."""
        return f"{self.role}-{self.index}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A journaled fact; `at_s` is seconds since this supervisor started."""

    at_s: float


class ChildEvent(Event, frozen=True, kw_only=True):
    """A fact about one life of one child."""

    role: Role
    index: int
    incarnation: int

    @property
    def child(self) -> ChildId:
        """Whom the event is about."""
        return ChildId(self.role, self.index, self.incarnation)


class RunConfigured(Event, frozen=True, kw_only=True):
    """What a supervisor's time with a run depends on; it began at `started_unix_s`."""

    preset: str
    config_text: str
    config: dict[str, Any]
    fingerprint: dict[str, str]
    versions: dict[str, str]
    started_unix_s: float
    num_actors: int
    evaluation_workers: int
    evaluation_policies: tuple[str, ...]
    controller: str = ""


class RunStarted(RunConfigured, frozen=True, kw_only=True):
    """The first event: all that the run depends on."""

    run_id: str


class RunResumed(RunConfigured, frozen=True, kw_only=True):
    """A later supervisor took the run over: every life of a child is over, and limits and clocks begin anew.

    Every `at_s` from here on is seconds since this supervisor started. The configuration is the one that holds now.
    `goes_on` says with what: a training that had come to the end its limits set is not begun again; then the last
    checkpoint is still to be made, or the policies are still to be measured. `trains_on`: an operator asked to let a
    training go on that halted itself or met its timeout.
    """

    goes_on: GoesOn = "training"
    trains_on: bool = False


class ChildScheduled(ChildEvent, frozen=True, kw_only=True):
    """A life of a child is wanted from `start_at_s` on; `attempt` 0 is the first start, others are restarts."""

    start_at_s: float
    attempt: int


class ChildStarted(ChildEvent, frozen=True, kw_only=True):
    """The child has a process; nothing is known about its health yet."""

    pid: int


class ChildReady(ChildEvent, frozen=True, kw_only=True):
    """The child spoke: imports done, sockets open. A learner has recovered, and stands at these counts.

    `data_digest` is the digest of the task on whose data an actor or evaluator grows hosts; empty for a learner, and in
    journals of before there was one. `execution` says how a learner carries out its updates, for people.
    """

    learner_step: int = 0
    environment_steps: int = 0
    data_digest: str = ""
    execution: str = ""


class ChildStopRequested(ChildEvent, frozen=True, kw_only=True):
    """It was decided that the child shall go: asked until `kill_at_s`, then its stacks dumped, then killed."""

    reason: str
    kill_at_s: float


class ChildExited(ChildEvent, frozen=True, kw_only=True):
    """The child's process is gone, or could not be made."""

    reason: ExitReason
    detail: str


class ChildAbandoned(ChildEvent, frozen=True, kw_only=True):
    """The kernel did not end the child's process in bounded time; nobody waits for it any more."""

    pid: int


class ChildGivenUp(ChildEvent, frozen=True, kw_only=True):
    """The child died too often within the window and is not restarted."""

    reason: str


class TrainingStarted(Event, frozen=True, kw_only=True):
    """The learner and at least one actor are ready; `max_seconds` counts from here."""


class TrainingEnded(Event, frozen=True, kw_only=True):
    """No more experience is wanted."""

    reason: EndOfTraining


class StopRequested(Event, frozen=True, kw_only=True):
    """Somebody outside asked for the end; `urgent` means now, at the cost of a checkpoint."""

    source: str
    command_id: str
    urgent: bool


class CommandRefused(Event, frozen=True, kw_only=True):
    """A command that cannot be obeyed, and why; a repeat of its id gets the same answer."""

    command_id: str
    reason: str


class CurriculumRequested(Event, frozen=True, kw_only=True):
    """An operator asked something of the curriculum by the command of the request's id; the learner owes an answer."""

    request: CurriculumRequest


class CurriculumAnswered(Event, frozen=True, kw_only=True):
    """The learner answered; a repeat of the command gets the same."""

    reply: CurriculumReply


class CheckpointReported(Event, frozen=True, kw_only=True):
    """The learner wrote its last checkpoint and verified it."""

    path: str
    learner_step: int
    environment_steps: int
    digest: str


class EvaluationStarted(Event, frozen=True, kw_only=True):
    """The trained policy and its rivals are to be measured on held-out episodes."""


class EvaluationAssigned(ChildEvent, frozen=True, kw_only=True):
    """One evaluator got one policy to measure."""

    policy: str


class PolicyEvaluated(Event, frozen=True, kw_only=True):
    """One policy was measured; the lists have one entry an episode.

    `returns` is empty where nobody acted. `summary` holds what the evaluating role computed from them, such as means
    and the ends of their intervals.
    """

    policy: str
    returns: tuple[float, ...]
    accuracies: tuple[float, ...]
    parameters: tuple[float, ...]
    summary: dict[str, float]


class EvaluationFinished(Event, frozen=True, kw_only=True):
    """Every policy was measured."""


class RunFailed(Event, frozen=True, kw_only=True):
    """The run cannot reach its purpose any more; what still runs is to be stopped."""

    reason: str
    exit_code: int = 1


class RunFinished(Event, frozen=True, kw_only=True):
    """The last event: no child is left."""

    exit_code: int
    outcome: Outcome
    reason: str


AnyEvent = (
    RunStarted
    | RunResumed
    | ChildScheduled
    | ChildStarted
    | ChildReady
    | ChildStopRequested
    | ChildExited
    | ChildAbandoned
    | ChildGivenUp
    | TrainingStarted
    | TrainingEnded
    | StopRequested
    | CommandRefused
    | CurriculumRequested
    | CurriculumAnswered
    | CheckpointReported
    | EvaluationStarted
    | EvaluationAssigned
    | PolicyEvaluated
    | EvaluationFinished
    | RunFailed
    | RunFinished
)

EVENTS: Final[dict[str, type[AnyEvent]]] = {kind.__name__: kind for kind in get_args(AnyEvent)}
"""The journal's `kind` of each event is its class name."""


def from_journal(kind: str, header: object) -> AnyEvent:
    """Give back the event of one record of the supervisor's journal.

    Args:
        kind: The record's kind.
        header: The record's header as plain values, as any MessagePack reader would give it.

    Raises:
        ContractError: The kind is unknown or the header does not fit it.
    """
    event = EVENTS.get(kind)
    if event is None:
        raise ContractError(f"unknown supervisor event {kind!r}; known: {', '.join(EVENTS)}")
    try:
        return msgspec.convert(header, event)
    except msgspec.ValidationError as error:
        raise ContractError(f"the header does not fit a {kind}: {error}") from None


# Inputs: what the shell observed


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """Something observed, not yet judged."""


class RunBegun(Input, frozen=True, kw_only=True):
    """The shell has the run directory and wants the run to begin with these facts, or to go on under them.

    `is_extended`: somebody named limits of the training, so a run that is finished under others goes on, too.
    `trains_on`: somebody asked that one go on which halted itself, or met its timeout.
    """

    run_id: str
    preset: str
    config_text: str
    config: dict[str, Any]
    fingerprint: dict[str, str]
    versions: dict[str, str]
    started_unix_s: float
    evaluation_policies: tuple[str, ...]
    is_extended: bool = False
    trains_on: bool = False
    controller: str = ""


class ChildSpawned(Input, frozen=True, kw_only=True):
    """A start effect gave a process."""

    child: ChildId
    pid: int


class ChildSaidReady(Input, frozen=True, kw_only=True):
    """A child's READY message."""

    child: ChildId
    pid: int
    learner_step: int = 0
    environment_steps: int = 0
    data_digest: str = ""
    execution: str = ""


class ChildGone(Input, frozen=True, kw_only=True):
    """The kernel says the process ended, or it could not be started."""

    child: ChildId
    reason: ExitReason
    detail: str


class ProgressHeard(Input, frozen=True, kw_only=True):
    """A child's report of work done; only the learner's counts of the run are judged.

    `is_halted`: the learner makes no update any more, because measures against its troubles are exhausted.
    """

    child: ChildId
    learner_step: int
    environment_steps: int
    is_halted: bool = False


class LearnerReported(Input, frozen=True, kw_only=True):
    """The learner's report of its last checkpoint."""

    child: ChildId
    path: str
    learner_step: int
    environment_steps: int
    digest: str


class EvaluationHeard(Input, frozen=True, kw_only=True):
    """An evaluator's result."""

    child: ChildId
    policy: str
    returns: tuple[float, ...]
    accuracies: tuple[float, ...]
    parameters: tuple[float, ...]
    summary: dict[str, float]


class SignalReceived(Input, frozen=True, kw_only=True):
    """A termination signal reached the supervisor."""

    name: str


class CommandReceived(Input, frozen=True, kw_only=True):
    """An operator's command with the id that makes its repeat harmless."""

    command_id: str
    name: str
    request: CurriculumRequest | None = None


class CurriculumHeard(Input, frozen=True, kw_only=True):
    """The learner's answer to a request about the curriculum."""

    child: ChildId
    reply: CurriculumReply


class Tick(Input, frozen=True, kw_only=True):
    """Time passed. `progressed_at_s` holds when each living child last did some work."""

    progressed_at_s: dict[ChildId, float]


AnyInput = (
    RunBegun
    | ChildSpawned
    | ChildSaidReady
    | ChildGone
    | ProgressHeard
    | LearnerReported
    | EvaluationHeard
    | SignalReceived
    | CommandReceived
    | CurriculumHeard
    | Tick
)


# Effects: what is owed to the world


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """A debt to one life of one child."""

    child: ChildId


class StartChild(Effect, frozen=True, kw_only=True):
    """Make the process. Settled by `ChildStarted` or `ChildExited`."""


class AskStop(Effect, frozen=True, kw_only=True):
    """Send the stop message. Settled by `ChildExited`."""

    reason: str


class DumpStacks(Effect, frozen=True, kw_only=True):
    """Let the child write where its threads stand. Settled by `ChildExited`."""


class KillChild(Effect, frozen=True, kw_only=True):
    """Send SIGKILL. Settled by `ChildExited`."""


class SendEvaluationTask(Effect, frozen=True, kw_only=True):
    """Tell an evaluator which policy to measure. Settled by `PolicyEvaluated`."""

    policy: str


class SendCurriculumRequest(Effect, frozen=True, kw_only=True):
    """Ask the learner something of its curriculum. Settled by `CurriculumAnswered`."""

    request: CurriculumRequest


AnyEffect = StartChild | AskStop | DumpStacks | KillChild | SendEvaluationTask | SendCurriculumRequest
