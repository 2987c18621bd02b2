"""A journal on a disk that is really full: small file systems of their own, filled to the last block.

Nothing is simulated but what no disk can be made to do on demand: a refused *sync*.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper_simic.errors import UnavailableError
from supervisor.files import Reserve
from supervisor.journal import Journal, read
from supervisor.journal.format import segment_paths

ROOT = Path(__file__).parents[2]
RESERVED_BYTES = 1 << 20


def run_on_small_disk(script: str, place: Path, kind: str, *arguments: str) -> str:
    """Run a script with the mount point of a fresh 8 MiB file system as its first argument; what it printed."""
    place.mkdir(exist_ok=True)
    mounted, image = place / "mounted", place / "image"
    mounted.mkdir()
    if kind == "tmpfs":
        mount = 'mount -t tmpfs -o size=8m tmpfs "$1"'
        isolate = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
        needed = [*isolate, "true"]
    else:
        if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
            pytest.skip("ext4 on a loop device needs root, mkfs.ext4 and /dev/loop-control")
        with image.open("wb") as file:
            file.truncate(8 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True, capture_output=True)
        mount = 'mount -o loop "$2" "$1"'
        isolate = ["unshare", "-m"]
        needed = [*isolate, "sh", "-c", f'{mount} && umount "$1"', "sh", str(mounted), str(image)]
    probe = subprocess.run(needed, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no {kind} of one's own can be mounted here: {probe.stderr.strip()}")
    shell = f'{mount} && shift 2 && exec "$@"'
    command = [sys.executable, "-c", script, str(mounted), *arguments]
    done = subprocess.run(
        [*isolate, "sh", "-c", shell, "sh", str(mounted), str(image), *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMON = """
import os, sys
from pathlib import Path
from esper_simic.errors import UnavailableError
from supervisor import audit
from supervisor.files import Reserve, free_bytes
from supervisor.journal import Journal, Tail, read

disk = Path(sys.argv[1])
directory = disk / "journal"

def reserve():
    return Reserve(disk / "reserve", 1 << 20)

def open_journal(**options):
    return Journal(directory, owner="learner-0", run_id="run-1", reserve=reserve(), **options)

def fill(leave_bytes=0):
    "Take all room on the disk but so much."
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        for size in (65536, 4096, 512, 1):
            try:
                while free_bytes(disk) - leave_bytes >= size and ballast.write(bytes(size)):
                    pass
            except OSError:
                pass

def append(journal, size):
    position = journal.next_position
    return journal.append("Step", {"position": position}, [position.to_bytes(4, "big") * (size // 4)])

def check(count):
    "Every record is there once, in order, as it was appended."
    number = -1
    for number, record in enumerate(read(directory)):
        assert record.position == record.header["position"] == number
        frame = bytes(record.frames[0])
        assert frame == number.to_bytes(4, "big") * (len(frame) // 4)
    assert number + 1 == count, (number + 1, count)
    report = audit.verify(directory)
    assert report.is_sound and report.torn_tail is None, report
"""

GOES_ON = (
    COMMON
    + """
segment_bytes, group = int(sys.argv[2]), int(sys.argv[3])
journal = open_journal(segment_bytes_max=segment_bytes, commit_interval_ms=1e9)
assert not journal.is_on_reserve and reserve().is_held
follower = Tail(directory)
append(journal, 1000)
assert journal.sync() == 1
fill(leave_bytes=50_000)
refused = None
while not journal.is_on_reserve:
    for _ in range(group):
        append(journal, 3000)
    assert journal.sync() == journal.next_position  # the group that met the full disk too
    follower.poll(10**6)
assert journal.counters.reserves_given_up == 1
assert not (disk / "reserve").exists()
on_reserve = journal.next_position
for _ in range(20):  # the last words
    append(journal, 3000)
    journal.sync()
assert not journal.hold_reserve() and journal.is_on_reserve, "no room yet"
follower.poll(10**6)
assert follower.position == journal.next_position
(disk / "ballast").unlink()
assert journal.hold_reserve() and not journal.is_on_reserve
for _ in range(group):
    append(journal, 3000)
count = journal.sync()
check(count)
follower.poll(10**6)
assert follower.position == count
journal.close()
assert not (disk / "reserve").exists(), "what is kept back belongs to a living writer"
with open_journal() as journal:
    assert (journal.next_position, journal.recovered) == (count, None)
    append(journal, 100)
check(count + 1)
print("on reserve at", on_reserve, "of", count)
"""
)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize(
    ("segment_bytes", "group"), [(1 << 26, 1), (1 << 26, 40), (4000, 1), (4000, 40), (20_000, 7)]
)
def test_what_was_appended_is_written_with_the_reserve_and_all_goes_on_when_there_is_room(
    tmp_path: Path, kind: str, segment_bytes: int, group: int
) -> None:
    """Small segments, so that the disk is full at a new segment's header too; large groups, torn in the middle."""
    said = run_on_small_disk(GOES_ON, tmp_path / "disk", kind, str(segment_bytes), str(group))
    assert said.startswith("on reserve at")


FILLS_BOTH = (
    COMMON
    + """
journal = open_journal(segment_bytes_max=100_000)
fill(leave_bytes=50_000)
durable = 0
try:
    while True:
        append(journal, 3000)
        durable = journal.sync()
except UnavailableError as error:
    print(error)
assert journal.is_on_reserve and journal.counters.reserves_given_up == 1
on_disk = len(list(read(directory)))
assert on_disk >= durable > 300, "the reserve's room was used, and nothing acknowledged is gone"
journal.close()
try:
    open_journal().close()
except UnavailableError as error:
    print(error)  # there may be no room for a lock's text or a mark
(disk / "ballast").unlink()
with open_journal() as journal:
    assert not journal.is_on_reserve
    assert journal.next_position >= durable
    append(journal, 3000)
    count = journal.sync()
check(count)
print("went on after", durable)
"""
)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_when_the_reserve_is_full_too_the_failure_is_final_and_nothing_acknowledged_is_lost(
    tmp_path: Path, kind: str
) -> None:
    said = run_on_small_disk(FILLS_BOTH, tmp_path / "disk", kind)
    assert "No space left on device; positions from" in said
    assert "went on after" in said


WITHOUT_RESERVE = (
    COMMON
    + """
reserve = lambda: None
journal = open_journal(segment_bytes_max=100_000)
fill(leave_bytes=500_000)
durable = 0
try:
    while True:
        append(journal, 3000)
        durable = journal.sync()
except UnavailableError as error:
    print(error)
assert not journal.is_on_reserve
journal.close()
(disk / "ballast").unlink()
with open_journal() as journal:
    assert journal.next_position >= durable > 100
    append(journal, 3000)
    count = journal.sync()
check(count)
print("went on after", durable)
"""
)


@pytest.mark.processes
def test_without_a_reserve_a_full_disk_is_final_at_once_and_nothing_acknowledged_is_lost(
    tmp_path: Path,
) -> None:
    said = run_on_small_disk(WITHOUT_RESERVE, tmp_path / "disk", "tmpfs")
    assert "No space left on device; positions from" in said
    assert "went on after" in said


OPENS_ON_FULL = (
    COMMON
    + """
pid = os.fork()
if pid == 0:  # a life that is killed while it holds the reserve
    journal = open_journal()
    for _ in range(10):
        append(journal, 3000)
    journal.sync()
    with open(next(directory.glob("*.log")), "ab") as file:
        file.write(b"torn")
    os.kill(os.getpid(), 9)
os.waitpid(pid, 0)
assert reserve().is_held
(directory / "writer.lock").unlink()  # its text needs a block
fill()
journal = open_journal()
assert journal.recovered is not None
assert journal.is_on_reserve and journal.counters.reserves_given_up == 1
for _ in range(20):
    append(journal, 3000)
journal.sync()
journal.close()
check(30)
print("opened")
"""
)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_journal_opens_on_a_full_disk_with_the_reserve_of_the_life_before(
    tmp_path: Path, kind: str
) -> None:
    assert run_on_small_disk(OPENS_ON_FULL, tmp_path / "disk", kind) == "opened\n"


# ---- what no disk does on demand -------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_refused_sync_is_final_whatever_is_in_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows which pages were dropped: a second sync that succeeds would be a lie."""
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    journal = Journal(tmp_path / "journal", owner="learner-0", run_id="run-1", reserve=reserve)
    journal.append("Step", {})
    assert journal.sync() == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        journal.append("Step", {})
        with pytest.raises(UnavailableError, match="No space left on device; positions from 1 on"):
            journal.sync()
    assert reserve.is_held
    assert journal.durable_position == 1
    journal.close()


def test_a_new_segment_whose_name_may_not_be_durable_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    options = {"owner": "learner-0", "run_id": "run-1", "segment_bytes_max": 200}
    journal = Journal(tmp_path / "journal", reserve=reserve, **options)  # type: ignore[arg-type]
    journal.append("Step", {}, [bytes(300)])
    assert journal.sync() == 1
    with monkeypatch.context() as patch:
        patch.setattr("supervisor.files.fsync_directory", full)
        journal.append("Step", {}, [bytes(300)])
        with pytest.raises(UnavailableError, match="No space left on device; positions from 1 on"):
            journal.sync()
    assert reserve.is_held
    journal.close()
    assert len(segment_paths(tmp_path / "journal")) == 2
    with Journal(tmp_path / "journal", **options) as again:  # type: ignore[arg-type]
        assert (again.recovered, again.append("Step", {})) == (None, 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_the_reserve_is_given_up_to_a_full_disk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    journal = Journal(tmp_path / "journal", owner="learner-0", run_id="run-1", reserve=reserve)
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", refuse)
        journal.append("Step", {})
        with pytest.raises(UnavailableError, match=os.strerror(number)):
            journal.sync()
    assert reserve.is_held
    journal.close()


def test_a_quota_is_a_full_disk_and_the_write_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the group is in the file when the disk refuses: those bytes are not written again."""
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    journal = Journal(
        tmp_path / "journal", owner="learner-0", run_id="run-1", reserve=reserve, commit_interval_ms=1e9
    )
    sizes: list[int] = []
    path = segment_paths(tmp_path / "journal")[0]

    def writev(descriptor: int, buffers: list[bytes]) -> int:
        sizes.append(path.stat().st_size)
        if len(sizes) == 2:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        data = b"".join(buffers)
        return os.write(descriptor, data[: len(data) // 2] if len(sizes) == 1 else data)

    monkeypatch.setattr(os, "writev", writev)
    for index in range(4):
        journal.append("Step", {"index": index}, [bytes([index]) * 999])
    assert journal.sync() == 4
    assert sizes == sorted(sizes), "a file never shrinks under its readers"
    assert journal.is_on_reserve
    journal.close()
    assert [record.header["index"] for record in read(tmp_path / "journal")] == [0, 1, 2, 3]


def test_without_a_reserve_there_is_none_to_hold(tmp_path: Path) -> None:
    with Journal(tmp_path, owner="learner-0", run_id="run-1") as journal:
        assert journal.hold_reserve()
        assert not journal.is_on_reserve


def test_a_reserve_that_cannot_be_made_lets_go_of_the_journal(tmp_path: Path) -> None:
    bad = Reserve(tmp_path / "missing" / "reserve", RESERVED_BYTES)
    with pytest.raises(UnavailableError, match=f"cannot keep room in {bad.path}"):
        Journal(tmp_path / "journal", owner="learner-0", run_id="run-1", reserve=bad)
    Journal(tmp_path / "journal", owner="learner-0", run_id="run-1").close()
