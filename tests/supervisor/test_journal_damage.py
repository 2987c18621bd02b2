"""Torn tails and damage: what a crash explains is cut back and told, everything else is named and stops."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.journal import JournalDamage, Tail, TornTail, read, read_last
from supervisor.journal.format import SegmentCursor, encode_mark, segment_paths
from tests.supervisor.journals import MEMORY, contents, crc32c, fill, items, open_journal


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="journal-", dir=MEMORY) as directory:
        yield Path(directory)


def test_cut_at_every_byte_of_the_last_record(in_memory):
    whole = in_memory / "whole"
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
        cut = in_memory / "cut"
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


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flip_of_any_byte_is_found_and_named(in_memory, flip):
    """Everything is distinguishable but the last mark: behind it no evidence stands, and it holds no record."""
    whole = in_memory / "whole"
    fill(whole, 5, segment_bytes_max=350)
    expected = contents(whole)
    paths = segment_paths(whole)
    assert len(paths) == 2
    for path in paths:
        data = path.read_bytes()
        spans = items(path)
        for offset in range(len(data)):
            copy = in_memory / "copy"
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
