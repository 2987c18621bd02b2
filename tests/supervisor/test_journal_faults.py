"""A journal's writer killed at each of its fault points: what it was told is durable is there, once and unchanged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor import audit
from supervisor.faults import DIRECTORY_VARIABLE, FAULTS_VARIABLE, POINTS, fired
from supervisor.journal import Journal, read
from supervisor.journal.format import segment_paths

ROOT = Path(__file__).parents[2]
JOURNAL_POINTS = sorted(name for name in POINTS if name.startswith("journal."))
RECORDS = 60

LIFE = f"""
import os, sys
from supervisor import faults
from supervisor.journal import Journal
faults.arm("learner")
with Journal(sys.argv[1], owner="learner-0", run_id="run-1", segment_bytes_max=3000) as journal:
    while journal.next_position < {RECORDS}:
        for position in range(journal.next_position, min(journal.next_position + 4, {RECORDS})):
            journal.append("Step", {{"position": position}}, [bytes([position]) * 200])
        os.write(1, b"%d\\n" % journal.sync())
"""
"""Groups of four records in segments of about three groups."""


def life(directory: Path, plan: str) -> tuple[int, int]:
    """Return code, and the last position that this life was told to be durable."""
    faults_directory = directory.parent / "faults"
    faults_directory.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", LIFE, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {FAULTS_VARIABLE: plan, DIRECTORY_VARIABLE: str(faults_directory)},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, int((done.stdout.split() or ["0"])[-1])


def positions(directory: Path) -> list[int]:
    """Of all records, each checked to be what was appended."""
    found = []
    for record in read(directory):
        assert record.header == {"position": record.position}
        assert bytes(record.frames[0]) == bytes([record.position]) * 200
        found.append(record.position)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("point", JOURNAL_POINTS)
def test_killed_at_a_point_and_gone_on(tmp_path: Path, point: str) -> None:
    directory = tmp_path / "journal"
    plan = f"learner:{point}:3"
    code, told = life(directory, plan)
    assert code == -signal.SIGKILL
    assert fired(tmp_path / "faults", 0).exists()
    there = positions(directory)
    assert there == list(range(len(there)))
    assert len(there) >= told
    report = audit.verify(directory)
    assert report.is_sound, report.damage
    assert (report.torn_tail is not None) == (point == "journal.write.half")
    assert life(directory, plan) == (0, RECORDS)
    assert positions(directory) == list(range(RECORDS))
    report = audit.verify(directory)
    assert (report.is_sound, report.torn_tail) == (True, None)


@pytest.mark.processes
def test_the_torn_tail_of_a_group_is_half_of_its_last_record(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    assert life(directory, "learner:journal.write.half:1")[0] == -signal.SIGKILL
    assert positions(directory) == [0, 1, 2], "three of the group's four are whole, though nobody was told so"
    (path,) = segment_paths(directory)
    with Journal(directory, owner="learner-0", run_id="run-1") as journal:
        assert journal.next_position == 3
        torn = journal.recovered
    assert torn is not None
    header_bytes = int.from_bytes(path.read_bytes()[12:16], "little")
    record_bytes = (torn.offset - header_bytes) // 3
    assert abs(torn.bytes_removed - record_bytes / 2) <= 1


@pytest.mark.processes
def test_between_two_segments_nothing_is_half_made(tmp_path: Path) -> None:
    for point, segments in (("journal.segment.before", 1), ("journal.segment.after", 2)):
        directory = tmp_path / point / "journal"
        directory.parent.mkdir()
        assert life(directory, f"learner:{point}:1")[0] == -signal.SIGKILL
        assert len(segment_paths(directory)) == segments
        before = len(positions(directory))
        with Journal(directory, owner="learner-0", run_id="run-1") as journal:
            assert (journal.recovered, journal.next_position) == (None, before)
