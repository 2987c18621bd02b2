"""Cutting the power under a journal's writer: `python -m tests.system.powercut write|verify|cut …`.

A power cut is an ext4 file system that is shut down without writing its journal or its dirty pages: what was not on the
device at that moment never gets there. It does not model a drive that lies about its own cache.

* `write DIRECTORY` appends records of a known content for ever and prints the durable position after each sync. With
  `--unsynced` it believes that data is durable when it is written: the control, which must lose something.
* `verify DIRECTORY` reads what a cut has left, opens the journal for writing as a restarted process would, goes on, and
  prints how many records there were.
* `cut DIRECTORY COUNT` does both on a fresh file system each time and prints what was promised and what was found.
  It mounts: run it in a mount namespace of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from supervisor import audit
from supervisor.journal import Journal, JournalDamage, read

EXT4_IOC_SHUTDOWN: Final = 0x8004587D
NO_LOG_FLUSH: Final = 2
IMAGE_BYTES: Final = 1 << 28
SEGMENT_BYTES_MAX: Final = 1 << 19
UNSYNCED: Final = "--unsynced"
CUT_AFTER_S: Final = (0.05, 0.4)
"""Between the first promise and the cut."""
DEADLINE_S: Final = 60.0


def content(position: int) -> bytes:
    """What the record at a position holds: some bytes to many, none of them by chance."""
    seed = hashlib.sha256(str(position).encode()).digest()
    return seed * (1 + seed[0] * 8)


def open_journal(directory: Path) -> Journal:
    """The journal under test: small segments, so that cuts meet new ones too."""
    return Journal(directory, owner="cut", run_id="cut", segment_bytes_max=SEGMENT_BYTES_MAX)


def write(directory: Path) -> None:
    """Append and sync for ever; each line is a promise."""
    with open_journal(directory) as journal:
        while True:
            for _ in range(random.randrange(1, 8)):
                position = journal.next_position
                journal.append("Cut", {"position": position}, [content(position)])
            os.write(1, b"%d\n" % journal.sync())


def verify(directory: Path) -> int:
    """Read all that is left, go on writing, read again; the number of records that were left."""
    count = _count_whole(directory)
    report = audit.verify(directory)
    if not report.is_sound:
        raise SystemExit(f"damage after a cut: {report.damage}")
    with open_journal(directory) as journal:
        if journal.next_position != count:
            raise SystemExit(f"a reader finds {count} records, a writer goes on at {journal.next_position}")
        journal.append("Cut", {"position": count}, [content(count)])
    if _count_whole(directory) != count + 1:
        raise SystemExit("what is written after the cut cannot be read")
    return count


def _count_whole(directory: Path) -> int:
    count = 0
    for record in read(directory):
        if record.position != count or bytes(record.frames[0]) != content(count):
            raise SystemExit(f"record {record.position} at place {count} is not what was written")
        count += 1
    return count


def count_left(directory: Path) -> int:
    """Records before the first damage: what a writer leaves that has not synced."""
    count = 0
    with suppress(JournalDamage):
        for record in read(directory):
            count = record.position + 1
    return count


class Cut(NamedTuple):
    """What was promised before a cut, what was found after it, in how many segments."""

    promised: int
    found: int
    segments: int


def cut(scratch: Path, after_s: float, *options: str) -> Cut:
    """One power cut under a writer on a fresh file system; needs root, loop devices and ext4."""
    image, mount, promises = scratch / "image", scratch / "mount", scratch / "promises"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", image)
    mount.mkdir(exist_ok=True)
    with _mounted(image, mount), promises.open("wb") as out:
        os.sync()
        command = [sys.executable, "-m", "tests.system.powercut", "write", str(mount / "journal"), *options]
        with subprocess.Popen(command, stdout=out) as writer:
            try:
                _await_promise(promises, writer)
                time.sleep(after_s)
                # Read before the cut: every one of these must survive it.
                promised = int(promises.read_bytes().split(b"\n")[-2])
                _shut_down(mount)
            finally:
                writer.kill()
    with _mounted(image, mount):
        found = count_left(mount / "journal") if UNSYNCED in options else verify(mount / "journal")
        return Cut(promised, found, len(list((mount / "journal").glob("*.log"))))


@contextmanager
def _mounted(image: Path, mount: Path) -> Iterator[None]:
    _run("mount", "-o", "loop", image, mount)
    try:
        yield
    finally:
        _run("umount", mount)


def _await_promise(promises: Path, writer: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while b"\n" not in promises.read_bytes():
        if writer.poll() is not None:
            raise SystemExit(f"the writer ended with {writer.returncode} before the power was cut")
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the writer promised nothing within {DEADLINE_S:g} s")
        time.sleep(0.003)


def _shut_down(mount: Path) -> None:
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(descriptor)


def _run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def main() -> None:
    """Write, verify, or cut so many times and print what came of it."""
    what, directory, *rest = sys.argv[1:]
    options = [word for word in rest if word == UNSYNCED]
    if what == "write":
        if options:
            os.fdatasync = lambda _: None  # type: ignore[assignment]
        write(Path(directory))
    elif what == "verify":
        sys.stdout.write(f"{verify(Path(directory))}\n")
    else:
        for _ in range(int(rest[0])):
            seen = cut(Path(directory), random.uniform(*CUT_AFTER_S), *options)
            sys.stdout.write(f"{seen.promised} {seen.found} {seen.segments}\n")


if __name__ == "__main__":
    main()
