"""What witnesses and journals say of a run that was killed, held against each other.

A witness is an actor: it notes in a file what it was told (`faults.witness`), and the file outlives it. What it noted
up to a death was promised before that death, so it must be true of everything that comes after.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from esper_simic.errors import UnavailableError
from esper_simic.events import (
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerRecovered,
    LearnerStepped,
    StepFailed,
    StepSkipped,
)
from supervisor.events import ChildExited
from supervisor.journal import read

ADMITTED: Final = ExperienceAdmitted.__name__
REFUSED: Final = ExperienceRefused.__name__
STEPPED: Final = LearnerStepped.__name__
FAILED: Final = StepFailed.__name__
SKIPPED: Final = StepSkipped.__name__
RECOVERED: Final = LearnerRecovered.__name__


class Promise(NamedTuple):
    """An acknowledgement as an actor heard it."""

    actor: int
    incarnation: int
    sequence: int
    position: int


class Heard(NamedTuple):
    """All that actors had noted at one moment."""

    promises: frozenset[Promise] = frozenset()
    versions: frozenset[int] = frozenset()
    """Versions of the weights that they were given."""


class Death(NamedTuple):
    """The end of one process, and what had been heard until then."""

    role: str
    at_ns: int
    heard: Heard


class Noted(NamedTuple):
    """One record of a journal without its frames."""

    position: int
    time_ns: int
    kind: str
    header: dict[str, Any]

    @property
    def sender(self) -> tuple[int, int, int]:
        """Actor, incarnation and sequence of an unroll."""
        return self.header["actor"], self.header["incarnation"], self.header["sequence"]


class Evidence(NamedTuple):
    """What is wrong, if anything is."""

    promises: frozenset[Promise]
    lost: frozenset[Promise]
    """Acknowledged, and not in the journal at that position."""
    duplicated: list[Noted]
    """Second admissions of an unroll."""
    versions_lost: list[int]
    """Given to an actor, and either not in the journal, or not reached by a recovery after that."""
    steps_broken: list[int]
    """Updates whose number does not follow the one before."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.duplicated or self.versions_lost or self.steps_broken)


def hear(notes: Path) -> Heard:
    """What actors noted so far; the last line of a witness that died may be half a line, which says nothing."""
    promises, versions = set(), set()
    for note in sorted(notes.glob("witness-*.txt")):
        for line in note.read_text("utf-8").splitlines(keepends=True):
            kind, *numbers = line.split()
            if not line.endswith("\n"):
                continue
            if kind == "acknowledged":
                promises.add(Promise(*map(int, numbers)))
            elif kind == "version":
                versions.add(int(numbers[0]))
    return Heard(frozenset(promises), frozenset(versions))


def history(run_dir: Path, owner: str = "learner-0") -> list[Noted]:
    """A whole journal without its frames; empty where there is none yet.

    Raises:
        JournalDamage: It cannot be read.
    """
    journal = run_dir / "journal" / owner
    records = read(journal) if journal.is_dir() else ()
    return [Noted(record.position, record.time_ns, record.kind, record.header) for record in records]


def examine(
    noted: Sequence[Noted], heard: Heard, deaths: Iterable[Death] = (), *, lockstep: bool = False
) -> Evidence:
    """Hold what was promised against what the learner's journal has.

    Args:
        noted: The learner's journal.
        heard: What its actors were promised in all.
        deaths: What had been promised when a process died.
        lockstep: A sequence number then names an unroll over all lives of its actor.
    """
    senders = {one.position: one.sender for one in noted if one.kind in (ADMITTED, REFUSED)}
    steps = [one.header["step"] for one in noted if one.kind in (STEPPED, FAILED, SKIPPED)]
    versions_lost = heard.versions - {0, *steps}
    for death in deaths:
        recovered = recovery_after(noted, death)
        if recovered is not None:
            versions_lost |= {
                version for version in death.heard.versions if version > recovered.header["step"]
            }
    return Evidence(
        promises=heard.promises,
        lost=frozenset(one for one in heard.promises if senders.get(one.position) != one[:3]),
        duplicated=_second_admissions(noted, lockstep=lockstep),
        versions_lost=sorted(versions_lost),
        steps_broken=[step for number, step in enumerate(steps, 1) if step != number],
    )


def _second_admissions(noted: Sequence[Noted], *, lockstep: bool) -> list[Noted]:
    taken: Counter[tuple[int, ...]] = Counter()
    found = []
    for one in noted:
        if one.kind != ADMITTED:
            continue
        actor, incarnation, sequence = one.sender
        who = (actor, sequence) if lockstep else (actor, incarnation, sequence)
        taken[who] += 1
        if taken[who] > 1:
            found.append(one)
    return found


def recovery_after(noted: Iterable[Noted], death: Death) -> Noted | None:
    """The learner's first recovery after a death that ended it; an actor's end makes none necessary."""
    if death.role == "actor":
        return None
    return next((one for one in noted if one.kind == RECOVERED and one.time_ns > death.at_ns), None)


def training_after(
    noted: Sequence[Noted], supervisors: Iterable[Noted], role: str, died_at_ns: int
) -> Noted | None:
    """What shows that training goes on after a death: an update, or of an actor the first unroll of its next life.

    Args:
        noted: The learner's journal.
        supervisors: The supervisor's journal, which tells which actor it was.
        role: Whose death.
        died_at_ns: When.
    """
    if role != "actor":
        return next((one for one in noted if one.kind == STEPPED and one.time_ns > died_at_ns), None)
    gone = next(
        (
            one.header
            for one in supervisors
            if one.kind == ChildExited.__name__ and one.header["role"] == role and one.time_ns > died_at_ns
        ),
        None,
    )
    if gone is None:
        return None
    for one in noted:
        if one.kind == ADMITTED and one.time_ns > died_at_ns:
            actor, incarnation, _ = one.sender
            if actor == gone["index"] and incarnation > gone["incarnation"]:
                return one
    return None


def replayed(run_dir: Path) -> dict[str, Any]:
    """Fold the learner's journal from its first record in a process of its own; the report of `replay --json`.

    Raises:
        UnavailableError: It cannot be folded at all.
    """
    command = [sys.executable, "-P", "-m", "supervisor.cli", "replay", str(run_dir), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    try:
        report: dict[str, Any] = msgspec.json.decode(done.stdout)
    except msgspec.DecodeError:
        raise UnavailableError(f"{run_dir} cannot be replayed: {done.stderr.strip()[-500:]}") from None
    return report


def equal_until(report: dict[str, Any], noted: Sequence[Noted]) -> int:
    """Position below which every digest in the journal is that of the fold from the start.

    Not one digest may have been passed over: a crossing or a comparison within a tolerance ends the proof there.
    """
    if report["divergence"] is not None:
        return int(report["divergence"]["position"])
    if report["crossings"]:
        return int(report["crossings"][0]["position"])
    steps = sum(one.kind in (STEPPED, FAILED) for one in noted)
    states = sum(one.kind == RECOVERED for one in noted)
    is_whole = report["outcome"] == "equal" and report["next_position"] == len(noted)
    if is_whole and report["steps_by_digest"] == steps and report["states_equal"] >= states:
        return len(noted)
    return 0
