"""The journal's writer and readers: what is written is what is read, when it is durable, and how it fails."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.errors import (
    BudgetExceeded,
    ConfigError,
    ContractError,
    InvariantViolation,
    UnavailableError,
)
from supervisor.clock import ManualClock
from supervisor.journal import Journal, Tail, TornTail, read, read_last
from supervisor.journal import segments as segments_module
from supervisor.journal.format import MAGIC, segment_paths
from tests.supervisor.journals import contents, crc32c, facts, fill, items, open_journal, read_independently

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0


# ---- what is written is what is read ---------------------------------------------------------------------------------


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


def synced_by(monkeypatch):
    """Names of what is synced from now on, in order."""
    seen: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def sync(descriptor, real=real):
            seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            real(descriptor)

        monkeypatch.setattr(os, name, sync)
    return seen


def test_a_segment_is_durable_before_its_successor_has_a_name_and_that_before_its_records(
    tmp_path, monkeypatch
):
    directory = tmp_path / "journal"
    with open_journal(directory, segment_bytes_max=300, commit_interval_ms=1e9) as journal:
        seen = synced_by(monkeypatch)
        for _ in range(2):
            journal.append("Step", {}, [bytes(250)])
        journal.sync()
        first, second = (path.name for path in segment_paths(directory))
        assert seen == [first, f".{second}.tmp", "journal", second]


def test_what_a_killed_writer_has_left_is_synced_before_it_counts(tmp_path, monkeypatch):
    """Its last segment may have a name that only the page cache knows."""
    directory = tmp_path / "journal"
    fill(directory, 1)
    seen = synced_by(monkeypatch)
    with open_journal(directory):
        assert seen == [tmp_path.name, segment_paths(directory)[0].name, "journal"]


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
