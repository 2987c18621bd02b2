"""Durable writes: what a caller may rely on after a power cut.

A file's bytes are durable after `fsync` of the file, its *name* only after `fsync` of the directory. A rename replaces
a name in one step, so whoever opens it finds the old bytes or the new, never a mixture. Every function raises the
plain `OSError`: the organ that called knows what it means.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from esper_simic.errors import UnavailableError

DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors that say there is no room."""


def write_atomically(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Give `path` new contents, durably: all of them or none.

    The bytes go to `.<name>.tmp` beside it, are synced, renamed over `path`, and the directory is synced. One writer a
    path: two at once would share the temporary file. A crash leaves at most that file, which the next write replaces.

    Args:
        path: The file to make or replace; its directory must exist.
        data: The whole new contents.

    Raises:
        OSError: Nothing under `path` has changed, unless only the last sync of the directory failed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            remaining = memoryview(data).cast("B")
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable: files made, renamed and removed there before.

    Raises:
        OSError: The directory is missing or the disk refused.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write on the file system of `path`."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


class Reserve:
    """Room on the disk kept back for last words: a file of that size, given up when the disk is full.

    It says nothing about the room that is left when it is given up: others may write on the same disk.

    Args:
        path: The file; its directory must exist.
        reserved_bytes: How much; 0 keeps nothing, and is always held.
    """

    def __init__(self, path: Path, reserved_bytes: int) -> None:
        self.path = path
        self._bytes = reserved_bytes
        self._lock = threading.Lock()  # one thread gives up what another holds

    @property
    def is_held(self) -> bool:
        """Whether the room is kept back now."""
        if self._bytes == 0:
            return True
        try:
            return self.path.stat().st_size == self._bytes
        except FileNotFoundError:
            return False

    def hold(self) -> bool:
        """Keep the room back; whether it is kept now.

        Not before the disk has twice the room: who begins to work again when he holds it must not meet the full disk
        at once.

        Raises:
            OSError: The disk refused for another reason than being full.
        """
        with self._lock:
            if self.is_held:
                return True
            self.path.unlink(missing_ok=True)
            if free_bytes(self.path.parent) < 2 * self._bytes:
                return False
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, self._bytes)
            except OSError as error:
                self.path.unlink(missing_ok=True)
                if error.errno in DISK_FULL:
                    return False
                raise
            finally:
                os.close(descriptor)
            return True

    def give_up(self) -> bool:
        """Give the room back to the disk; whether there was any."""
        with self._lock:
            try:
                self.path.unlink()
            except FileNotFoundError:
                return False
            return self._bytes > 0


class FileLock:
    """An exclusive lock on a file, held until `close` or the end of the process. Made by `exclusive_lock`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        """Give the lock back. The file stays: removing it would let two holders lock two files of one name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def exclusive_lock(path: Path) -> FileLock:
    """Take the lock of `path` at once or not at all, and leave this process's id in the file.

    The kernel gives the lock back however the process ends, so there is no stale lock to clean up. A second attempt is
    refused inside the same process too.

    Args:
        path: The lock file; made if missing, its directory must exist.

    Returns:
        The lock; close it to give it back.

    Raises:
        UnavailableError: Somebody else holds it; names the file's directory and the holder's process id.
        OSError: The file cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise UnavailableError(
            f"{path.parent} is in use by process {holder} (lock file {path.name}): stop it, or use another directory"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return FileLock(path, descriptor)
