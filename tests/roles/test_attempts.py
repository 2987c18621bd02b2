"""What outlives a death: a few bytes, counted in a row."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest

from supervisor.roles.attempts import Attempts, Failed, Work


def die_at(path: Path, work: Work, number: int) -> Failed:
    """A life that ended in the middle of this; what it knew of those before."""
    attempts = Attempts(path)
    attempts.begin(work, number)
    attempts.close()
    return attempts.failed


def test_a_first_life_knows_of_no_failure(tmp_path: Path) -> None:
    with Attempts(tmp_path / "file") as attempts:
        assert attempts.failed == Failed(Work.NOTHING, 0, 0)


def test_what_was_ended_is_no_failure(tmp_path: Path) -> None:
    with Attempts(tmp_path / "file") as attempts:
        attempts.begin(Work.RECORD, 7)
        attempts.end()
    with Attempts(tmp_path / "file") as attempts:
        assert attempts.failed == Failed(Work.NOTHING, 0, 0)


def test_the_same_death_is_counted_in_a_row_and_another_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    known = [
        die_at(path, work, number)
        for work, number in (
            (Work.RECORD, 7),
            (Work.RECORD, 7),
            (Work.RECORD, 7),
            (Work.STEP, 7),
            (Work.CHECKPOINT, 9),
            (Work.CHECKPOINT, -1),
        )
    ]
    assert known == [
        Failed(Work.NOTHING, 0, 0),
        Failed(Work.RECORD, 7, 1),
        Failed(Work.RECORD, 7, 2),
        Failed(Work.RECORD, 7, 3),
        Failed(Work.STEP, 7, 1),
        Failed(Work.CHECKPOINT, 9, 1),
    ]
    with Attempts(path) as attempts:
        assert attempts.failed == Failed(Work.CHECKPOINT, -1, 1)


def test_a_life_that_ended_well_between_two_failures_does_not_clear_the_count(tmp_path: Path) -> None:
    """It never came to the same work: a learner that is stopped before the update it dies of has not survived it."""
    path = tmp_path / "file"
    die_at(path, Work.STEP, 3)
    with Attempts(path) as attempts:
        attempts.begin(Work.RECORD, 1)
        attempts.end()
    assert die_at(path, Work.STEP, 3) == Failed(Work.NOTHING, 0, 0), "the life before did not fail"
    with Attempts(path) as attempts:
        assert attempts.failed == Failed(Work.STEP, 3, 2)


def test_a_killed_process_leaves_what_it_was_about_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    child = os.fork()
    if child == 0:
        attempts = Attempts(path)
        attempts.begin(Work.STEP, 12)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with Attempts(path) as attempts:
        assert attempts.failed == Failed(Work.STEP, 12, 1)


@pytest.mark.parametrize(
    "content", [b"", b"short", struct.pack("<QqQqQ", 99, 1, 98, 2, 3), bytes(range(200))]
)
def test_a_file_of_anything_else_is_no_reason_to_die(tmp_path: Path, content: bytes) -> None:
    """It is a hint: after a power cut it may hold anything."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with Attempts(path) as attempts:
        assert isinstance(attempts.failed.work, Work)
        attempts.begin(Work.RECORD, 3)
    with Attempts(path) as attempts:
        assert attempts.failed == Failed(Work.RECORD, 3, 1)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "file")
    attempts.close()
    attempts.close()
