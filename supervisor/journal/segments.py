"""The file side of a journal's writer: which bytes go where, and when they are durable.

Only one thread at a time may call it: the one that opens the journal, then the flusher. It is also the one place
that makes a journal's files grow or shrink.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from esper_simic.errors import ConfigError
from supervisor import faults
from supervisor.files import DISK_FULL, fsync_directory, write_atomically
from supervisor.journal.format import (
    NO_DIGEST,
    PREVIOUS_DIGEST_OFFSET,
    JournalDamage,
    SegmentCursor,
    SegmentHeader,
    TornTail,
    encode_mark,
    encode_record,
    encode_segment_header,
    file_digest,
    segment_name,
    segment_paths,
)

_BUFFERS_MAX: Final = 1024  # IOV_MAX of Linux
_JOIN_BYTES_MAX: Final = 1 << 14  # below it a copy costs less than an entry of its own in the write


class Appended(NamedTuple):
    """One record on its way to the disk."""

    position: int
    time_ns: int
    kind: bytes
    header: bytes
    frames: tuple[bytes, ...]


class SegmentWriter:
    """Opens the newest segment, repairs its tail, and writes on.

    Opening checks the last segment and the one before it, byte for byte; older ones are checked when they are read.

    Args:
        directory: The journal's directory, locked by the caller.
        owner: Who writes; must be the owner named in an existing journal.
        run_id: The run; must be the run named in an existing journal.
        segment_bytes_max: A record that would take a segment past this size begins the next one; a longer record has
            a segment for itself.
        make_room: Asked when a write meets a full disk: frees what it can and says whether it freed anything. The
            write then goes on where it stopped, so the file never shrinks under a reader. A *sync* that fails is final
            in any case: which pages were dropped nobody knows.

    Raises:
        ConfigError: The directory holds another owner's or another run's journal.
        JournalDamage: Damage in one of the two newest segments.
        OSError: The disk refused.
    """

    def __init__(
        self,
        directory: Path,
        owner: str,
        run_id: str,
        segment_bytes_max: int,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self._directory = directory
        self._make_room = make_room
        self._owner = owner
        self._run_id = run_id
        self._segment_bytes_max = segment_bytes_max
        self._descriptor = -1
        self._first_position = 0
        self._digest = xxhash.xxh3_128()
        self.recovered: TornTail | None = None
        self.path = directory
        self.position = 0
        """Position of the next record to write."""
        self.offset = 0
        """Bytes of the current segment that were written."""
        for leftover in directory.glob(".*.log.tmp"):
            leftover.unlink()
        paths = segment_paths(directory)
        if not paths:
            self._make_segment(0, NO_DIGEST)
            return
        try:
            self._open_last(paths)
        except BaseException:
            self.close()
            raise

    def write(self, batch: Sequence[Appended]) -> None:
        """Write records and make them durable.

        Raises:
            OSError: The disk refused. How much of the batch is durable is not known; only a new opening can tell.
        """
        faults.point("journal.write.before")
        buffers: list[bytes] = []
        size = 0
        for entry in batch:
            parts = encode_record(*entry)
            part_bytes = sum(map(len, parts))
            if (
                self.offset + size + part_bytes > self._segment_bytes_max
                and entry.position > self._first_position
            ):
                self._write_all(buffers)
                os.fdatasync(self._descriptor)
                faults.point("journal.segment.before")
                os.close(self._descriptor)
                self._descriptor = -1
                self._make_segment(entry.position, self._digest.digest())
                faults.point("journal.segment.after")
                buffers, size = [], 0
            buffers += parts
            size += part_bytes
            self.position = entry.position + 1
        faults.point("journal.write.half", lambda: self._write_all([b"".join(buffers)[: -part_bytes // 2]]))
        self._write_all(buffers)
        faults.point("journal.sync.before")
        os.fdatasync(self._descriptor)
        faults.point("journal.sync.after")

    def mark(self) -> None:
        """Note in the file that all written so far is durable. The note itself is not synced; the next sync takes it.

        Raises:
            OSError: The disk refused; what was durable stays so.
        """
        self._write_all([encode_mark(self.position, self.offset)])
        faults.point("journal.mark.after")

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def sync(self) -> None:
        """Make the last mark durable too.

        Raises:
            OSError: The disk refused; what was durable stays so.
        """
        os.fdatasync(self._descriptor)

    def _make_segment(self, first_position: int, previous_digest: bytes) -> None:
        """Give the next segment its name only when its header is durable, and make the name durable."""
        header = encode_segment_header(
            SegmentHeader(self._owner, self._run_id, first_position, previous_digest)
        )
        path = self._directory / segment_name(first_position)
        try:
            write_atomically(path, header)
        except OSError as error:
            # A name without a synced directory cannot be taken back; nothing else of the attempt is left.
            if error.errno not in DISK_FULL or path.exists() or not self._make_room():
                raise
            write_atomically(path, header)
        self._take(path, first_position, first_position, len(header))

    def _open_last(self, paths: Sequence[Path]) -> None:
        path = paths[-1]
        with SegmentCursor(path) as cursor:
            self._check_identity(cursor.header)
            self._check_predecessor(paths, cursor.header)
            for _ in cursor.records(is_closed=False):
                pass
            torn_bytes = cursor.tail_bytes()
            self._take(path, cursor.header.first_position, cursor.position, cursor.offset)
            is_marked = cursor.marked_position == cursor.position
        if torn_bytes:
            os.ftruncate(self._descriptor, self.offset)
            self.recovered = TornTail(path, self.offset, torn_bytes)
        # What a killed writer left in the page cache, bytes and name, may not be on the disk yet.
        os.fsync(self._descriptor)
        fsync_directory(self._directory)
        if not is_marked:
            self.mark()

    def _take(self, path: Path, first_position: int, position: int, offset: int) -> None:
        """Write on in a segment whose whole items end at `offset`."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.path = path
        self.position = position
        self.offset = offset
        self._first_position = first_position
        self._digest = file_digest(path, offset)

    def _check_identity(self, header: SegmentHeader) -> None:
        if (header.owner, header.run_id) != (self._owner, self._run_id):
            raise ConfigError(
                f"{self._directory} holds the journal of {header.owner!r} in run {header.run_id!r}, not of "
                f"{self._owner!r} in run {self._run_id!r}: choose another run directory"
            )

    def _check_predecessor(self, paths: Sequence[Path], header: SegmentHeader) -> None:
        """Read the segment before the last whole: the last one's header promises what it is."""
        if len(paths) < 2:
            return
        with SegmentCursor(paths[-2]) as before:
            for _ in before.records(is_closed=True):
                pass
            if before.position != header.first_position:
                raise JournalDamage(
                    before.path,
                    before.offset,
                    f"it ends before position {before.position}, {paths[-1].name} follows",
                )
        if file_digest(paths[-2]).digest() != header.previous_digest:
            raise JournalDamage(
                paths[-1], PREVIOUS_DIGEST_OFFSET, f"the digest of {paths[-2].name} is another one"
            )

    def _write_all(self, buffers: Sequence[bytes]) -> None:
        joined = _join_small(buffers)
        for buffer in joined:
            self._digest.update(buffer)
        remaining: list[bytes | memoryview] = [*joined]
        while remaining:
            try:
                written = os.writev(self._descriptor, remaining[:_BUFFERS_MAX])
            except OSError as error:
                if error.errno in DISK_FULL and self._make_room():
                    continue
                raise
            self.offset += written
            done = 0
            while done < len(remaining) and written >= len(remaining[done]):
                written -= len(remaining[done])
                done += 1
            del remaining[:done]
            if written:
                remaining[0] = memoryview(remaining[0])[written:]


def _join_small(buffers: Sequence[bytes]) -> list[bytes]:
    """The same bytes in fewer buffers: runs of small ones made one, large ones as they are, none empty."""
    joined: list[bytes] = []
    small: list[bytes] = []
    for buffer in buffers:
        if len(buffer) < _JOIN_BYTES_MAX:
            small.append(buffer)
            continue
        if small:
            joined.append(b"".join(small))
            small = []
        joined.append(buffer)
    if small and (rest := b"".join(small)):
        joined.append(rest)
    return joined
