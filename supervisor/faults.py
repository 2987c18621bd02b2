"""Named fault points: places where a process can be made to die, so that recovery is proven and not hoped for.

`point(name)` stands at every place where a crash could tear something: before and after an append, a sync, a rename,
an acknowledgement. `POINTS` lists them all. Unarmed it is one comparison. Armed, it ends this process with SIGKILL,
which no handler sees:

    SIMIC_FAULTS="learner:journal.sync.before:3;actor:actor.send.after:1"  SIMIC_FAULTS_DIR=<directory>

kills the learner at its third passage and an actor at its first. A fault fires once, whatever lives come after: it
leaves a file in the directory before it kills. A list is armed in order for each role: the next fault counts its
passages once the one before it has fired. One point can do something else than kill: with `:memory` behind the passage
(`learner:learner.update.half:20:memory`) the update runs out of memory there, as on a machine too small for it, and the
process goes on. `witness` notes in the same directory what was promised to the process that
calls it; `simic-supervisor verify-recovery` compares the notes with what the journal holds afterwards.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from esper_simic.errors import ConfigError

FAULTS_VARIABLE: Final = "SIMIC_FAULTS"
DIRECTORY_VARIABLE: Final = "SIMIC_FAULTS_DIR"

_LEARNER: Final = frozenset({"learner"})
_ACTOR: Final = frozenset({"actor"})
_SUPERVISOR: Final = frozenset({"supervisor"})
_WRITERS: Final = _LEARNER | _SUPERVISOR

KILL: Final = "kill"
MEMORY: Final = "memory"

_ENTRY: Final = re.compile(
    r"(?P<role>[^:]+):(?P<point>[^:]+):(?P<passage>0*[1-9][0-9]*)(?::(?P<act>memory))?"
)


class Place(NamedTuple):
    """Where a point stands."""

    roles: frozenset[str]
    """The roles whose processes pass it."""
    description: str
    """What was done last there, and what not yet."""
    may_run_short: bool = False
    """Whether memory can be made to run out there."""


POINTS: Final[dict[str, Place]] = {
    # Whoever writes a journal. The points of the flusher are passed by its thread.
    "journal.append.before": Place(_WRITERS, "a record was handed in and has no position yet"),
    "journal.append.after": Place(_WRITERS, "a record has its position and waits for the flusher"),
    "journal.write.before": Place(_WRITERS, "nothing of a group of records was written"),
    "journal.write.half": Place(_WRITERS, "half of a group's last record was written: a torn tail"),
    "journal.sync.before": Place(_WRITERS, "a group was written and not synced"),
    "journal.sync.after": Place(_WRITERS, "a group was synced and not marked; nobody was told"),
    "journal.mark.after": Place(_WRITERS, "a group was synced and marked; nobody was told"),
    "journal.segment.before": Place(_WRITERS, "a segment is complete and has no successor yet"),
    "journal.segment.after": Place(_WRITERS, "a new segment has its name and no record"),
    # Checkpoints: some files, the name, the event, the end of an older one.
    "checkpoint.stage.before": Place(_LEARNER, "a checkpoint is due and nothing of it was journaled"),
    "checkpoint.stage.after": Place(_LEARNER, "CheckpointStaged was appended, nothing was written"),
    "checkpoint.file.after": Place(_LEARNER, "a file of an unnamed checkpoint was written and synced"),
    "checkpoint.rename.before": Place(_LEARNER, "a checkpoint was written and read back, without its name"),
    "checkpoint.rename.after": Place(_LEARNER, "a checkpoint has its name, which is not synced"),
    "checkpoint.saved.before": Place(_LEARNER, "a checkpoint is whole and CheckpointSaved not appended"),
    "checkpoint.saved.after": Place(_LEARNER, "CheckpointSaved was appended and is not durable"),
    "checkpoint.prune.before": Place(_LEARNER, "a checkpoint is no longer needed and whole"),
    "checkpoint.prune.half": Place(_LEARNER, "a checkpoint has lost its name and one of its files"),
    "checkpoint.prune.after": Place(_LEARNER, "a checkpoint is gone"),
    # The learner at work.
    "learner.admit.before": Place(_LEARNER, "an unroll has come and is not journaled"),
    "learner.admit.after": Place(_LEARNER, "an unroll was journaled and folded; nothing is durable"),
    "learner.acknowledge.before": Place(_LEARNER, "an answer is durable and its sender was not told"),
    "learner.acknowledge.after": Place(_LEARNER, "the sender of an unroll was told its answer"),
    "learner.credit.before": Place(_LEARNER, "a credit is owed and was not given"),
    "learner.credit.after": Place(_LEARNER, "a credit was given"),
    "learner.step.before": Place(_LEARNER, "an update is possible and was not begun"),
    "learner.update.half": Place(
        _LEARNER, "gradients of an update are there, weights have not moved", may_run_short=True
    ),
    "learner.step.after": Place(_LEARNER, "an update was made and not appended"),
    "learner.facts.before": Place(
        _LEARNER, "an update changed more than weights (a fallback, adapters) and was not appended"
    ),
    "learner.facts.after": Place(_LEARNER, "the update that did so was appended and is not durable"),
    "learner.judge.before": Place(_LEARNER, "the curriculum comes to a verdict that was not appended"),
    "learner.judge.after": Place(
        _LEARNER, "a verdict was appended and followed: the stage, and what is held of the old one"
    ),
    "learner.stage.before": Place(_LEARNER, "a verdict is durable and no actor was sent to its stage"),
    "learner.announce.before": Place(_LEARNER, "a version is durable and nobody was told of it"),
    "learner.announce.after": Place(_LEARNER, "a version was announced"),
    # Inside the recovery itself.
    "recovery.begin": Place(_LEARNER, "a later life has opened the journal"),
    "recovery.checkpoint.after": Place(_LEARNER, "a checkpoint was loaded"),
    "recovery.buffer.after": Place(_LEARNER, "the buffer was read again"),
    "recovery.fold.after": Place(_LEARNER, "a record of the tail was folded"),
    "recovery.recovered.before": Place(_LEARNER, "the state is reached and LearnerRecovered not appended"),
    "recovery.recovered.after": Place(_LEARNER, "LearnerRecovered is durable and nobody is served yet"),
    # Actors.
    "actor.weights.after": Place(_ACTOR, "a version was loaded"),
    "actor.unroll.after": Place(_ACTOR, "an unroll was made and not sent"),
    "actor.send.before": Place(_ACTOR, "an unroll is about to be sent"),
    "actor.send.after": Place(_ACTOR, "an unroll was sent and not answered"),
    "actor.acknowledged.after": Place(_ACTOR, "an acknowledgement has come"),
    # The supervisor.
    "supervisor.apply.before": Place(_SUPERVISOR, "events are durable and not applied"),
    "supervisor.effect.before": Place(_SUPERVISOR, "an effect is owed and was not begun"),
    "supervisor.effect.after": Place(_SUPERVISOR, "an effect was carried out"),
    "supervisor.noted.before": Place(_SUPERVISOR, "a child's last words are durable and it was not told"),
    "supervisor.resume.before": Place(_SUPERVISOR, "the first event of this life was not appended"),
    "supervisor.resume.after": Place(
        _SUPERVISOR, "the first event of this life is durable, no child was started"
    ),
}
"""Every point there is. A name that is passed nowhere, or a passage that is not named here, fails a test."""


class Fault(NamedTuple):
    """One planned death, or want of memory: the role, the point, and at which passage."""

    role: str
    point: str
    passage: int
    act: str = KILL

    @property
    def text(self) -> str:
        """As it stands in `SIMIC_FAULTS`."""
        behind = "" if self.act == KILL else f":{self.act}"
        return f"{self.role}:{self.point}:{self.passage}{behind}"


class _Armed:
    """The faults of this process, the next one first. Several threads pass points."""

    def __init__(self, directory: Path, faults: list[tuple[int, Fault]]) -> None:
        self.directory = directory
        self._faults = faults
        self._passages = 0
        self._lock = threading.Lock()

    def pass_by(self, name: str, last_act: Callable[[], None] | None) -> None:
        with self._lock:
            if not self._faults or self._faults[0][1].point != name:
                return
            number, fault = self._faults[0]
            self._passages += 1
            if self._passages < fault.passage:
                return
            try:
                os.close(os.open(fired(self.directory, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:  # another process of this role was faster
                self._faults, self._passages = self._faults[1:], 0
                return
            if fault.act == MEMORY:
                self._faults, self._passages = self._faults[1:], 0
                # The words by which torch says it of a CPU.
                raise RuntimeError(f"can't allocate memory: {FAULTS_VARIABLE} says so")
            try:
                if last_act is not None:
                    last_act()
            finally:  # whatever became of it: who has left the mark must die
                os.kill(os.getpid(), signal.SIGKILL)


_armed: _Armed | None = None


def parse(text: str) -> list[Fault]:
    """Read the value of `SIMIC_FAULTS`.

    Raises:
        ConfigError: An entry is not `role:point:passage`, there is no such point, that role never passes it, or memory
            cannot run out there.
    """
    faults = []
    for entry in filter(None, text.split(";")):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ConfigError(f"{FAULTS_VARIABLE} takes role:point:passage;…, not {entry!r}")
        role, name, act = match["role"], match["point"], match["act"] or KILL
        place = POINTS.get(name)
        if place is None:
            near = difflib.get_close_matches(name, POINTS) or sorted(POINTS)
            raise ConfigError(
                f"{FAULTS_VARIABLE} names {name!r}, which is no fault point; near are {', '.join(near)}"
            )
        if role not in place.roles:
            raise ConfigError(
                f"{FAULTS_VARIABLE}: no {role!r} ever passes {name}, only {' and '.join(sorted(place.roles))}"
            )
        if act == MEMORY and not place.may_run_short:
            raise ConfigError(f"{FAULTS_VARIABLE}: memory cannot be made to run out at {name}")
        faults.append(Fault(role, name, int(match["passage"]), act))
    return faults


def arm(role: str) -> None:
    """Arm the points of this process, if the environment says so; called once, first of all, by every process.

    Raises:
        ConfigError: `SIMIC_FAULTS` cannot be read, or `SIMIC_FAULTS_DIR` names no directory.
    """
    global _armed  # noqa: PLW0603 - one per process, like the environment it comes from
    text, directory = os.environ.get(FAULTS_VARIABLE, ""), os.environ.get(DIRECTORY_VARIABLE, "")
    if not text and not directory:
        return
    path = Path(directory)
    if not directory or not path.is_dir():
        raise ConfigError(
            f"{FAULTS_VARIABLE} needs {DIRECTORY_VARIABLE} to name a directory, not {directory!r}"
        )
    mine = [
        (number, fault)
        for number, fault in enumerate(parse(text))
        if fault.role == role and not fired(path, number).exists()
    ]
    _armed = _Armed(path, mine)


def point(name: str, last_act: Callable[[], None] | None = None) -> None:
    """A place to die at, when armed.

    Args:
        name: One of `POINTS`.
        last_act: Done only by a process that dies here, and just before: it tears what the point is about.
    """
    if _armed is not None:
        _armed.pass_by(name, last_act)


def witness(promise: str) -> None:
    """Note what was promised to this process, in a file of its own that outlives it; nothing unless armed."""
    if _armed is None:
        return
    with (_armed.directory / f"witness-{os.getpid()}.txt").open("a", encoding="utf-8") as file:
        file.write(promise + "\n")


def fired(directory: Path, number: int) -> Path:
    """The file that the `number`-th fault of the list leaves when it fires; its time is the time of death."""
    return directory / f"fired-{number:03d}"
