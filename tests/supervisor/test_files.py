from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import UnavailableError
from supervisor import files
from supervisor.clock import ManualClock, SystemClock
from supervisor.files import Reserve, exclusive_lock, free_bytes, fsync_directory, write_atomically


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_a_path_has_the_new_contents_whole_and_nothing_lies_beside_it(tmp_path_factory, old, new):
    directory = tmp_path_factory.mktemp("atomic")
    path = directory / "state"
    write_atomically(path, old)
    write_atomically(path, memoryview(new))
    assert path.read_bytes() == new
    assert [entry.name for entry in directory.iterdir()] == ["state"]


def test_a_refused_write_leaves_the_old_contents_and_no_rest(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_the_rest_of_a_crashed_write_is_replaced(tmp_path):
    (tmp_path / ".state.tmp").write_bytes(b"longer than what comes now")
    write_atomically(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"
    assert not (tmp_path / ".state.tmp").exists()


def test_order_of_the_durable_write(tmp_path, monkeypatch):
    """Bytes before the name, the name before the directory's sync: any other order loses something in a power cut."""
    seen = []
    real_fsync, path = os.fsync, tmp_path / "state"

    def fsync(descriptor):
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append((target.name, path.exists()))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"bytes")
    assert seen == [(".state.tmp", False), (tmp_path.name, True)]


def test_a_directory_that_is_not_there_cannot_be_synced(tmp_path):
    with pytest.raises(FileNotFoundError):
        fsync_directory(tmp_path / "missing")


def test_free_bytes_is_what_df_says(tmp_path):
    def df_bytes():
        out = subprocess.run(
            ["df", "--output=avail", "-B1", tmp_path], check=True, capture_output=True, text=True
        ).stdout
        return int(out.split()[1])

    before, ours, after = df_bytes(), free_bytes(tmp_path), df_bytes()
    assert min(before, after) - 2**30 <= ours <= max(before, after) + 2**30  # others use this disk too
    assert ours > 0


RESERVED_BYTES = 3 * 2**20


def test_a_reserve_takes_room_on_the_disk_and_gives_it_back(tmp_path):
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    assert (reserve.is_held, reserve.give_up()) == (False, False)
    for _ in range(2):
        assert (reserve.hold(), reserve.is_held) == (True, True)
        facts = reserve.path.stat()
        assert facts.st_size == RESERVED_BYTES
        assert facts.st_blocks * 512 >= RESERVED_BYTES, "a hole would keep nothing back"
    assert Reserve(tmp_path / "reserve", RESERVED_BYTES).is_held, "of a life before"
    assert (reserve.give_up(), reserve.is_held) == (True, False)
    assert list(tmp_path.iterdir()) == []


def test_a_reserve_of_another_size_or_half_made_is_made_anew(tmp_path):
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    for size in (0, 100, 2 * RESERVED_BYTES):
        with reserve.path.open("wb") as file:
            file.truncate(size)
        assert not reserve.is_held
        assert reserve.hold()
        assert reserve.path.stat().st_size == RESERVED_BYTES


def test_no_bytes_are_always_held_and_never_given_up(tmp_path):
    reserve = Reserve(tmp_path / "reserve", 0)
    assert reserve.is_held
    assert reserve.hold()
    assert not reserve.give_up()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "held"), [(2 * RESERVED_BYTES, True), (2 * RESERVED_BYTES - 1, False)])
def test_room_is_kept_back_only_where_as_much_is_left_to_work_with(tmp_path, monkeypatch, free, held):
    monkeypatch.setattr(files, "free_bytes", lambda _: free)
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    assert reserve.hold() is held
    assert reserve.is_held is held
    assert reserve.path.exists() is held


def test_a_disk_that_fills_up_meanwhile_holds_nothing_and_another_refusal_is_told(tmp_path, monkeypatch):
    reserve = Reserve(tmp_path / "reserve", RESERVED_BYTES)
    for number, told in ((errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)):

        def refuse(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        if told:
            with pytest.raises(OSError, match="Input/output error"):
                reserve.hold()
        else:
            assert not reserve.hold()
        assert list(tmp_path.iterdir()) == []


def test_one_holder_and_the_refusal_names_it(tmp_path):
    path = tmp_path / "writer.lock"
    with exclusive_lock(path), pytest.raises(UnavailableError, match=f"{tmp_path}.*process {os.getpid()}"):
        exclusive_lock(path)
    with exclusive_lock(path) as lock:  # given back
        lock.close()
        lock.close()
        exclusive_lock(path).close()


@pytest.mark.processes
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    path = tmp_path / "writer.lock"
    script = (
        "import sys, pathlib, supervisor.files as f\n"
        "lock = f.exclusive_lock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UnavailableError, match=f"process {holder.pid}"):
            exclusive_lock(path)
        holder.kill()
        holder.wait()
    exclusive_lock(path).close()


def test_manual_time_moves_only_when_told():
    clock = ManualClock(now_s=1000.0, monotonic_s=5.0)
    assert (clock.now_s(), clock.monotonic_s()) == (1000.0, 5.0)
    clock.advance(2.5)
    assert (clock.now_s(), clock.monotonic_s()) == (1002.5, 7.5)
    clock.set_now(10.0)
    assert (clock.now_s(), clock.monotonic_s()) == (10.0, 7.5)
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1.0)


def test_system_time_agrees_with_the_machine(tmp_path):
    clock = SystemClock()
    (tmp_path / "touched").touch()
    assert abs(clock.now_s() - (tmp_path / "touched").stat().st_mtime) < 60
    first = clock.monotonic_s()
    assert clock.monotonic_s() >= first
