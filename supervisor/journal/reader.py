"""Readers of a journal: from a position on, the newest of a kind, or following it while it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from supervisor.journal.format import JournalDamage, Record, SegmentCursor, segment_name, segment_paths


class Tail:
    """Follows a journal while it grows, across its segments.

    Args:
        directory: The journal's directory.
        start: Position of the first record to give; whole segments before it are not opened.
    """

    def __init__(self, directory: Path | str, start: int = 0) -> None:
        self.directory = Path(directory)
        self._start = start
        self._cursor: SegmentCursor | None = None
        self._newest_name = ""  # of all segments seen so far
        self._is_closed = False  # whether the cursor's segment was seen to have a successor

    @property
    def position(self) -> int:
        """Position of the next record that will be given."""
        return self._start if self._cursor is None else max(self._start, self._cursor.position)

    def poll(self, records_max: int = 1024) -> list[Record]:
        """The records that have come since, at most `records_max`; empty when there are none.

        They are whole, but the newest may not be durable yet: only the writer knows.

        Raises:
            JournalDamage: As `next`, but only once the records before the damage have been given.
            UnavailableError: There is no such directory.
        """
        records: list[Record] = []
        while len(records) < records_max:
            try:
                record = self.next()
            except JournalDamage:
                if records:
                    return records
                raise
            if record is None:
                break
            records.append(record)
        return records

    def next(self) -> Record | None:
        """The next record, or None when the last whole one has been given.

        Raises:
            JournalDamage: A record that was durable cannot be read, or `start` is below the oldest segment.
            UnavailableError: There is no such directory.
        """
        while True:
            cursor = self._cursor or self._open_first()
            if cursor is None:
                return None
            record = cursor.next(is_closed=self._is_closed)
            if record is not None:
                if record.position >= self._start:
                    return record
            elif self._is_closed:
                self._open_successor(cursor)
            else:
                # A successor that is seen only now: what the cursor has not read yet was written before it. Read that
                # too, strictly this time.
                self._list()
                self._is_closed = self._newest_name > cursor.path.name
                if not self._is_closed:
                    return None

    def _list(self) -> list[Path]:
        paths = segment_paths(self.directory)
        self._newest_name = paths[-1].name if paths else ""
        return paths

    def _open_first(self) -> SegmentCursor | None:
        paths = self._list()
        if not paths:
            return None
        before = [path for path in paths if path.name <= segment_name(self._start)]
        if not before:
            oldest = int(paths[0].stem)
            raise JournalDamage(
                paths[0],
                0,
                f"it is the oldest segment and begins with position {oldest}; {self._start} is missing",
            )
        self._cursor = SegmentCursor(before[-1])
        self._is_closed = before[-1] is not paths[-1]
        return self._cursor

    def _open_successor(self, cursor: SegmentCursor) -> None:
        path = self.directory / segment_name(cursor.position)
        # A segment that has lost all its records would be its own successor.
        if path.name == cursor.path.name or not path.exists():
            raise JournalDamage(
                cursor.path,
                cursor.offset,
                f"it ends before position {cursor.position}, and no later segment {path.name} follows",
            )
        self._cursor = SegmentCursor(path)
        self._is_closed = self._newest_name > path.name
        cursor.close()

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._cursor is not None:
            self._cursor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(directory: Path | str, start: int = 0) -> Iterator[Record]:
    """All records of a journal from a position on, oldest first; safe while it is written.

    Args:
        directory: The journal's directory.
        start: Position of the first record to give.

    Returns:
        An iterator that ends with the last whole record; a half-written tail is not an error.

    Raises:
        JournalDamage: Damage before that tail, named by segment and offset, after the records before it were given.
        UnavailableError: There is no such directory.
    """
    with Tail(directory, start) as tail:
        while (record := tail.next()) is not None:
            yield record


def read_last(
    directory: Path | str,
    kinds: Collection[str] | None = None,
    *,
    count: int = 1,
    segments_max: int | None = None,
) -> list[Record]:
    """The newest records of some kinds, found from the newest segment backwards.

    Args:
        directory: The journal's directory.
        kinds: The kinds wanted; None for any.
        count: How many records at most.
        segments_max: How many segments to look into at most; None for all. A kind that never occurred costs a reading
            of them all.

    Returns:
        Up to `count` records, oldest first.

    Raises:
        JournalDamage: Damage in a segment that was looked into.
        UnavailableError: There is no such directory.
    """
    paths = segment_paths(Path(directory))
    newest = paths[-1:]
    found: deque[Record] = deque()
    for path in list(reversed(paths))[:segments_max]:
        with SegmentCursor(path) as cursor:
            records = cursor.records(is_closed=path not in newest)
            wanted = (record for record in records if kinds is None or record.kind in kinds)
            found.extendleft(reversed(deque(wanted, maxlen=count - len(found))))
        if len(found) >= count:
            break
    return list(found)
