"""What a journal holds from a position on, read once before it is replayed: how much there is, and where it breaks off.

Where a learner recovered inexactly, the state it went on with is not the fold of what stands before (see
`LearnerRecovered`). Such a *gap* begins with the record that was quarantined, or with the recovery, and is crossed
through the first checkpoint after it that is still on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from esper_simic.events import (
    CheckpointSaved,
    FingerprintChanged,
    LearnerRecovered,
    LearnerStepped,
    RecordQuarantined,
    StepFailed,
    StepSkipped,
)
from supervisor import checkpoints
from supervisor.journal import JournalDamage, Record, read


class OnDisk(NamedTuple):
    """A checkpoint that is there: where, and of which state."""

    directory: Path
    position: int
    """Journal position of the event that staged it; the state is that of all records before."""
    step: int
    fingerprint: dict[str, str]


class Gap(NamedTuple):
    """Records that cannot be folded as the learner folded them, and where it can go on."""

    first_position: int
    recovered_at: int
    reason: str
    resumes: tuple[OnDisk, ...]
    """The checkpoints on disk behind it, in the order of the journal."""


@dataclass(slots=True)
class Survey:
    """A journal from a position on."""

    first_position: int
    last_step: int = 0
    """The last step there is, made, failed or skipped."""
    metrics: set[str] = field(default_factory=set)
    """Names of all metrics of all steps."""
    gaps: list[Gap] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """Checkpoints that the journal says were saved: their names, and positions of their states."""
    on_disk: list[OnDisk] = field(default_factory=list)
    """Those of them that are there, by position."""
    is_damaged: bool = False
    """Whether it ends with damage; whoever reads it again will meet it."""


@dataclass(slots=True)
class _Breaks:
    """What makes gaps, as the walk finds it."""

    quarantined: list[int] = field(default_factory=list)
    recoveries: list[tuple[int, str, list[int]]] = field(default_factory=list)
    """Inexact ones: position, reason, and the records quarantined before."""
    fingerprint_changed_at: int = -1


def survey(journal: Path, checkpoints_directory: Path, run_id: str, first_position: int) -> Survey:
    """Walk over a journal once, as far as it can be read.

    Raises:
        ContractError: A record is not what its kind says.
    """
    found, breaks = Survey(first_position), _Breaks()
    try:
        for record in read(journal, first_position):
            _take(record, found, breaks)
    except JournalDamage:
        found.is_damaged = True
    present = list_on_disk(checkpoints_directory, run_id)
    found.on_disk = [one for one in present if found.saved.get(one.directory.name) == one.position]
    found.gaps = _gaps(breaks, found)
    return found


def list_on_disk(checkpoints_directory: Path, run_id: str) -> list[OnDisk]:
    """Checkpoints of this run with a readable manifest, in the order of the journal."""
    listed = checkpoints.list_checkpoints(checkpoints_directory)
    found = [
        OnDisk(one.path, one.manifest.journal_position, one.manifest.step, dict(one.manifest.fingerprint))
        for one in listed
        if isinstance(one, checkpoints.GoodCheckpoint) and one.manifest.run_id == run_id
    ]
    return sorted(found, key=lambda one: (one.position, one.directory.name))


def _take(record: Record, found: Survey, breaks: _Breaks) -> None:
    match record.kind:
        case LearnerStepped.__name__:
            stepped = record.header_as(LearnerStepped)
            found.last_step = stepped.step
            found.metrics.update(stepped.metrics)
        case StepFailed.__name__:
            found.last_step = record.header_as(StepFailed).step
        case StepSkipped.__name__:
            found.last_step = record.header_as(StepSkipped).step
        case CheckpointSaved.__name__:
            saved = record.header_as(CheckpointSaved)
            found.saved[saved.directory] = record.position if saved.staged_at < 0 else saved.staged_at
        case RecordQuarantined.__name__:
            breaks.quarantined.append(record.header_as(RecordQuarantined).position)
        case FingerprintChanged.__name__:
            breaks.fingerprint_changed_at = record.position
        case LearnerRecovered.__name__:
            if not record.header_as(LearnerRecovered).is_exact:
                quarantined = [p for p in breaks.quarantined if p >= found.first_position]
                reason = _reason(quarantined, breaks.fingerprint_changed_at == record.position - 1)
                breaks.recoveries.append((record.position, reason, quarantined))
            breaks.quarantined = []
        case _:
            pass


def _reason(quarantined: list[int], is_fingerprint_changed: bool) -> str:
    if quarantined:
        return f"record {min(quarantined)} was quarantined"
    if is_fingerprint_changed:
        return "the learner recovered under another fingerprint"
    return "the learner recovered to another state than the one it had"


def _gaps(breaks: _Breaks, found: Survey) -> list[Gap]:
    gaps: list[Gap] = []
    for recovered_at, reason, quarantined in breaks.recoveries:
        resumed_at = found.first_position
        if gaps:
            before = gaps[-1].resumes
            if not before or before[0].position > recovered_at:
                continue  # inside the gap before
            resumed_at = before[0].position
        within = [position for position in quarantined if position >= resumed_at]
        first = min([recovered_at, *within])
        resumes = tuple(one for one in found.on_disk if one.position > recovered_at)
        gaps.append(Gap(first, recovered_at, reason, resumes))
    return gaps
