"""The laws of the journal: it is a list that survives its process, its power, and (named, never unnoticed) its disk.

The list model goes through append, sync, reopening, rotation and crashes; the bytes through every cut and every flip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supervisor import audit
from supervisor.journal import JournalDamage, Tail, TornTail, read, read_last
from supervisor.journal.format import encode_mark, segment_name, segment_paths
from tests.supervisor.journals import MEMORY, Fact, as_appended, contents, facts, items, open_journal

SEGMENT_BYTES = 400


@contextlib.contextmanager
def two_directories() -> Iterator[tuple[Path, Path]]:
    """For a whole journal, and for what becomes of its copies."""
    with tempfile.TemporaryDirectory(prefix="journal-", dir=MEMORY) as parent:
        yield Path(parent) / "whole", Path(parent) / "copy"


def append_one_group(directory: Path, group: list[Fact]) -> None:
    """As one group, synced and marked together."""
    with open_journal(directory, segment_bytes_max=SEGMENT_BYTES, commit_interval_ms=1e9) as journal:
        for fact in group:
            journal.append(*fact)


def written_since(path: Path, size: int, before: Path | None) -> int:
    """Where the bytes begin that came into a segment since the journal ended in `before` with this size."""
    return size if path == before else items(path)[0][1]


def whole_below(path: Path, end: int) -> tuple[int, int]:
    """How many records of a segment end at or below an offset, and where the last whole item below it ends."""
    data, records, whole_until = path.read_bytes(), 0, 0
    for start, stop in items(path):
        if stop <= end:
            whole_until = stop
            records += start > 0 and not data[start + 3] & 0x80
    return records, whole_until


class AgainstAList(RuleBasedStateMachine):
    """A journal is a list that survives its process."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="journal-", dir=MEMORY))
        self.model: list[tuple[int, str, dict[str, Any], list[bytes]]] = []
        self.journal = open_journal(self.directory, segment_bytes_max=SEGMENT_BYTES)
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
        self.open()
        assert self.journal.recovered is None

    def open(self):
        self.journal = open_journal(self.directory, segment_bytes_max=SEGMENT_BYTES)
        assert self.journal.durable_position == self.journal.next_position == len(self.model)

    @rule(removed=st.integers(1, 31))
    def crash_between_sync_and_mark(self, removed):
        """A writer killed before its mark was whole: nothing but the mark's rest is cut."""
        self.journal.close()
        path = segment_paths(self.directory)[-1]
        data = path.read_bytes()
        if data[-32:] != encode_mark(len(self.model), len(data) - 32):
            self.open()
            return
        os.truncate(path, len(data) - removed)
        self.open()
        assert self.journal.recovered == TornTail(path, len(data) - 32, 32 - removed)
        assert path.read_bytes() == data  # marked anew

    @rule(group=st.lists(facts, min_size=1, max_size=6), data=st.data())
    def crash_before_the_sync(self, group, data):
        """The power fails while a group is written: any number of its bytes have reached the disk."""
        self.journal.close()
        before = segment_paths(self.directory)[-1]
        size = before.stat().st_size
        append_one_group(self.directory, group)
        path = segment_paths(self.directory)[-1]
        first = int(path.stem)
        end = data.draw(
            st.integers(written_since(path, size, before), path.stat().st_size), label="bytes that survive"
        )
        survive, whole_until = whole_below(path, end)
        os.truncate(path, end)
        facts_there = [fact[1:] for fact in self.model] + group
        self.model = [(number, *fact) for number, fact in enumerate(facts_there[: first + survive])]
        report = audit.verify(self.directory)
        torn = TornTail(path, whole_until, end - whole_until) if end > whole_until else None
        assert (report.is_sound, report.torn_tail, report.records) == (True, torn, len(self.model))
        self.open()
        assert self.journal.recovered == torn
        assert contents(self.directory) == self.model

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

    @rule()
    def audit_it(self):
        self.journal.sync()
        report = audit.verify(self.directory)
        assert (report.is_sound, report.torn_tail, report.records) == (True, None, len(self.model))

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


# ---- every cut -------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(
    st.lists(facts, max_size=4),
    st.lists(facts, min_size=2, max_size=4),
)
def test_cut_at_every_byte_of_what_was_not_synced(synced, group):
    """What is whole stays, what is torn goes, what was synced is untouched, and the journal goes on."""
    with two_directories() as (whole, cut):
        append_one_group(whole, synced)
        before = segment_paths(whole)[-1]
        size = before.stat().st_size
        append_one_group(whole, group)
        expected = [(number, *fact) for number, fact in enumerate([*synced, *group])]
        path = segment_paths(whole)[-1]
        for end in range(written_since(path, size, before), path.stat().st_size):
            shutil.rmtree(cut, ignore_errors=True)
            shutil.copytree(whole, cut)
            os.truncate(cut / path.name, end)
            survive, whole_until = whole_below(path, end)
            there = expected[: int(path.stem) + survive]
            assert len(there) >= len(synced)
            torn = TornTail(cut / path.name, whole_until, end - whole_until) if end > whole_until else None
            assert contents(cut) == there
            report = audit.verify(cut)
            assert (report.is_sound, report.torn_tail, report.records) == (True, torn, len(there))
            with open_journal(cut) as journal:
                assert journal.recovered == torn
                assert journal.append("Next", {}) == len(there)
            assert contents(cut) == [*there, (len(there), "Next", {}, [])]


def test_a_segment_with_a_successor_cut_at_any_byte_is_damage():
    """Between two items too, where every checksum that is left is right; and down to nothing."""
    with two_directories() as (whole, cut):
        for number in range(4):
            append_one_group(whole, [("Step", {"number": number}, [bytes(90)])])
        expected = contents(whole)
        path = segment_paths(whole)[0]
        assert len(segment_paths(whole)) == 2
        mark = items(path)[-1][0]
        for end in range(path.stat().st_size):
            shutil.rmtree(cut, ignore_errors=True)
            shutil.copytree(whole, cut)
            os.truncate(cut / path.name, end)
            survive, whole_until = whole_below(path, end)
            (damage,) = audit.verify(cut).damage
            with pytest.raises(JournalDamage) as by_writer:
                open_journal(cut)
            told = [by_writer.value]
            if end == mark:  # every record is there; the digest that the successor names tells all the same
                assert contents(cut) == expected
                path_named, offset_named = segment_paths(cut)[1], 24
            else:
                given: list[Any] = []
                with pytest.raises(JournalDamage) as raised:
                    given.extend(map(as_appended, read(cut)))
                assert given == expected[:survive]
                told.append(raised.value)
                path_named, offset_named = cut / path.name, whole_until
            assert (damage.segment, damage.offset) == (path_named.name, offset_named)
            for error in told:
                assert (error.segment, error.offset) == (path_named, offset_named)


# ---- every flip ------------------------------------------------------------------------------------------------------


class Flipped(NamedTuple):
    """A journal in which one byte is another one."""

    directory: Path
    path: Path
    item_start: int
    is_last_mark: bool


def flip(whole: Path, copy: Path, path: Path, offset: int, mask: int) -> Flipped:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    (copy / path.name).write_bytes(data)
    spans = items(path)
    start, stop = next(span for span in spans if span[0] <= offset < span[1])
    is_last = path == segment_paths(whole)[-1] and (start, stop) == spans[-1]
    return Flipped(copy, copy / path.name, start, is_last and start > 0)


def assert_found_and_named(flipped: Flipped, expected: list[Any]) -> None:
    report = audit.verify(flipped.directory)
    if flipped.is_last_mark:  # behind it no evidence stands, and it holds no record
        torn = report.torn_tail
        assert torn is not None
        assert (report.damage, torn.segment, torn.offset) == ((), flipped.path, flipped.item_start)
        assert contents(flipped.directory) == expected
        return
    (damage,) = report.damage
    assert (damage.segment, damage.offset) == (flipped.path.name, flipped.item_start)
    given: list[Any] = []
    with pytest.raises(JournalDamage) as raised:
        given.extend(map(as_appended, read(flipped.directory)))
    assert (raised.value.segment, raised.value.offset) == (flipped.path, flipped.item_start)
    assert given == expected[: len(given)], "a reader gives what was written, or nothing"


@settings(max_examples=150)
@given(
    st.lists(st.lists(facts, min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 255),
    st.data(),
)
def test_a_flip_of_any_byte_is_found_and_named_and_never_read(groups, mask, data):
    with two_directories() as (whole, copy):
        for group in groups:
            append_one_group(whole, group)
        expected = contents(whole)
        path = data.draw(st.sampled_from(segment_paths(whole)), label="segment")
        offset = data.draw(st.integers(0, path.stat().st_size - 1), label="offset")
        assert_found_and_named(flip(whole, copy, path, offset, mask), expected)


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_flip_of_every_byte_of_a_journal_is_found_by_the_auditor(mask):
    with two_directories() as (whole, copy):
        for number in range(3):
            append_one_group(whole, [("Step", {"number": number}, [bytes(60)]), ("Mark", {}, [])])
        expected = contents(whole)
        assert len(segment_paths(whole)) >= 2
        for path in segment_paths(whole):
            for offset in range(path.stat().st_size):
                assert_found_and_named(flip(whole, copy, path, offset, mask), expected)


# ---- whole segments --------------------------------------------------------------------------------------------------


def lose(whole: Path, copy: Path, is_lost: Callable[[int], bool]) -> list[Path]:
    """A copy of a journal without some of its segments; those that are left."""
    shutil.copytree(whole, copy)
    for number, path in enumerate(segment_paths(copy)):
        if is_lost(number):
            path.unlink()
    return segment_paths(copy)


@pytest.mark.parametrize("lost", range(1, 1 << 5))
def test_every_set_of_missing_segments_is_named_by_its_neighbours(tmp_path, lost):
    whole = tmp_path / "whole"
    for number in range(5):
        append_one_group(whole, [("Step", {"number": number}, [bytes(380)])])
    paths = segment_paths(whole)
    assert len(paths) == 5
    left = lose(whole, tmp_path / "copy", lambda number: bool(lost >> number & 1))
    report = audit.verify(tmp_path / "copy")
    expected = []
    for before, now in zip([None, *left], left, strict=False):
        if before is None and int(now.stem) > 0:
            expected.append((now.name, 0, f"positions 0 to {int(now.stem) - 1} are missing"))
        elif before is not None and int(now.stem) != int(before.stem) + 1:
            first, last = int(before.stem) + 1, int(now.stem) - 1
            words = f"between {before.name} and {now.name} positions {first} to {last} are missing: no "
            expected.append((before.name, before.stat().st_size, words + segment_name(first)))
    assert [(damage.segment, damage.offset) for damage in report.damage] == [e[:2] for e in expected]
    for damage, (_, _, words) in zip(report.damage, expected, strict=True):
        assert words in damage.reason
