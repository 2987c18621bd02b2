from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import google_crc32c
import pytest
import xxhash

from esper_simic.errors import UnavailableError
from supervisor.audit import Damage, list_segments, verify
from supervisor.clock import ManualClock
from supervisor.journal import Journal, TornTail
from supervisor.journal.format import segment_paths


@pytest.fixture
def journal_directory(tmp_path: Path) -> Path:
    """Seven records, every fourth of another kind, over several segments; one second apart."""
    directory = tmp_path / "journal"
    clock = ManualClock(now_s=100.0)
    with Journal(directory, owner="bus", run_id="r", segment_bytes_max=300, clock=clock) as journal:
        for index in range(7):
            journal.append("Fourth" if index % 4 == 0 else "Other", {"index": index}, [bytes(40)])
            journal.sync()
            clock.advance(1.0)
    return directory


def test_a_sound_journal(journal_directory):
    report = verify(journal_directory)
    assert report.is_sound
    assert (report.owner, report.run_id, report.records) == ("bus", "r", 7)
    assert report.torn_tail is None
    assert report.damage == ()
    assert report.bytes == sum(path.stat().st_size for path in segment_paths(journal_directory))
    assert report.segments == list_segments(journal_directory)


def test_segments_say_what_they_hold(journal_directory):
    segments = list_segments(journal_directory)
    assert len(segments) >= 3
    expected_first = 0
    for path, segment in zip(segment_paths(journal_directory), segments, strict=True):
        assert segment.name == path.name == f"{expected_first:020d}.log"
        assert segment.first_position == expected_first
        assert segment.last_position == expected_first + segment.records - 1
        assert segment.first_time_ns == (100 + segment.first_position) * 10**9
        assert segment.last_time_ns == (100 + segment.last_position) * 10**9
        assert segment.digest == xxhash.xxh3_128_hexdigest(path.read_bytes())
        assert segment.bytes == path.stat().st_size
        expected_first += segment.records
    assert expected_first == 7
    assert sum(segment.kinds.get("Fourth", 0) for segment in segments) == 2
    assert sum(segment.kinds.get("Other", 0) for segment in segments) == 5


def test_each_segment_names_the_digest_of_the_one_before(journal_directory):
    previous = bytes(16)
    for path in segment_paths(journal_directory):
        data = path.read_bytes()
        assert data[24:40] == previous
        previous = xxhash.xxh3_128_digest(data)


def test_an_empty_journal_and_none_at_all(tmp_path):
    Journal(tmp_path / "new", owner="bus", run_id="r").close()
    report = verify(tmp_path / "new")
    assert (report.is_sound, report.records, len(report.segments)) == (True, 0, 1)
    assert (report.segments[0].last_position, report.segments[0].first_time_ns) == (None, None)
    (tmp_path / "nothing").mkdir()
    assert verify(tmp_path / "nothing").segments == ()
    with pytest.raises(UnavailableError, match="No such file"):
        verify(tmp_path / "missing")


def test_a_torn_tail_is_reported_and_left_alone(journal_directory):
    path = segment_paths(journal_directory)[-1]
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"half a rec")
    report = verify(journal_directory)
    assert report.is_sound
    assert report.torn_tail == TornTail(path, size, 10)
    assert report.records == 7
    assert path.stat().st_size == size + 10


def test_every_damaged_segment_is_named_not_only_the_first(journal_directory):
    first, second, *_, last = segment_paths(journal_directory)
    for path in (first, second):
        data = bytearray(path.read_bytes())
        data[30 if path == first else -40] ^= 1
        path.write_bytes(data)
    report = verify(journal_directory)
    assert not report.is_sound
    assert [damage.segment for damage in report.damage] == [first.name, second.name]
    assert report.damage[0].offset == 0
    assert report.segments[-1].name == last.name
    assert report.segments[-1].damage is None


def test_missing_segments(journal_directory, tmp_path):
    paths = segment_paths(journal_directory)
    for index in (0, 1):
        copy = tmp_path / str(index)
        shutil.copytree(journal_directory, copy)
        (copy / paths[index].name).unlink()
        (damage,) = verify(copy).damage
        if index == 0:
            until = int(paths[1].stem) - 1
            assert damage == Damage(
                paths[1].name,
                0,
                f"it is the oldest segment; positions 0 to {until} are missing: no {paths[0].name} stands here",
            )
        else:
            assert (damage.segment, damage.offset) == (paths[0].name, paths[0].stat().st_size)
            assert damage.reason.startswith(
                f"between {paths[0].name} and {paths[2].name} positions {int(paths[1].stem)} to "
                f"{int(paths[2].stem) - 1} are missing: no {paths[1].name} stands here"
            )


def test_a_segment_that_begins_again_before_the_last_one_ends(journal_directory, tmp_path):
    """Of the same run and owner, each whole: as when two copies of a journal were laid over each other."""
    other = tmp_path / "other"
    with Journal(other, owner="bus", run_id="r") as journal:
        for index in range(7):
            journal.append("Other", {"index": index})
            journal.sync()
    shutil.copy(segment_paths(other)[0], journal_directory)
    second = segment_paths(journal_directory)[1]
    (damage,) = verify(journal_directory).damage
    assert damage.segment == f"{0:020d}.log"
    assert damage.reason == (
        f"between {damage.segment} and {second.name} positions {int(second.stem)} to 6 stand twice"
    )


def test_records_cut_off_at_a_boundary_of_a_closed_segment_are_missed(journal_directory):
    """Every checksum that is left is right: only the neighbour's name tells."""
    first, second = segment_paths(journal_directory)[:2]
    data = first.read_bytes()
    at = struct.unpack_from("<I", data, 12)[0]
    os.truncate(first, at)
    (damage,) = verify(journal_directory).damage
    assert (damage.segment, damage.offset) == (first.name, at)
    assert f"positions 0 to {int(second.stem) - 1}" in damage.reason


def test_a_record_forged_with_a_right_checksum_breaks_the_chain(journal_directory):
    first, second = segment_paths(journal_directory)[:2]
    data = bytearray(first.read_bytes())
    at = struct.unpack_from("<I", data, 12)[0]
    length = struct.unpack_from("<I", data, at)[0]
    data[at + 8 + length - 1] ^= 0xFF  # the last byte of the first record's frame
    checksum = google_crc32c.value(bytes(data[at : at + 4]) + bytes(data[at + 8 : at + 8 + length]))
    struct.pack_into("<I", data, at + 4, checksum)
    first.write_bytes(data)
    (damage,) = verify(journal_directory).damage
    assert (damage.segment, damage.offset) == (second.name, 24)
    assert xxhash.xxh3_128_hexdigest(bytes(data)) in damage.reason


def test_segments_of_two_runs_do_not_fit(journal_directory, tmp_path):
    """A segment of another run at the right position, itself whole."""
    other = tmp_path / "other"
    with Journal(other, owner="bus", run_id="other", segment_bytes_max=300) as journal:
        for index in range(7):
            journal.append("Fourth" if index % 4 == 0 else "Other", {"index": index}, [bytes(40)])
            journal.sync()
    last = segment_paths(journal_directory)[-1]
    assert last.name == segment_paths(other)[-1].name
    shutil.copy(other / last.name, last)
    (damage,) = verify(journal_directory).damage
    assert (damage.segment, damage.offset) == (last.name, 0)
    assert "another owner or run" in damage.reason


def test_an_unknown_format_version_is_damage_to_an_auditor(journal_directory):
    path = segment_paths(journal_directory)[-1]
    data = bytearray(path.read_bytes())
    end = struct.unpack_from("<I", data, 12)[0]
    struct.pack_into("<I", data, 8, 9)
    struct.pack_into("<I", data, end - 4, google_crc32c.value(bytes(data[: end - 4])))
    path.write_bytes(data)
    (damage,) = verify(journal_directory).damage
    assert damage.segment == path.name
    assert "format version 9" in damage.reason


def test_a_living_writer_is_no_torn_tail(tmp_path):
    with Journal(tmp_path, owner="bus", run_id="r") as journal:
        for index in range(50):
            journal.append("Step", {"index": index})
            journal.sync()
            report = verify(tmp_path)
            assert (report.is_sound, report.torn_tail, report.records) == (True, None, index + 1)
