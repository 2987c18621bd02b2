"""Checking a journal offline: every byte of it, its segments' order and their chain of digests.

Values only; how they look to a person is the command line's affair. A journal may be audited while it is written: a
record that is half-written at that moment then looks like a torn tail, and is one only if no writer lives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper_simic.errors import ContractError
from supervisor.journal import JournalDamage, TornTail
from supervisor.journal.format import (
    NO_DIGEST,
    PREVIOUS_DIGEST_OFFSET,
    SegmentCursor,
    SegmentHeader,
    file_digest,
    segment_name,
    segment_paths,
)


@dataclass(frozen=True, slots=True)
class Damage:
    """Where a journal is not what was written, and why we know."""

    segment: str
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """One segment file, read whole."""

    name: str
    first_position: int
    last_position: int | None
    """None while the segment has no record."""
    records: int
    bytes: int
    first_time_ns: int | None
    """Wall clock of the first record, nanoseconds since 1970-01-01 UTC."""
    last_time_ns: int | None
    kinds: Mapping[str, int]
    """How many records of each kind."""
    digest: str
    """XXH3-128 of the whole file in hexadecimal: what the next segment's header must say."""
    damage: Damage | None
    """The first damage in it; the figures above then cover what stands before."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a journal holds and whether all of it is right."""

    directory: str
    owner: str
    run_id: str
    segments: tuple[SegmentSummary, ...]
    records: int
    bytes: int
    torn_tail: TornTail | None
    """The half-written end of the last segment; the next writer cuts it off and nothing acknowledged is lost."""
    damage: tuple[Damage, ...]
    """In the order of the segments: at most one inside each, and one between two that do not fit."""

    @property
    def is_sound(self) -> bool:
        """Whether no damage was found. A torn tail is no damage."""
        return not self.damage


@dataclass(frozen=True, slots=True)
class _Examined:
    summary: SegmentSummary
    header: SegmentHeader | None
    end_position: int
    end_offset: int


def list_segments(directory: Path | str) -> tuple[SegmentSummary, ...]:
    """What each segment of a journal holds, oldest first. Reads them whole.

    Raises:
        UnavailableError: There is no such directory.
    """
    return tuple(examined.summary for examined in _examine_all(Path(directory)))


def verify(directory: Path | str) -> AuditReport:
    """Read a whole journal and report what is wrong with it.

    Checked are every checksum and position, that segments follow each other without a gap, that they name one owner
    and one run, and that each names the digest of the one before. The oldest segment must begin with position 0.

    Args:
        directory: The journal's directory.

    Returns:
        The report; damage is in it, not raised, and does not end the reading.

    Raises:
        UnavailableError: There is no such directory, or a file cannot be read.
    """
    directory = Path(directory)
    examined = _examine_all(directory)
    damage: list[Damage] = []
    for index, now in enumerate(examined):
        if index > 0:
            damage += _misfits(examined[index - 1], now)
        elif now.summary.first_position > 0:
            missing = (
                f"it is the oldest segment; positions 0 to {now.summary.first_position - 1} are missing: no "
                f"{segment_name(0)} stands here"
            )
            damage.append(Damage(now.summary.name, 0, missing))
        else:
            damage += _digest_misfit(now, NO_DIGEST, "no segment")
        if now.summary.damage is not None:
            damage.append(now.summary.damage)
    first = next((now.header for now in examined if now.header is not None), None)
    return AuditReport(
        directory=str(directory),
        owner=first.owner if first else "",
        run_id=first.run_id if first else "",
        segments=tuple(now.summary for now in examined),
        records=sum(now.summary.records for now in examined),
        bytes=sum(now.summary.bytes for now in examined),
        torn_tail=_torn_tail(directory, examined),
        damage=tuple(damage),
    )


def _examine_all(directory: Path) -> list[_Examined]:
    paths = segment_paths(directory)
    return [_examine(path, is_closed=path is not paths[-1]) for path in paths]


def _examine(path: Path, *, is_closed: bool) -> _Examined:
    header, damage = None, None
    size = path.stat().st_size  # before reading: what a living writer adds meanwhile is no torn tail
    kinds: Counter[str] = Counter()
    first_position = position = int(path.stem)
    offset = 0
    first_time_ns = last_time_ns = None
    try:
        with SegmentCursor(path) as cursor:
            header = cursor.header
            try:
                for record in cursor.records(is_closed=is_closed):
                    kinds[record.kind] += 1
                    first_time_ns = record.time_ns if first_time_ns is None else first_time_ns
                    last_time_ns = record.time_ns
            finally:
                position, offset = cursor.position, cursor.offset
    except JournalDamage as error:
        damage = Damage(path.name, error.offset, error.reason)
    except ContractError as error:
        damage = Damage(path.name, 0, str(error))
    size = max(size, offset)
    summary = SegmentSummary(
        name=path.name,
        first_position=first_position,
        last_position=position - 1 if position > first_position else None,
        records=position - first_position,
        bytes=size,
        first_time_ns=first_time_ns,
        last_time_ns=last_time_ns,
        kinds=dict(kinds),
        digest=file_digest(path, size).hexdigest(),
        damage=damage,
    )
    return _Examined(summary, header, position, offset)


def _misfits(before: _Examined, now: _Examined) -> list[Damage]:
    """What does not fit between a segment and its successor; nothing can be said across a damage."""
    if before.summary.damage is not None or before.header is None or now.header is None:
        return []
    if before.end_position != now.header.first_position:
        return [Damage(before.summary.name, before.end_offset, _gap(before, now.header.first_position, now))]
    if (before.header.owner, before.header.run_id) != (now.header.owner, now.header.run_id):
        return [Damage(now.summary.name, 0, f"another owner or run than {before.summary.name} names")]
    return _digest_misfit(now, bytes.fromhex(before.summary.digest), before.summary.name)


def _gap(before: _Examined, first_position: int, now: _Examined) -> str:
    """What stands between two segments that do not follow each other, by the names of both."""
    where = f"between {before.summary.name} and {now.summary.name}"
    if before.end_position > first_position:
        return f"{where} positions {first_position} to {before.end_position - 1} stand twice"
    return (
        f"{where} positions {before.end_position} to {first_position - 1} are missing: no "
        f"{segment_name(before.end_position)} stands here, or the end of {before.summary.name} was cut off"
    )


def _digest_misfit(now: _Examined, expected: bytes, whose: str) -> list[Damage]:
    if now.header is None or now.header.previous_digest == expected:
        return []
    reason = (
        f"the header names digest {now.header.previous_digest.hex()} before it; {whose} has {expected.hex()}"
    )
    return [Damage(now.summary.name, PREVIOUS_DIGEST_OFFSET, reason)]


def _torn_tail(directory: Path, examined: Sequence[_Examined]) -> TornTail | None:
    if not examined or examined[-1].summary.damage is not None:
        return None
    last = examined[-1]
    rest_bytes = last.summary.bytes - last.end_offset
    return TornTail(directory / last.summary.name, last.end_offset, rest_bytes) if rest_bytes > 0 else None
