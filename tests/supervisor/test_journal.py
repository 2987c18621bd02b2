from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper_simic.errors import (
    BudgetExceeded,
    ConfigError,
    ContractError,
    InvariantViolation,
    UnavailableError,
)
from supervisor.clock import ManualClock
from supervisor.journal import Journal, JournalDamage, Tail, TornTail, read, read_last
from supervisor.journal import segments as segments_module
from supervisor.journal.format import MAGIC, SegmentCursor, encode_mark, segment_paths

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0


def open_journal(directory: Path, **options: Any) -> Journal:
    return Journal(directory, owner="learner-0", run_id="run-1", **options)


def contents(directory: Path, start: int = 0) -> list[tuple[int, str, dict[str, Any], list[bytes]]]:
    return [(r.position, r.kind, r.header, [bytes(f) for f in r.frames]) for r in read(directory, start)]


def fill(directory: Path, count: int, **options: Any) -> None:
    """Records 0 … count-1, each synced by itself."""
    with open_journal(directory, **options) as journal:
        for index in range(count):
            journal.append("Step", {"index": index}, [bytes([index]) * 20])
            journal.sync()


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


# ---- what is written is what is read ---------------------------------------------------------------------------------

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


@settings(max_examples=50)
@given(st.lists(facts, max_size=20), st.integers(200, 2000))
def test_what_was_appended_is_read_by_us_and_by_a_stranger(tmp_path_factory, appended, segment_bytes_max):
    directory = tmp_path_factory.mktemp("journal")
    with open_journal(directory, segment_bytes_max=segment_bytes_max) as journal:
        positions = [journal.append(*fact) for fact in appended]
        assert journal.sync() == len(appended)
    assert positions == list(range(len(appended)))
    expected = [(position, *fact) for position, fact in zip(positions, appended, strict=True)]
    assert contents(directory) == expected
    assert read_independently(directory) == expected


class Fact(msgspec.Struct):
    step: int
    name: str


def test_headers_from_structs_and_frames_from_arrays(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    changing = bytearray(b"before")
    with open_journal(tmp_path, clock=ManualClock(now_s=12.5)) as journal:
        frames: list[Any] = [array, array.T, memoryview(b"view")[1:3], changing, np.zeros((0, 3)), b""]
        journal.append("Fact", Fact(3, "x"), frames)
        changing[:] = b"later!"
    (record,) = read(tmp_path)
    assert record.header == {"step": 3, "name": "x"}
    assert record.header_as(Fact) == Fact(3, "x")
    assert record.time_ns == 12_500_000_000
    np.testing.assert_array_equal(np.frombuffer(record.frames[0], np.float32).reshape(3, 4), array)
    np.testing.assert_array_equal(np.frombuffer(record.frames[1], np.float32).reshape(4, 3), array.T)
    assert [bytes(frame) for frame in record.frames[2:]] == [b"ie", b"before", b"", b""]
    assert all(frame.readonly for frame in record.frames)
    with pytest.raises(ContractError, match="record 0 .Fact. is no TornTail"):
        record.header_as(TornTail)


@pytest.mark.parametrize(
    ("kind", "header", "frames", "error", "names"),
    [
        ("", {}, [], ContractError, "1 to 255 bytes"),
        ("ü" * 128, {}, [], ContractError, "not 256"),
        ("List", [1, 2], [], ContractError, "the header of a List"),
        ("Number", 5, [], ContractError, "MessagePack map"),
        ("Many", {}, [b""] * 65_536, BudgetExceeded, "65536 frames"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_takes_no_position(
    tmp_path, kind, header, frames, error, names
):
    with open_journal(tmp_path) as journal:
        with pytest.raises(error, match=names):
            journal.append(kind, header, frames)
        with pytest.raises(TypeError):
            journal.append("NoBuffer", {}, [5])  # type: ignore[list-item]
        assert journal.append("Next", {}) == 0
    assert [record.kind for record in read(tmp_path)] == ["Next"]


def test_a_record_longer_than_a_segment_has_one_for_itself(tmp_path):
    with open_journal(tmp_path, segment_bytes_max=300) as journal:
        for size in (10, 5000, 10):
            journal.append("Sized", {"size": size}, [bytes(size)])
    assert [path.name for path in segment_paths(tmp_path)] == [f"{n:020d}.log" for n in (0, 1, 2)]
    assert [record.header["size"] for record in read(tmp_path)] == [10, 5000, 10]


class AgainstAList(RuleBasedStateMachine):
    """A journal is a list that survives its process."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="journal-"))
        self.model: list[tuple[int, str, dict[str, Any], list[bytes]]] = []
        self.journal = open_journal(self.directory, segment_bytes_max=400)
        self.tail = Tail(self.directory)
        self.followed: list[int] = []

    @rule(fact=facts)
    def append(self, fact):
        position = self.journal.append(*fact)
        assert position == len(self.model)
        self.model.append((position, *fact))

    @rule()
    def sync(self):
        assert self.journal.sync() == len(self.model)
        assert self.journal.durable_position == len(self.model)
        assert contents(self.directory) == self.model

    @rule()
    def reopen(self):
        self.journal.close()
        self.journal = open_journal(self.directory, segment_bytes_max=400)
        assert self.journal.recovered is None
        assert self.journal.durable_position == self.journal.next_position == len(self.model)

    @rule(removed=st.integers(1, 31))
    def crash_between_sync_and_mark(self, removed):
        """A writer killed before its mark was whole: nothing but the mark's rest is cut."""
        self.journal.close()
        path = segment_paths(self.directory)[-1]
        if self._ends_with_mark(path):
            os.truncate(path, path.stat().st_size - removed)
            self.journal = open_journal(self.directory, segment_bytes_max=400)
            assert self.journal.recovered == TornTail(
                path, path.stat().st_size - 32, 32 - removed
            )  # marked anew
        else:
            self.journal = open_journal(self.directory, segment_bytes_max=400)
        assert self.journal.durable_position == len(self.model)

    def _ends_with_mark(self, path: Path) -> bool:
        data = path.read_bytes()
        return data[-32:] == encode_mark(len(self.model), len(data) - 32)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read_from_somewhere(self, data):
        start = data.draw(st.integers(0, len(self.model) + 2))
        self.journal.sync()
        assert contents(self.directory, start) == self.model[start:]

    @rule()
    def newest_of_a_kind(self):
        self.journal.sync()
        for kind in {fact[1] for fact in self.model}:
            wanted = [fact[0] for fact in self.model if fact[1] == kind][-2:]
            assert [record.position for record in read_last(self.directory, {kind}, count=2)] == wanted

    @rule(records_max=st.integers(1, 5))
    def follow(self, records_max):
        records = self.tail.poll(records_max)
        assert len(records) <= records_max
        self.followed += [record.position for record in records]
        assert self.tail.position == len(self.followed)

    @invariant()
    def positions_are_consistent(self):
        assert self.journal.next_position == len(self.model)
        assert self.journal.durable_position <= len(self.model)
        assert self.followed == list(range(len(self.followed)))

    def teardown(self):
        self.journal.close()
        while records := self.tail.poll():
            self.followed += [record.position for record in records]
        self.tail.close()
        assert self.followed == list(range(len(self.model)))
        assert contents(self.directory) == self.model
        shutil.rmtree(self.directory)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=30, stateful_step_count=25)


# ---- durability ------------------------------------------------------------------------------------------------------


def test_a_poll_loop_is_woken_when_records_became_durable(tmp_path):
    with open_journal(tmp_path, commit_interval_ms=1.0) as journal:
        poller = select.poll()
        poller.register(journal.durable_fd, select.POLLIN)
        assert poller.poll(0) == []
        journal.append("A", {})
        journal.append("B", {})
        while journal.poll_durable() < 2:
            assert poller.poll(DEADLINE_S * 1000), "the flusher never woke the poll loop"
        assert poller.poll(0) == []
        assert contents(tmp_path) == [(0, "A", {}, []), (1, "B", {}, [])]


@pytest.mark.parametrize(
    "limits",
    [
        {"commit_records_max": 3},
        {"commit_bytes_max": 150},
    ],
)
def test_a_full_group_is_committed_before_its_interval_is_over(tmp_path, limits):
    with open_journal(tmp_path, commit_interval_ms=1e9, **limits) as journal:
        for _ in range(3):
            journal.append("Step", {}, [bytes(50)])
        assert select.select([journal.durable_fd], [], [], DEADLINE_S)[0]
        while journal.poll_durable() < 3:
            assert select.select([journal.durable_fd], [], [], DEADLINE_S)[0]
        assert journal.counters.records == 3


def test_records_that_come_together_are_synced_together(tmp_path):
    with open_journal(tmp_path, commit_interval_ms=1e9) as journal:
        for _ in range(100):
            journal.append("Step", {})
        assert journal.sync() == 100
        assert (journal.counters.records, journal.counters.commits) == (100, 1)


def test_every_record_is_synced_before_its_position_is_told(tmp_path, monkeypatch):
    """At each sync the durable position still excludes what is being synced, and the bytes are already written."""
    seen: list[tuple[int, int]] = []
    real = os.fdatasync

    def fdatasync(descriptor):
        journal = opened[0]
        seen.append((journal.durable_position, os.fstat(descriptor).st_size))
        real(descriptor)

    opened = [open_journal(tmp_path)]
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    journal = opened[0]
    journal.append("A", {})
    assert journal.sync() == 1
    journal.append("B", {})
    assert journal.sync() == 2
    told = [position for position, _ in seen]
    assert told == [0, 1]
    assert seen[0][1] < seen[1][1]
    journal.close()


def test_a_full_backlog_blocks_append_until_the_disk_has_caught_up(tmp_path, monkeypatch):
    gate, reached = threading.Event(), threading.Event()
    real = os.fdatasync

    def slow_disk(descriptor):
        reached.set()
        assert gate.wait(DEADLINE_S)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow_disk)
    with open_journal(tmp_path, backlog_bytes_max=1000, commit_interval_ms=0.0) as journal:
        journal.append("Big", {}, [bytes(900)])
        assert reached.wait(DEADLINE_S)
        positions: list[int] = []
        thread = threading.Thread(target=lambda: positions.append(journal.append("Next", {}, [bytes(900)])))
        thread.start()
        while journal.counters.backlog_waits == 0:
            pass
        assert positions == []
        assert journal.counters.backlog_bytes < 1000
        gate.set()
        thread.join(DEADLINE_S)
        assert positions == [1]
        assert journal.sync() == 2
        assert journal.counters.backlog_bytes == 0


def test_an_append_that_needs_room_does_not_wait_for_the_interval(tmp_path):
    with open_journal(tmp_path, backlog_bytes_max=1000, commit_interval_ms=1e9) as journal:
        assert journal.append("Big", {}, [bytes(900)]) == 0
        assert journal.append("Next", {}, [bytes(900)]) == 1
        assert journal.durable_position == 1
        assert journal.counters.backlog_waits == 1


@settings(max_examples=20)
@given(st.lists(facts, min_size=1, max_size=8), st.integers(100, 40_000))
def test_a_kernel_that_takes_a_write_in_pieces(tmp_path_factory, appended, piece_bytes):
    directory = tmp_path_factory.mktemp("journal")

    def write_a_piece(descriptor, buffers):
        return os.write(descriptor, b"".join(buffers)[:piece_bytes])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", write_a_piece)
        with open_journal(directory) as journal:
            for fact in appended:
                journal.append(
                    fact[0], fact[1], frames=[b"large" * 5000]
                )  # frames of this size keep their own buffer
    records = contents(directory)
    assert [record[1:3] for record in records] == [fact[:2] for fact in appended]
    assert all(record[3] == [b"large" * 5000] for record in records)


WRITER = """
import os, sys
from supervisor.journal import Journal
limits = {"segment_bytes_max": 50_000, "commit_interval_ms": 1.0, "commit_records_max": 8}
with Journal(sys.argv[1], owner="learner-0", run_id="run-1", **limits) as journal:
    while True:
        for _ in range(20):
            position = journal.next_position
            journal.append("Step", {"position": position}, [position.to_bytes(8, "big") * (position % 300)])
        os.write(1, b"%d\\n" % (journal.sync() if position % 3 else journal.durable_position))
"""


@pytest.mark.processes
def test_kill_9_loses_nothing_acknowledged(tmp_path):
    acknowledged = 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None
            for _ in range(30):
                acknowledged = int(writer.stdout.readline())
            with pytest.raises(UnavailableError, match=f"process {writer.pid}"):
                open_journal(tmp_path)
            writer.kill()
            rest = writer.stdout.read().split(b"\n")[:-1]
        acknowledged = int(rest[-1]) if rest else acknowledged
        records = list(read(tmp_path))
        assert len(records) >= acknowledged
        for position, record in enumerate(records):
            assert (record.position, record.header) == (position, {"position": position})
            assert bytes(record.frames[0]) == position.to_bytes(8, "big") * (position % 300)
        with open_journal(tmp_path) as journal:
            assert journal.next_position == len(records)
    assert len(segment_paths(tmp_path)) > 1


@pytest.mark.processes
def test_readers_follow_a_living_writer_across_segments(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        followed: list[int] = []
        with Tail(tmp_path) as tail:
            while len(segment_paths(tmp_path)) < 6 or len(followed) < 500:
                followed += [record.header["position"] for record in tail.poll()]
                select.select([writer.stdout], [], [], DEADLINE_S)
                os.read(writer.stdout.fileno(), 1 << 16)
        newest = [record.position for record in read_last(tmp_path, count=3)]
        assert newest[-1] >= followed[-1] - 1
        assert sum(1 for _ in read(tmp_path, followed[-1])) >= 1
        writer.kill()
    assert followed == list(range(len(followed)))


# ---- torn tails and damage -------------------------------------------------------------------------------------------


def test_cut_at_every_byte_of_the_last_record(tmp_path):
    whole = tmp_path / "whole"
    fill(whole, 3)
    expected = contents(whole)
    path = segment_paths(whole)[0]
    data = path.read_bytes()
    with SegmentCursor(path) as cursor:
        boundaries = [cursor.offset]  # after the header, after each record, after its mark
        for _ in cursor.records(is_closed=False):
            boundaries += [cursor.offset]
    last_start = boundaries[2] + 32
    assert data[boundaries[2] :].startswith(encode_mark(2, boundaries[2]))
    for end in range(last_start, len(data)):
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        (cut / path.name).write_bytes(data[:end])
        kept = 3 if end >= boundaries[3] else 2
        whole_until = max(b for b in (last_start, boundaries[3]) if b <= end)
        assert contents(cut) == expected[:kept]  # a reader passes over the torn tail
        with open_journal(cut) as journal:
            torn = end - whole_until
            assert journal.recovered == (TornTail(cut / path.name, whole_until, torn) if torn else None), (
                f"cut at {end}"
            )
            assert journal.append("Next", {}) == kept
        assert [record.position for record in read(cut)] == list(range(kept + 1))
        assert contents(cut)[:kept] == expected[:kept]


def items(path: Path) -> list[tuple[int, int]]:
    """Start and end of header and items, by the length fields alone."""
    data = path.read_bytes()
    spans, at = [(0, struct.unpack_from("<I", data, 12)[0])], struct.unpack_from("<I", data, 12)[0]
    while at < len(data):
        end = at + 8 + (struct.unpack_from("<I", data, at)[0] & 0x7FFFFFFF)
        spans.append((at, end))
        at = end
    return spans


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flip_of_any_byte_is_found_and_named(tmp_path, flip):
    """Everything is distinguishable but the last mark: behind it no evidence stands, and it holds no record."""
    whole = tmp_path / "whole"
    fill(whole, 5, segment_bytes_max=350)
    expected = contents(whole)
    paths = segment_paths(whole)
    assert len(paths) == 2
    for path in paths:
        data = path.read_bytes()
        spans = items(path)
        for offset in range(len(data)):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            damaged = bytearray(data)
            damaged[offset] ^= flip
            (copy / path.name).write_bytes(damaged)
            start, end = next(span for span in spans if span[0] <= offset < span[1])
            if path == paths[-1] and (start, end) == spans[-1]:
                with open_journal(copy) as journal:
                    assert journal.recovered == TornTail(copy / path.name, start, end - start)
                assert contents(copy) == expected
                continue
            with pytest.raises(JournalDamage) as by_writer:
                open_journal(copy)
            with pytest.raises(JournalDamage) as by_reader:
                contents(copy)
            for damage in (by_writer.value, by_reader.value):
                assert (damage.segment, damage.offset) == (copy / path.name, start), f"flip at {offset}"
                assert f"{copy / path.name} is damaged at byte {start}" in str(damage)


@pytest.mark.parametrize("garbage", [b"\0", bytes(100), b"\xff" * 100, b"DURABLE\0" * 20, os.urandom(500)])
def test_garbage_behind_the_end_is_a_torn_tail(tmp_path, garbage):
    fill(tmp_path, 2)
    path = segment_paths(tmp_path)[0]
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(garbage)
    assert len(contents(tmp_path)) == 2
    with open_journal(tmp_path) as journal:
        assert journal.recovered == TornTail(path, size, len(garbage))
    assert path.stat().st_size == size


def test_marks_inside_a_payload_prove_nothing(tmp_path):
    """A journal kept as another journal's payload, torn in the middle: its marks lie at other offsets."""
    fill(tmp_path / "inner", 9)
    inner = segment_paths(tmp_path / "inner")[0].read_bytes()
    outer = tmp_path / "outer"
    fill(outer, 1)
    path = segment_paths(outer)[0]
    before = path.stat().st_size
    with open_journal(outer) as journal:
        journal.append("Archive", {}, [inner, b"end"])
    os.truncate(path, before + len(inner))
    with open_journal(outer) as journal:
        assert journal.recovered == TornTail(path, before, len(inner))
        assert journal.next_position == 1


def test_a_torn_group_whose_later_pages_arrived_first_is_a_tail(tmp_path):
    """Power failed while a group was written: a hole, then whole records, but no mark. Nobody was told of any."""
    fill(tmp_path, 2)
    path = segment_paths(tmp_path)[0]
    size = path.stat().st_size
    with open_journal(tmp_path, commit_interval_ms=1e9) as journal:
        for index in range(4):
            journal.append("Step", {"index": index}, [bytes(50)])
    data = bytearray(path.read_bytes())
    spans = items(path)
    first_of_group, its_end = next(span for span in spans if span[0] == size)
    data[first_of_group:its_end] = bytes(its_end - first_of_group)
    path.write_bytes(data[: spans[-1][0]])  # without the mark
    with open_journal(tmp_path) as journal:
        assert journal.recovered == TornTail(path, size, spans[-1][0] - size)
        assert journal.next_position == 2


def forged(body: bytes, *, control: int = 0) -> bytes:
    """An item whose checksum is right, whatever its body says."""
    start = struct.pack("<I", len(body) | control << 31)
    return start + struct.pack("<I", crc32c(start + body)) + body


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (forged(b"short"), "5 bytes are too few for a record"),
        (forged(struct.pack("<QQHHI", 2, 0, 1, 0, 1) + b"K\x80"), "position 2 stands where 1 belongs"),
        (forged(struct.pack("<QQHHI", 1, 0, 1, 9, 1) + b"K\x80"), "the parts of record 1 are longer"),
        (forged(struct.pack("<QQHHI", 1, 0, 1, 0, 1) + b"K\x80more"), "the parts of record 1 do not fill it"),
        (forged(b"DURABLE\0" + struct.pack("<QQ", 1, 0), control=1), "a mark that belongs elsewhere"),
        (forged(b"DURABLE\0" + struct.pack("<Q", 1), control=1), "a mark that belongs elsewhere"),
        (struct.pack("<II", 1 << 20, 0) + bytes(50), "a record of 1048576 bytes does not fit the 50 bytes"),
    ],
)
def test_an_item_that_is_whole_but_wrong_is_unreadable(tmp_path, item, reason):
    fill(tmp_path, 1)
    path = segment_paths(tmp_path)[0]
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(item)
    assert len(contents(tmp_path)) == 1  # at the end: a tail
    with SegmentCursor(path) as cursor:
        assert cursor.next(is_closed=True) is not None
        with pytest.raises(JournalDamage, match=f"at byte {size}: {reason}") as damage:
            cursor.next(is_closed=True)
        assert damage.value.offset == size


def test_control_items_of_a_later_version_are_passed_over(tmp_path):
    fill(tmp_path, 1)
    path = segment_paths(tmp_path)[0]
    with path.open("ab") as file:
        file.write(forged(b"INDEX\0\0\0whatever", control=1))
    with open_journal(tmp_path) as journal:
        assert journal.recovered is None
        journal.append("Next", {})
    assert [record.kind for record in read(tmp_path)] == ["Step", "Next"]


def test_a_writer_checks_how_the_two_newest_segments_fit(tmp_path):
    """Cut between two items, or exchanged whole: every checksum in them is right."""
    for name in ("a", "b"):
        with open_journal(tmp_path / name, segment_bytes_max=300) as journal:
            for index in range(5):
                journal.append("Step", {"index": index}, [name.encode() * 40])
                journal.sync()
    *_, before, last = segment_paths(tmp_path / "a")
    whole = before.read_bytes()
    end = items(before)[1][0]
    os.truncate(before, end)
    with pytest.raises(JournalDamage, match=f"{before} is damaged at byte {end}.*{last.name} follows"):
        open_journal(tmp_path / "a")
    before.write_bytes(whole)
    open_journal(tmp_path / "a").close()
    shutil.copy(tmp_path / "b" / before.name, before)
    with pytest.raises(JournalDamage, match=f"{last} is damaged at byte 24: the digest of {before.name}"):
        open_journal(tmp_path / "a")


def test_a_segment_under_a_wrong_name_is_refused(tmp_path):
    fill(tmp_path, 1)
    (path,) = segment_paths(tmp_path)
    path.rename(tmp_path / f"{5:020d}.log")
    with pytest.raises(JournalDamage, match="byte 16: the header says that position 0 is the first one"):
        contents(tmp_path, 5)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_segment_is_named(tmp_path, missing):
    fill(tmp_path, 6, segment_bytes_max=250)
    paths = segment_paths(tmp_path)
    assert len(paths) >= 3
    paths[missing].unlink()
    with pytest.raises(JournalDamage, match="is missing" if missing == 0 else "no .* follows"):
        contents(tmp_path)
    later = int(paths[2].stem)
    assert contents(tmp_path, later)[0][0] == later  # what is there can be read


def test_reading_from_a_position_opens_no_earlier_segment(tmp_path):
    fill(tmp_path, 6, segment_bytes_max=250)
    first, *_, last = segment_paths(tmp_path)
    first.write_bytes(b"not a segment at all")
    assert [record.position for record in read(tmp_path, int(last.stem))] == list(range(int(last.stem), 6))
    assert [record.position for record in read_last(tmp_path)] == [5]
    assert read_last(tmp_path, {"Never"}, segments_max=1) == []
    with pytest.raises(JournalDamage, match="byte 0"):
        contents(tmp_path)


def test_a_poll_gives_what_stands_before_the_damage_first(tmp_path):
    fill(tmp_path, 4)
    path = segment_paths(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[items(path)[5][0] + 20] ^= 1  # header, record 0, mark, record 1, mark, record 2
    path.write_bytes(data)
    with Tail(tmp_path) as tail:
        assert [record.position for record in tail.poll()] == [0, 1]
        for _ in range(2):
            with pytest.raises(JournalDamage, match="positions below 4 were durable"):
                tail.poll()


def test_a_follower_survives_the_cutting_of_a_tail_it_has_seen(tmp_path):
    fill(tmp_path, 1)
    path = segment_paths(tmp_path)[0]
    with Tail(tmp_path) as tail:
        assert len(tail.poll()) == 1
        with path.open("ab") as file:
            file.write(struct.pack("<II", 40, 0) + b"half a record")
        assert tail.poll() == []
        with open_journal(tmp_path) as journal:
            assert journal.recovered is not None
            journal.append("Other", {"longer": "than what stood there before"}, [bytes(100)])
            journal.sync()
            assert [record.kind for record in tail.poll()] == ["Other"]


def test_a_file_that_shrinks_under_its_reader_is_damage(tmp_path):
    fill(tmp_path, 2)
    with Tail(tmp_path) as tail:
        assert len(tail.poll()) == 2
        os.truncate(segment_paths(tmp_path)[0], 100)
        with pytest.raises(JournalDamage, match="the file ends before byte"):
            tail.poll()


# ---- opening and failing ---------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path):
    with open_journal(tmp_path):
        with pytest.raises(UnavailableError, match=f"{tmp_path} is in use by process {os.getpid()}"):
            open_journal(tmp_path)
    open_journal(tmp_path).close()


@pytest.mark.parametrize(("owner", "run_id"), [("learner-1", "run-1"), ("learner-0", "run-2")])
def test_another_owners_journal_is_refused_and_let_go(tmp_path, owner, run_id):
    fill(tmp_path, 1)
    with pytest.raises(ConfigError, match=f"'learner-0' in run 'run-1', not of '{owner}' in run '{run_id}'"):
        Journal(tmp_path, owner=owner, run_id=run_id)
    open_journal(tmp_path).close()


def test_a_newer_format_is_not_called_damage(tmp_path):
    fill(tmp_path, 1)
    path = segment_paths(tmp_path)[0]
    data = bytearray(path.read_bytes())
    end = items(path)[0][1]
    data[8:12] = struct.pack("<I", 2)
    data[end - 4 : end] = struct.pack("<I", crc32c(bytes(data[: end - 4])))
    path.write_bytes(data)
    assert data.startswith(MAGIC)
    for attempt in (lambda: contents(tmp_path), lambda: open_journal(tmp_path)):
        with pytest.raises(ContractError, match="format version 2.*use a newer"):
            attempt()


@pytest.mark.parametrize(("owner", "names"), [("", "owner takes 1 to"), ("x" * 65_536, "not 65536")])
def test_an_owner_that_fits_no_header_is_refused(tmp_path, owner, names):
    with pytest.raises(ContractError, match=names):
        Journal(tmp_path, owner=owner, run_id="run-1")


def test_places_that_are_no_journal(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError, match="cannot open the journal"):
        open_journal(tmp_path / "file")
    with pytest.raises(UnavailableError, match="cannot read the journal.*No such file"):
        contents(tmp_path / "missing")
    assert contents(tmp_path) == []
    with Tail(tmp_path) as tail:
        assert tail.poll() == []
        assert tail.position == 0
        fill(tmp_path, 1)
        assert len(tail.poll()) == 1


def test_after_close_nothing_is_taken(tmp_path):
    journal = open_journal(tmp_path)
    journal.append("A", {})
    journal.close()
    journal.close()
    assert journal.durable_position == 1
    for attempt in (lambda: journal.append("B", {}), journal.sync, journal.poll_durable):
        with pytest.raises(InvariantViolation, match="is closed"):
            attempt()


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may grow past `size` bytes: the kernel refuses with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refused_write_is_told_at_every_later_call_and_at_none_before(tmp_path):
    journal = open_journal(tmp_path, commit_interval_ms=1e9)
    for index in range(3):
        journal.append("Step", {"index": index})
    assert journal.sync() == 3
    assert journal.poll_durable() == 3
    with largest_file(2000):
        journal.append("Huge", {}, [bytes(5000)])
        with pytest.raises(UnavailableError, match="File too large; positions from 3 on are not durable"):
            journal.sync()
    assert select.select([journal.durable_fd], [], [], 0)[0], "a poll loop must learn of the failure"
    for attempt in (lambda: journal.append("Next", {}), journal.sync, journal.poll_durable):
        with pytest.raises(UnavailableError, match=str(segment_paths(tmp_path)[0])) as told:
            attempt()
        assert isinstance(told.value.__cause__, OSError)
    assert journal.durable_position == 3
    journal.close()  # already told: no second time
    with open_journal(tmp_path) as again:
        assert again.recovered is not None
        assert again.append("Goes on", {}) == 3
    assert [record.kind for record in read(tmp_path)] == ["Step"] * 3 + ["Goes on"]


def test_close_tells_of_records_that_were_lost_unless_somebody_knows(tmp_path):
    journal = open_journal(tmp_path, commit_interval_ms=1e9)
    with largest_file(1000):
        journal.append("Huge", {}, [bytes(5000)])
        with pytest.raises(UnavailableError, match="positions from 0 on are not durable"):
            journal.close()
    open_journal(tmp_path).close()


def test_an_append_that_waits_for_room_learns_of_the_failure(tmp_path):
    with largest_file(1000):
        journal = open_journal(tmp_path, backlog_bytes_max=3000, commit_interval_ms=1e9)
        journal.append("Huge", {}, [bytes(2500)])
        with pytest.raises(UnavailableError, match="File too large"):
            journal.append("Waits", {}, [bytes(2500)])
        assert journal.next_position == 1
        journal.close()


FULL_DISK = """
import sys
from esper_simic.errors import UnavailableError
from supervisor.journal import Journal, read
directory = sys.argv[1] + "/journal"
journal = Journal(directory, owner="learner-0", run_id="run-1", segment_bytes_max=100_000)
try:
    while True:
        journal.append("Step", {"position": journal.next_position}, [bytes(3000)])
        durable = journal.sync()
except UnavailableError as error:
    print(error)
journal.close()
positions = [record.header["position"] for record in read(directory)]
assert positions[:durable] == list(range(durable)), (durable, positions)
with open(sys.argv[1] + "/ballast", "r+b") as ballast:
    ballast.truncate(0)
with Journal(directory, owner="learner-0", run_id="run-1") as journal:
    assert journal.next_position >= durable
    journal.append("Room again", {})
print("went on after", durable)
"""


@pytest.mark.processes
def test_a_full_disk_loses_nothing_durable_and_goes_on_when_there_is_room(tmp_path):
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no private mounts here: {probe.stderr.strip()}")
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$1" && dd if=/dev/zero of="$1/ballast" bs=64k count=8 status=none '
        '&& exec "$2" -c "$3" "$1"'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path, sys.executable, FULL_DISK],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device; positions from" in done.stdout
    assert "went on after" in done.stdout


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_flusher_itself_does_not_hang_its_callers(tmp_path, monkeypatch):
    def faulty(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(segments_module, "encode_record", faulty)
    with open_journal(tmp_path) as journal:
        journal.append("A", {})
        with pytest.raises(InvariantViolation, match="the flusher of .* has died.*positions from 0"):
            journal.sync()
        assert journal.durable_position == 0
