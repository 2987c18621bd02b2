"""What stands in a journal's files, and how to tell a torn tail from damage.

`docs/journal-format.md` says the same for writers of readers in other languages.

Theory of operation. A segment file is a header and then *items*, each `length u32, CRC32C u32, body`. An item is a
record, or (top bit of the length set) a *mark*: "all records below this position are durable", written after every
successful sync. Marks are what tells a torn tail from damage:

* A crash can only tear what was never synced, and that is at the very end of the last segment.
* So an unreadable item in a segment that has a successor is damage: successors are made after a sync.
* An unreadable item in the last segment is damage if a whole mark behind it speaks of a higher position (what it
  names was durable once), and a torn tail if there is none. Nobody acknowledges a record before its mark is written.
* What no format can tell apart: damage to the *last* items when power failed before their mark reached the disk.

A mark holds its own file offset, so a journal's bytes kept as some record's payload are not mistaken for marks.

Reading beside a living writer is safe because a file grows only at its end and the size is read before the bytes: the
end of what is whole is the end of the journal for now. That is also why a listing of the directory that shows a
successor must be *older* than the reading that is judged by it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import google_crc32c
import msgspec
import xxhash

from esper_simic.errors import ContractError, InvariantViolation, UnavailableError

MAGIC: Final = b"SIMICLOG"
FORMAT_VERSION: Final = 1
NO_DIGEST: Final = bytes(16)
"""In place of the previous segment's digest in the first segment."""

PREVIOUS_DIGEST_OFFSET: Final = 24
"""Where a segment's header holds the digest of the segment before it."""

RECORD_BYTES_MAX: Final = 1 << 30
"""Limit on an item's body; a longer length is unreadable."""
KIND_BYTES_MAX: Final = 255
FRAMES_MAX: Final = 65_535

_SEGMENT: Final = struct.Struct("<8sIIQ16sHH")
_PREFIX: Final = struct.Struct("<II")
_RECORD: Final = struct.Struct("<QQHHI")
_MARK: Final = struct.Struct("<8sQQ")
_CRC: Final = struct.Struct("<I")
_CONTROL: Final = 0x8000_0000
_MARK_TAG: Final = b"DURABLE\0"
_MARK_LENGTH: Final = _CONTROL | _MARK.size
_SEGMENT_HEADER_BYTES_MAX: Final = _SEGMENT.size + 2 * 65_535 + _CRC.size
_NAME: Final = re.compile(r"\d{20}\.log")
_BLOCK_BYTES: Final = 1 << 18

HeaderT = TypeVar("HeaderT")


class JournalDamage(InvariantViolation):
    """Bytes that were durable are not what was written.

    Args:
        segment: The segment file.
        offset: Offset in bytes of the item (or of the header field) that cannot be read.
        reason: What is wrong there.
    """

    def __init__(self, segment: Path, offset: int, reason: str) -> None:
        super().__init__(f"journal segment {segment} is damaged at byte {offset}: {reason}")
        self.segment = segment
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TornTail:
    """The end of the last segment that no whole record covers: the trace of a crash in the middle of a write."""

    segment: Path
    offset: int
    bytes_removed: int


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The first bytes of a segment file."""

    owner: str
    run_id: str
    first_position: int
    previous_digest: bytes
    """XXH3-128 of the whole previous segment file, big-endian as its canonical form; zeros in the first segment."""


@dataclass(frozen=True)
class Record:
    """One fact of a journal, as it was appended."""

    position: int
    time_ns: int
    """Nanoseconds since 1970-01-01 UTC on the writer's wall clock, at append."""
    kind: str
    header_bytes: bytes
    """The header as it stands in the file: one MessagePack map."""
    frames: tuple[memoryview, ...]
    """The raw frames, read-only, byte for byte as appended."""

    @cached_property
    def header(self) -> dict[str, Any]:
        """The header as plain values, decoded at first use: walking over records costs no decoding."""
        decoded: dict[str, Any] = msgspec.msgpack.decode(self.header_bytes)
        return decoded

    def header_as(self, kind_type: type[HeaderT]) -> HeaderT:
        """The header decoded straight into a typed value.

        Raises:
            ContractError: The header does not fit the type.
        """
        try:
            return msgspec.msgpack.decode(self.header_bytes, type=kind_type)
        except msgspec.ValidationError as error:
            raise ContractError(
                f"record {self.position} ({self.kind}) is no {kind_type.__name__}: {error}"
            ) from error


def segment_name(first_position: int) -> str:
    """File name of the segment that begins with a position: names sort as positions do."""
    return f"{first_position:020d}.log"


def segment_paths(directory: Path) -> list[Path]:
    """The segment files of a journal, oldest first.

    Raises:
        UnavailableError: There is no such directory.
    """
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names alone: a live reader lists at every poll
    except OSError as error:
        raise UnavailableError(
            f"cannot read the journal {directory}: {os.strerror(error.errno or 0)}"
        ) from error
    return [directory / name for name in sorted(filter(_NAME.fullmatch, names))]


def file_digest(path: Path, bytes_max: int | None = None) -> xxhash.xxh3_128:
    """XXH3-128 of a file's first `bytes_max` bytes (of all of them if None), ready to take more."""
    digest = xxhash.xxh3_128()
    remaining = path.stat().st_size if bytes_max is None else bytes_max
    with path.open("rb", buffering=0) as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
    return digest


def encode_segment_header(header: SegmentHeader) -> bytes:
    """The bytes a segment file begins with.

    Raises:
        ContractError: Owner or run id is empty or longer than 65,535 bytes of UTF-8.
    """
    owner, run_id = header.owner.encode(), header.run_id.encode()
    for name, text in (("owner", owner), ("run_id", run_id)):
        if not 0 < len(text) <= 65_535:
            raise ContractError(f"a journal's {name} takes 1 to 65535 bytes of UTF-8, not {len(text)}")
    length = _SEGMENT.size + len(owner) + len(run_id) + _CRC.size
    start = _SEGMENT.pack(
        MAGIC, FORMAT_VERSION, length, header.first_position, header.previous_digest, len(owner), len(run_id)
    )
    checked = start + owner + run_id
    return checked + _CRC.pack(google_crc32c.value(checked))


def encode_record(
    position: int, time_ns: int, kind: bytes, header: bytes, frames: Sequence[bytes]
) -> list[bytes]:
    """The bytes of one record, the frames uncopied.

    Returns:
        Buffers to write one after the other: everything before the frames, then the frames.
    """
    sizes = [len(frame) for frame in frames]
    start = b"".join(
        (
            _RECORD.pack(position, time_ns, len(kind), len(frames), len(header)),
            kind,
            struct.pack(f"<{len(sizes)}I", *sizes),
            header,
        )
    )
    length = len(start) + sum(sizes)
    checksum = _checksum(length, start)
    for frame in frames:
        checksum = google_crc32c.extend(checksum, frame)
    return [_PREFIX.pack(length, checksum) + start, *frames]


def record_bytes(kind: bytes, header: bytes, frames: Sequence[bytes]) -> int:
    """How many bytes `encode_record` will take in the file."""
    fixed = _PREFIX.size + _RECORD.size
    return fixed + len(kind) + len(header) + sum(4 + len(frame) for frame in frames)


def encode_mark(position: int, offset: int) -> bytes:
    """A mark at a file offset: all records below `position` are durable."""
    body = _MARK.pack(_MARK_TAG, position, offset)
    return _PREFIX.pack(_MARK_LENGTH, _checksum(_MARK_LENGTH, body)) + body


def _checksum(length: int, body: bytes) -> int:
    """CRC32C of an item's length field and body: a flip of the field's top bit alone would pass as another item."""
    checksum: int = google_crc32c.extend(google_crc32c.value(length.to_bytes(4, "little")), body)
    return checksum


class _UnreadableError(Exception):
    """An item that is not whole or not right; the cursor judges whether that is a tail or damage."""


class SegmentCursor:
    """Walks over one segment, checking every byte of it.

    Args:
        path: The segment file.

    Raises:
        JournalDamage: The header is not right. A segment gets its name only when its header is synced, so no crash
            explains a header that is short.
        ContractError: The file is of a newer format version.
        UnavailableError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._block = b""
        self._block_offset = 0
        self._size = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(f"cannot open {path}: {os.strerror(error.errno or 0)}") from error
        try:
            self.header, self.offset = self._read_header()
        except BaseException:
            self.close()
            raise
        self.position = self.header.first_position
        """Position of the next record, and the number of the first one not seen."""
        self.marked_position = self.position
        """All records below it are known to have been durable once."""

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def next(self, *, is_closed: bool) -> Record | None:
        """The next record, or None at the end of what is whole.

        Args:
            is_closed: Whether a successor of this segment was seen *before* this call: then every byte must be right.

        Returns:
            The record, or None. None may be followed by a record later, when the writer has gone on.

        Raises:
            JournalDamage: Something that was durable cannot be read. The cursor stays before it.
        """
        suspect_size = -1
        while True:
            if self.offset >= self._size:
                self._refresh()
                if self.offset == self._size:
                    return None
            try:
                length, body = self._item()
                record = None if length & _CONTROL else self._decode(body)
                if record is None:
                    self._take_control(body)
            except _UnreadableError as unreadable:
                self._refresh()
                if self._size != suspect_size:
                    # It may have been half-written just then: read it again, and judge only what stays unreadable.
                    suspect_size = self._size
                    continue
                self._judge(str(unreadable), is_closed=is_closed)
                return None
            self.offset += _PREFIX.size + len(body)
            if record is not None:
                self.position += 1
                return record

    def records(self, *, is_closed: bool) -> Iterator[Record]:
        """All records from here to the end of what is whole."""
        while (record := self.next(is_closed=is_closed)) is not None:
            yield record

    def tail_bytes(self) -> int:
        """Bytes behind the last whole item, as the file is now."""
        return os.fstat(self._descriptor).st_size - self.offset

    def _refresh(self) -> None:
        """Read the file's size again. A tail that was read may have been cut off and written anew: forget it."""
        self._size = os.fstat(self._descriptor).st_size
        self._block = b""
        if self._size < self.offset:
            raise JournalDamage(
                self.path, self._size, f"the file ends before byte {self.offset}, read before"
            )

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise UnavailableError(
                f"cannot read {self.path} at byte {offset}: {os.strerror(error.errno or 0)}"
            ) from error

    def _bytes(self, offset: int, count: int) -> bytes:
        start = offset - self._block_offset
        if not 0 <= start <= len(self._block) - count:
            self._block = self._pread(max(count, _BLOCK_BYTES), offset)
            self._block_offset, start = offset, 0
        return self._block[start : start + count]

    def _read_header(self) -> tuple[SegmentHeader, int]:
        block = self._pread(_SEGMENT_HEADER_BYTES_MAX, 0)
        if len(block) < _SEGMENT.size or not block.startswith(MAGIC):
            raise JournalDamage(self.path, 0, "this is not the header of a segment")
        _, version, length, first, digest, owner_bytes, run_id_bytes = _SEGMENT.unpack_from(block)
        checked = block[: max(length - _CRC.size, 0)]
        if len(block) < length or block[len(checked) : length] != _CRC.pack(google_crc32c.value(checked)):
            raise JournalDamage(self.path, 0, "the header's checksum does not fit")
        if version != FORMAT_VERSION:
            raise ContractError(
                f"{self.path} has format version {version}, this program reads {FORMAT_VERSION}: use a newer one"
            )
        if self.path.name != segment_name(first):
            raise JournalDamage(self.path, 16, f"the header says that position {first} is the first one here")
        texts = checked[_SEGMENT.size :]
        if len(texts) != owner_bytes + run_id_bytes:
            raise JournalDamage(self.path, 40, "owner and run id do not fill the header")
        return SegmentHeader(
            texts[:owner_bytes].decode(), texts[owner_bytes:].decode(), first, digest
        ), length

    def _item(self) -> tuple[int, bytes]:
        """Length field and body of the item at the cursor, its checksum verified."""
        room = self._size - self.offset - _PREFIX.size
        if room < 0:
            raise _UnreadableError(f"{room + _PREFIX.size} bytes are no whole record")
        length, checksum = _PREFIX.unpack(self._bytes(self.offset, _PREFIX.size))
        count = length & ~_CONTROL
        if count > min(room, RECORD_BYTES_MAX):
            raise _UnreadableError(f"a record of {count} bytes does not fit the {room} bytes that follow")
        body = self._bytes(self.offset + _PREFIX.size, count)
        if _checksum(length, body) != checksum:
            raise _UnreadableError(f"the checksum of {count} bytes does not fit (position {self.position})")
        return length, body

    def _decode(self, body: bytes) -> Record:
        if len(body) < _RECORD.size:
            raise _UnreadableError(f"{len(body)} bytes are too few for a record")
        position, time_ns, kind_bytes, frame_count, header_bytes = _RECORD.unpack_from(body)
        if position != self.position:
            raise _UnreadableError(f"position {position} stands where {self.position} belongs")
        sizes_at = _RECORD.size + kind_bytes
        header_at = sizes_at + 4 * frame_count
        if header_at + header_bytes > len(body):
            raise _UnreadableError(f"the parts of record {position} are longer than the record")
        sizes = struct.unpack_from(f"<{frame_count}I", body, sizes_at)
        at = header_at + header_bytes
        if at + sum(sizes) != len(body):
            raise _UnreadableError(f"the parts of record {position} do not fill it")
        view, frames = memoryview(body), []
        for size in sizes:
            frames.append(view[at : at + size])
            at += size
        kind = body[_RECORD.size : sizes_at].decode()
        return Record(position, time_ns, kind, body[header_at : header_at + header_bytes], tuple(frames))

    def _take_control(self, body: bytes) -> None:
        """Obey a mark; pass over control items of kinds that a later version may add."""
        if not body.startswith(_MARK_TAG):
            return
        if len(body) != _MARK.size or _MARK.unpack(body)[1:] != (self.position, self.offset):
            raise _UnreadableError(f"a mark that belongs elsewhere stands before position {self.position}")
        self.marked_position = self.position

    def _judge(self, reason: str, *, is_closed: bool) -> None:
        if is_closed:
            raise JournalDamage(self.path, self.offset, f"{reason}, and a later segment follows")
        if (proven := self._marked_behind()) > self.position:
            raise JournalDamage(
                self.path, self.offset, f"{reason}, and positions below {proven} were durable"
            )

    def _marked_behind(self) -> int:
        """The highest position that a whole mark behind the cursor names; 0 if there is none."""
        tail = self._pread(self._size - self.offset, self.offset)
        highest, at = 0, tail.find(_MARK_TAG)
        while at >= 0:
            start = at - _PREFIX.size
            if start >= 0 and at + _MARK.size <= len(tail):
                position = _MARK.unpack_from(tail, at)[1]
                if tail[start : at + _MARK.size] == encode_mark(position, self.offset + start):
                    highest = max(highest, position)
            at = tail.find(_MARK_TAG, at + 1)
        return highest
