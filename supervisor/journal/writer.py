"""The writer of a journal: `append` hands records over, a flusher thread makes them durable in groups.

Theory of operation. `append` gives a record its position and queues it; the flusher takes the whole queue, writes it
with one `writev`, calls `fdatasync`, writes a mark (see `format`), and only then moves `durable_position` and makes
`durable_fd` readable. It starts when the oldest queued record has waited `commit_interval_ms`, when
`commit_records_max` records or `commit_bytes_max` bytes are queued, or when somebody waits in `sync`. While it writes,
the next group gathers by itself, so a slow disk makes larger groups, not longer queues, up to `backlog_bytes_max`.

After a failed write or sync the file's state is unknown (a second `fsync` may succeed although pages were dropped), so
the first error ends the writer for good: every later call raises it, and a new `Journal` on the directory reads what
is really there. `durable_position` stays true throughout.

A write (not a sync) that meets a full disk gives up the reserve, if there is one, and goes on where it stopped; then
`is_on_reserve` says that it is time to take nothing more in. When that room is full too, the failure is final.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import msgspec

from esper_simic.errors import BudgetExceeded, ContractError, InvariantViolation, UnavailableError
from supervisor import faults
from supervisor.clock import Clock, SystemClock
from supervisor.files import DISK_FULL, FileLock, Reserve, exclusive_lock, fsync_directory
from supervisor.journal.format import (
    FRAMES_MAX,
    KIND_BYTES_MAX,
    RECORD_BYTES_MAX,
    TornTail,
    record_bytes,
)
from supervisor.journal.segments import Appended, SegmentWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOCK_NAME: Final = "writer.lock"
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class JournalCounters:
    """What a writer has done since it was opened, and what waits."""

    records: int
    """Records that became durable."""
    bytes: int
    """Their bytes in the file."""
    commits: int
    """Groups that were synced."""
    backlog_bytes: int
    """Bytes appended and not durable yet."""
    backlog_waits: int
    """Appends that had to wait because the backlog was full."""
    reserves_given_up: int
    """How often the reserve was given up to a full disk."""


class Journal:
    """The single writer of one journal; any thread may call it.

    Args:
        directory: Where the segments are; made if missing.
        owner: Whose truth this is, such as `learner-0`.
        run_id: The run it belongs to; an existing journal must name the same owner and run.
        segment_bytes_max: Size in bytes past which a segment is not taken by another record.
        commit_interval_ms: How long the oldest queued record waits for company.
        commit_records_max: Queued records that start a commit at once.
        commit_bytes_max: Queued bytes that start a commit at once.
        backlog_bytes_max: Queued and not yet durable bytes at which `append` blocks until the disk has caught up
            (counted as `backlog_waits`). A single longer record passes when nothing else is queued.
        reserve: Room that is given up when the disk is full, so that what was appended so far can still be written;
            the journal's own until `close`, which gives it back to the disk.
        clock: Stamps the records.

    Raises:
        UnavailableError: Another process (or this one) writes this journal, or the disk refused.
        ConfigError: The directory holds the journal of another owner or run.
        JournalDamage: One of the two newest segments is damaged elsewhere than in its torn tail.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        owner: str,
        run_id: str,
        segment_bytes_max: int = 64 * MIB,
        commit_interval_ms: float = 5.0,
        commit_records_max: int = 256,
        commit_bytes_max: int = MIB,
        backlog_bytes_max: int = 64 * MIB,
        reserve: Reserve | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._commit_interval_s = commit_interval_ms / 1000
        self._commit_records_max = commit_records_max
        self._commit_bytes_max = commit_bytes_max
        self._backlog_bytes_max = backlog_bytes_max
        self._reserve = reserve
        self._reserves_given_up = 0
        self._clock = clock or SystemClock()
        self._encoder = msgspec.msgpack.Encoder()
        with contextlib.ExitStack() as undo:
            self._file_lock, self._segments = self._open(owner, run_id, segment_bytes_max)
            undo.callback(self._file_lock.close)
            undo.callback(self._segments.close)
            self.hold_reserve()
            undo.pop_all()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the flusher waits here
        self._progress = threading.Condition(self._lock)  # callers of sync and append wait here
        self._pending: list[Appended] = []
        self._pending_bytes = 0
        self._pending_since_s = 0.0
        self._backlog_bytes = 0
        self._appends_waiting = 0
        self._next_position = self._durable_position = self._sync_target = self._segments.position
        self._records = self._bytes = self._commits = self._backlog_waits = 0
        self._failure: OSError | None = None
        self._is_end_told = False
        self._is_closing = False
        self._is_flusher_gone = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._flusher = threading.Thread(target=self._run, name=f"journal {owner}", daemon=True)
        self._flusher.start()

    def _open(self, owner: str, run_id: str, segment_bytes_max: int) -> tuple[FileLock, SegmentWriter]:
        """Lock the directory and open its newest segment; on a full disk once more, with the last life's reserve."""
        while True:
            with contextlib.ExitStack() as undo:
                try:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    fsync_directory(self.directory.parent)
                    lock = undo.enter_context(exclusive_lock(self.directory / LOCK_NAME))
                    segments = SegmentWriter(
                        self.directory, owner, run_id, segment_bytes_max, self._give_up_reserve
                    )
                except OSError as error:
                    if error.errno in DISK_FULL and self._give_up_reserve():
                        continue
                    raise UnavailableError(f"cannot open the journal {self.directory}: {error}") from error
                undo.pop_all()
                return lock, segments

    @property
    def recovered(self) -> TornTail | None:
        """The torn tail that was cut off at opening, if there was one."""
        return self._segments.recovered

    @property
    def is_on_reserve(self) -> bool:
        """Whether there is a reserve and it is not held: the disk is full, or too full for it."""
        return self._reserve is not None and not self._reserve.is_held

    def hold_reserve(self) -> bool:
        """Try to keep the reserve back again; whether it is held now, or there is none to hold.

        Raises:
            UnavailableError: The disk refused for another reason than being full.
        """
        if self._reserve is None:
            return True
        try:
            return self._reserve.hold()
        except OSError as error:
            raise UnavailableError(f"cannot keep room in {self._reserve.path}: {error}") from error

    @property
    def next_position(self) -> int:
        """Position that the next appended record will have: the number of records appended so far, ever."""
        return self._next_position

    @property
    def durable_position(self) -> int:
        """All records at positions below it are durable. Never blocks, never raises."""
        return self._durable_position

    @property
    def durable_fd(self) -> int:
        """An event descriptor, readable when `durable_position` has moved or the writer has failed.

        Put it in a poll loop, and call `poll_durable` when it is readable. Valid until `close`.
        """
        return self._event

    @property
    def counters(self) -> JournalCounters:
        """Figures for metrics and benchmarks."""
        with self._lock:
            return JournalCounters(
                self._records,
                self._bytes,
                self._commits,
                self._backlog_bytes,
                self._backlog_waits,
                self._reserves_given_up,
            )

    def append(self, kind: str, header: object, frames: Iterable[Buffer] = ()) -> int:
        """Give a record its position and queue it; durable only when `durable_position` is above that.

        Args:
            kind: What sort of fact it is; 1 to 255 bytes of UTF-8.
            header: A dict or a `msgspec.Struct` that encodes as a MessagePack map.
            frames: Raw buffers, at most 65,535, kept byte for byte (arrays in C order). `bytes` are referenced until
                they are written; anything else may change under its owner's hands and is copied now.

        Returns:
            The record's position: 0 for the first, one more for each.

        Raises:
            ContractError: Kind or header cannot be stored so.
            BudgetExceeded: The record is longer than 1 GiB or has too many frames.
            UnavailableError: The writer has failed; which records are durable, `durable_position` tells.
            InvariantViolation: The journal is closed.
        """
        faults.point("journal.append.before")
        entry_kind = kind.encode()
        entry_header = self._encoder.encode(header)
        entry_frames = tuple(
            [frame if type(frame) is bytes else memoryview(frame).tobytes() for frame in frames]
        )
        size = record_bytes(entry_kind, entry_header, entry_frames)
        _check(kind, len(entry_kind), entry_header[0], len(entry_frames), size)
        with self._lock:
            self._wait_for_room(size)
            position = self._next_position
            self._next_position = position + 1
            time_ns = round(self._clock.now_s() * 1e9)
            self._pending.append(Appended(position, time_ns, entry_kind, entry_header, entry_frames))
            self._pending_bytes += size
            self._backlog_bytes += size
            if len(self._pending) == 1:
                self._pending_since_s = self._clock.monotonic_s()
                self._work.notify()
            elif self._is_group_full():
                self._work.notify()
        faults.point("journal.append.after")
        return position

    def sync(self) -> int:
        """Block until every record appended before this call is durable.

        Returns:
            The durable position: all records at positions below it are durable, whoever appended them.

        Raises:
            UnavailableError: The writer has failed and will not make them durable.
            InvariantViolation: The journal is closed.
        """
        with self._lock:
            self._raise_if_closed()
            self._raise_if_ended()
            target = self._next_position
            self._sync_target = max(self._sync_target, target)
            self._work.notify()
            while self._durable_position < target:
                self._raise_if_ended()
                self._progress.wait()
            return self._durable_position

    def poll_durable(self) -> int:
        """Clear `durable_fd` and give the durable position, without blocking.

        Raises:
            UnavailableError: The writer has failed.
            InvariantViolation: The journal is closed.
        """
        with self._lock:
            self._raise_if_closed()
            self._raise_if_ended()
            with contextlib.suppress(BlockingIOError):  # nothing has moved since the last call
                os.eventfd_read(self._event)
            return self._durable_position

    def close(self) -> None:
        """Make durable what was appended and let go of the directory; twice is harmless.

        Raises:
            UnavailableError: Some appended records did not become durable, and no earlier call has said so.
            InvariantViolation: The same, by a fault of the flusher itself.
        """
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            self._work.notify()
            self._progress.notify_all()
        self._flusher.join()
        self._segments.close()
        if self._reserve is not None:
            self._reserve.give_up()
        self._file_lock.close()
        os.close(self._event)
        if self._durable_position < self._next_position and not self._is_end_told:
            self._raise_if_ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Called with the lock held

    def _wait_for_room(self, size: int) -> None:
        self._raise_if_closed()
        self._raise_if_ended()
        if self._backlog_bytes and self._backlog_bytes + size > self._backlog_bytes_max:
            self._backlog_waits += 1
            self._appends_waiting += 1
            try:
                while self._backlog_bytes and self._backlog_bytes + size > self._backlog_bytes_max:
                    self._work.notify()
                    self._progress.wait()
                    self._raise_if_closed()
                    self._raise_if_ended()
            finally:
                self._appends_waiting -= 1

    def _raise_if_closed(self) -> None:
        if self._is_closing:
            raise InvariantViolation(f"the journal {self.directory} is closed")

    def _raise_if_ended(self) -> None:
        """Tell why the flusher has ended, unless it ended because it was asked to."""
        lost = f"positions from {self._durable_position} on are not durable"
        if self._failure is not None:
            self._is_end_told = True
            raise UnavailableError(
                f"cannot write {self._segments.path} at byte {self._segments.offset}: {self._failure}; {lost}. Make "
                f"{self.directory} writable again and reopen the journal"
            ) from self._failure
        if self._is_flusher_gone and self._durable_position < self._next_position:
            self._is_end_told = True
            raise InvariantViolation(
                f"the flusher of {self.directory} has died of a fault of its own; {lost}"
            )

    def _is_group_full(self) -> bool:
        return (
            len(self._pending) >= self._commit_records_max
            or self._pending_bytes >= self._commit_bytes_max
            or self._sync_target > self._durable_position
            or self._appends_waiting > 0
            or self._is_closing
        )

    # The flusher thread

    def _run(self) -> None:
        try:
            while batch := self._next_group():
                self._commit(batch)
            self._segments.sync()
        except OSError as error:
            self._failure = error
        finally:
            with self._lock:
                self._is_flusher_gone = True
                os.eventfd_write(self._event, 1)
                self._progress.notify_all()

    def _next_group(self) -> list[Appended]:
        """Wait for a group to commit; empty when the journal is closing and nothing is left."""
        with self._lock:
            while not self._pending and not self._is_closing:
                self._work.wait()
            due_s = self._pending_since_s + self._commit_interval_s
            while not self._is_group_full():
                remaining_s = due_s - self._clock.monotonic_s()
                if remaining_s <= 0 or not self._work.wait(min(remaining_s, self._commit_interval_s)):
                    break
            batch, self._pending, self._pending_bytes = self._pending, [], 0
            return batch

    def _give_up_reserve(self) -> bool:
        """Give the reserve up to a full disk; whether that made room."""
        if self._reserve is None or not self._reserve.give_up():
            return False
        self._reserves_given_up += 1
        return True

    def _commit(self, batch: list[Appended]) -> None:
        self._segments.write(batch)
        try:
            self._segments.mark()
        finally:  # without its mark the group is durable all the same
            size = sum(record_bytes(entry.kind, entry.header, entry.frames) for entry in batch)
            with self._lock:
                self._durable_position = batch[-1].position + 1
                self._backlog_bytes -= size
                self._records += len(batch)
                self._bytes += size
                self._commits += 1
                os.eventfd_write(self._event, 1)
                self._progress.notify_all()


def _check(kind: str, kind_bytes: int, header_start: int, frame_count: int, size: int) -> None:
    """Refuse what the format cannot hold, before it has a position."""
    if not 0 < kind_bytes <= KIND_BYTES_MAX:
        raise ContractError(f"a record's kind takes 1 to {KIND_BYTES_MAX} bytes of UTF-8, not {kind_bytes}")
    if not (0x80 <= header_start <= 0x8F or header_start in (0xDE, 0xDF)):
        raise ContractError(
            f"the header of a {kind} does not encode as a MessagePack map: give a dict or a Struct"
        )
    if frame_count > FRAMES_MAX:
        raise BudgetExceeded(f"a {kind} of {frame_count} frames; a record has at most {FRAMES_MAX}")
    if size > RECORD_BYTES_MAX:
        raise BudgetExceeded(f"a {kind} of {size} bytes; a record has at most {RECORD_BYTES_MAX}")
