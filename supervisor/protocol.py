"""What processes of a run say to each other: frozen structs, one table of their kinds.

Three conversations, each on its own socket:

* **control**, child to supervisor: `Ready`, `Progress`, `Stopped`, `Evaluated`, `CurriculumSettled`; back: `Stop`,
  `Evaluate`, `Noted`, `AskCurriculum`.
  `Noted` is sent once what the child reported is synced in the supervisor's journal; a child must not leave before.
* **operator**, command line to supervisor: `StatusRequest`, `Command`; back: `StatusReply`, `CommandReply`.
* **experience**, actor to learner: `Hello`, `Unroll`, `PullWeights`; back: `Welcome`, `Acknowledged` (it is durable),
  `Credit` (there is room for more), `Refused`, `Weights`. Acknowledgement and credit are two messages because storing
  an unroll and having room for the next one are two facts.

Arrays travel as raw frames after the message: an unroll in the order of `esper_simic.trajectory.frame_layout`, weights
as one frame of safetensors.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from esper_simic.config_behaviour import POLICY
from esper_simic.curriculum_facts import CurriculumReply, CurriculumRequest
from esper_simic.events import EpisodeFinished
from esper_simic.hardware import HardwareContext
from esper_simic.telemetry import HistogramCounts
from supervisor.events import Role


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Anything said over a socket; its kind on the wire is its class name."""


class FromChild(Message, frozen=True, kw_only=True):
    """A message by which a child speaks for one of its lives."""

    role: Role
    index: int
    incarnation: int


# Control


class Ready(FromChild, frozen=True, kw_only=True):
    """Imports are done and sockets are open; a learner has recovered, and says where it stands.

    Who grows hosts says on which data: `data_digest` is that of the task. It is empty for a learner, which needs none.
    """

    pid: int
    learner_step: int = 0
    environment_steps: int = 0
    data_digest: str = ""
    execution: str = ""
    """How a learner carries out its updates, for people."""


class Progress(FromChild, frozen=True, kw_only=True):
    """Work done so far, not a sign of life.

    `work` is a count that only grows when the child did some of its own work; a report in which it has not grown is no
    progress. `waiting_for` says what a child lacks that it cannot make itself, such as `"credit"` or `"experience"`:
    such a child is not blamed as long as any other one makes progress. `environment_steps` of the learner counts the
    steps admitted in the run, of an actor the steps it made. `histograms` count every update of the learner's life, so
    a report that is lost loses nothing.
    """

    work: int
    learner_step: int = 0
    environment_steps: int = 0
    phase: str = ""
    waiting_for: str = ""
    metrics: dict[str, float] = {}
    histograms: dict[str, HistogramCounts] = {}
    notes: tuple[str, ...] = ()
    """What else is worth knowing of this life, for people."""


HALTED: Final = "halted"
"""Phase of a learner that makes no update any more."""

BREAKER: Final = "breaker"
"""What a learner waits for whose training's breaker is open: time, which nobody can give it."""

COMPILING: Final = "compiling"
"""Phase of a learner that may be silent for minutes from now on: a compiler tells nobody how far it is."""


CONSOLIDATING: Final = "consolidating"
"""Phase of a learner that estimates what a stage that was passed needs, batch by batch: each of them is work."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was written, synced and verified."""

    path: str
    learner_step: int
    environment_steps: int
    digest: str


class Stopped(FromChild, frozen=True, kw_only=True):
    """The child obeyed a stop and leaves after `Noted`; the learner names its checkpoint."""

    checkpoint: Checkpoint | None = None


class Evaluated(FromChild, frozen=True, kw_only=True):
    """One policy's held-out episodes, an entry each, and the summary the evaluator computed from them."""

    policy: str
    returns: tuple[float, ...]
    accuracies: tuple[float, ...]
    parameters: tuple[float, ...]
    summary: dict[str, float]


class CurriculumSettled(FromChild, frozen=True, kw_only=True):
    """The learner's answer to a request about the curriculum; what it rests on is durable."""

    reply: CurriculumReply


class Stop(Message, frozen=True, kw_only=True):
    """End in order: finish the unit of work, save what is to be saved, say `Stopped`."""

    reason: str


class Evaluate(Message, frozen=True, kw_only=True):
    """Measure one policy over `episodes` held-out episodes; `checkpoint` is the path of the learned one."""

    policy: str
    episodes: int
    checkpoint: str


class AskCurriculum(Message, frozen=True, kw_only=True):
    """Ask something of the learner's curriculum. A repeat of the request's id gets the first answer."""

    request: CurriculumRequest


class Noted(Message, frozen=True, kw_only=True):
    """What the child said last (`of` is its kind) is synced in the supervisor's journal."""

    of: str


# Operator


class StatusRequest(Message, frozen=True, kw_only=True):
    """Ask for the present snapshot."""


class StatusReply(Message, frozen=True, kw_only=True):
    """The snapshot as plain values; its schema is versioned inside."""

    snapshot: dict[str, Any]


class Command(Message, frozen=True, kw_only=True):
    """An operator's imperative. A repeat of `command_id` gets the first answer and does nothing.

    `request` is that of the command `curriculum`; its id is the command's.
    """

    command_id: str
    name: str
    request: CurriculumRequest | None = None


class CommandReply(Message, frozen=True, kw_only=True):
    """The answer, sent after it is synced; `reason` says why when refused, `reply` what the learner answered."""

    command_id: str
    accepted: bool
    reason: str
    position: int
    reply: CurriculumReply | None = None


# Experience


class Hello(Message, frozen=True, kw_only=True):
    """An actor's words to a learner that may not know it; the learner answers with `Welcome`, then with credits.

    `unacknowledged` are the sequences sent and not answered. Said again to a learner that knows this life, it is
    answered by the same `Welcome` and moves no credits. `number` counts the greetings of this life: only the `Welcome`
    that answers the newest one ends an actor's wait. `hardware` is on what it acts.
    """

    actor: int
    incarnation: int
    number: int = 1
    unacknowledged: tuple[int, ...] = ()
    hardware: HardwareContext | None = None


class Welcome(Message, frozen=True, kw_only=True):
    """What the learner's journal knows of an actor.

    `learner` is the learner's incarnation: under a new one the actor's credits begin anew, what is `settled` (the
    newest sequence of this very life that was answered, 0 for none) needs no answer any more, and all that it sent
    after it is to be sent again. `first_episodes` are the numbers of the episodes with which the lanes of a new life
    begin. `unrolls` of this actor stand in the journal; in lockstep a new life re-simulates them. `answers` is the
    number of the greeting.
    """

    learner: int
    answers: int
    first_episodes: list[int]
    settled: int = 0
    unrolls: int = 0


class Unroll(Message, frozen=True, kw_only=True):
    """`steps` steps of `lanes` lanes, made by one policy version.

    `sequence` counts from 1 in each incarnation, in lockstep over all of them; `episode_numbers` are the lanes' current
    episodes, `stage` is the stage of the curriculum they were in, `behaviour` who acted. In lockstep the recurrent
    state after the last step follows the frames, `[lanes, state]` float32.
    """

    actor: int
    incarnation: int
    sequence: int
    policy_version: int
    lanes: int
    steps: int
    episode_numbers: list[int]
    episodes: list[EpisodeFinished]
    stage: int = 0
    behaviour: str = POLICY


class Acknowledged(Message, frozen=True, kw_only=True):
    """The unroll is durable at this journal position."""

    sequence: int
    position: int


class Credit(Message, frozen=True, kw_only=True):
    """The actor may send `count` more unrolls; `policy_version` is the newest to pull."""

    count: int
    policy_version: int


class Refused(Message, frozen=True, kw_only=True):
    """The unroll was not admitted: `reason` is one of a few words fit for a counter's label."""

    sequence: int
    reason: str


class PullWeights(Message, frozen=True, kw_only=True):
    """Ask for weights newer than `have_version` (-1: any)."""

    have_version: int


class Weights(Message, frozen=True, kw_only=True):
    """A policy version, without frames when the asker already has it, and the curriculum's stage to act in."""

    version: int
    stage: int = 0


KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__: kind
    for kind in (
        Ready,
        Progress,
        Stopped,
        Evaluated,
        CurriculumSettled,
        Stop,
        Evaluate,
        Noted,
        AskCurriculum,
        StatusRequest,
        StatusReply,
        Command,
        CommandReply,
        Hello,
        Welcome,
        Unroll,
        Acknowledged,
        Credit,
        Refused,
        PullWeights,
        Weights,
    )
}

Conversation = Literal["control", "control_child", "operator", "learner", "actor"]

ACCEPTS: Final[dict[Conversation, tuple[type[Message], ...]]] = {
    "control": (Ready, Progress, Stopped, Evaluated, CurriculumSettled, StatusRequest, Command),
    "control_child": (Stop, Evaluate, Noted, AskCurriculum),
    "operator": (StatusReply, CommandReply),
    "learner": (Hello, Unroll, PullWeights),
    "actor": (Welcome, Acknowledged, Credit, Refused, Weights),
}
"""What each end of a socket accepts; anything else is refused there and counted."""
