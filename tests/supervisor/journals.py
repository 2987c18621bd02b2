"""Journals for tests: filled ones, their bytes taken apart by length fields alone, and a reader of another hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
from hypothesis import strategies as st

from supervisor.journal import Journal, Record, read

MEMORY: Final = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where laws about bytes keep their thousands of journals: each sync of a disk would cost milliseconds."""


def open_journal(directory: Path, **options: Any) -> Journal:
    return Journal(directory, owner="learner-0", run_id="run-1", **options)


def as_appended(record: Record) -> tuple[int, str, dict[str, Any], list[bytes]]:
    """A record as the model has it."""
    return record.position, record.kind, record.header, [bytes(frame) for frame in record.frames]


def contents(directory: Path, start: int = 0) -> list[tuple[int, str, dict[str, Any], list[bytes]]]:
    return [as_appended(record) for record in read(directory, start)]


def fill(directory: Path, count: int, **options: Any) -> None:
    """Records 0 … count-1, each synced by itself."""
    with open_journal(directory, **options) as journal:
        for index in range(count):
            journal.append("Step", {"index": index}, [bytes([index]) * 20])
            journal.sync()


def items(path: Path) -> list[tuple[int, int]]:
    """Start and end of header and items, by the length fields alone."""
    data = path.read_bytes()
    spans, at = [(0, struct.unpack_from("<I", data, 12)[0])], struct.unpack_from("<I", data, 12)[0]
    while at < len(data):
        end = at + 8 + (struct.unpack_from("<I", data, at)[0] & 0x7FFFFFFF)
        spans.append((at, end))
        at = end
    return spans


# ---- an independent reader: docs/journal-format.md, struct and msgpack, nothing of ours ------------------------------


def crc32c(data: bytes) -> int:
    """The checksum bit by bit: Castagnoli's polynomial, reflected."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def read_independently(directory: Path) -> list[tuple[int, str, dict[str, Any], list[bytes]]]:
    records: list[tuple[int, str, dict[str, Any], list[bytes]]] = []
    for path in sorted(directory.glob("*.log")):
        data = path.read_bytes()
        magic, version, at, first, _digest, owner_bytes, run_bytes = struct.unpack_from("<8sIIQ16sHH", data)
        assert (magic, version, first) == (b"SIMICLOG", 1, int(path.stem))
        assert data[44 : 44 + owner_bytes + run_bytes].decode() == "learner-0run-1"
        assert struct.unpack_from("<I", data, at - 4)[0] == crc32c(data[: at - 4])
        while at < len(data):
            length, checksum = struct.unpack_from("<II", data, at)
            body = data[at + 8 : at + 8 + (length & 0x7FFFFFFF)]
            assert crc32c(data[at : at + 4] + body) == checksum
            if length & 0x80000000:
                assert struct.unpack("<8sQQ", body) == (b"DURABLE\0", len(records), at)
            else:
                position, _time_ns, kind_bytes, frame_count, header_bytes = struct.unpack_from("<QQHHI", body)
                assert position == len(records)
                kind, rest = body[24 : 24 + kind_bytes].decode(), body[24 + kind_bytes :]
                sizes = struct.unpack_from(f"<{frame_count}I", rest)
                header = msgpack.unpackb(
                    rest[4 * frame_count : 4 * frame_count + header_bytes], strict_map_key=False
                )
                frames, rest = [], rest[4 * frame_count + header_bytes :]
                for size in sizes:
                    frames.append(rest[:size])
                    rest = rest[size:]
                assert rest == b""
                records.append((position, kind, header, frames))
            at += 8 + len(body)
    return records


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
facts = st.tuples(
    st.text(min_size=1, max_size=12),
    st.dictionaries(st.text(max_size=8), plain, max_size=4),
    st.lists(st.binary(max_size=300), max_size=4),
)
Fact = tuple[str, dict[str, Any], list[bytes]]
"""Kind, header and frames."""
