"""What this process was about to do when it died: a few bytes that outlive a crash, so that none is repeated for ever.

Before it folds a record, loads a checkpoint or makes an update, the learner writes here what it is; afterwards it
writes that nothing is under way. The bytes lie in a mapped file, so a killed process leaves them behind, and no write
costs a system call. A power cut may lose them; then one failure is not counted.

This is a hint, not a truth: what is done about repeated failures is an event in the journal.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

_LAYOUT: Final = struct.Struct("<QqQqQ")


class Work(IntEnum):
    """What can be under way; its number says which."""

    NOTHING = 0
    RECORD = 1
    """Folding the record at a position."""
    STEP = 2
    """Making an update."""
    CHECKPOINT = 3
    """Loading the checkpoint staged at a position."""


_KNOWN: Final = frozenset(Work) - {Work.NOTHING}
"""What can have failed; after a power cut the file may hold anything."""


class Failed(NamedTuple):
    """What the life before this one died of, and how many lives in a row have died of the same."""

    work: Work
    number: int
    failures: int


class Attempts:
    """The file of one learner.

    Args:
        path: Made if missing.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, _LAYOUT.size)
            self._bytes = mmap.mmap(descriptor, _LAYOUT.size)
        finally:
            os.close(descriptor)
        self.failed = self._count()

    def _count(self) -> Failed:
        """Count what was under way as a failure: again if it was so before, else the first one."""
        work, number, last_work, last_number, failures = _LAYOUT.unpack_from(self._bytes)
        if work not in _KNOWN:
            return Failed(Work.NOTHING, 0, 0)
        failures = failures + 1 if (work, number) == (last_work, last_number) else 1
        _LAYOUT.pack_into(self._bytes, 0, Work.NOTHING, 0, work, number, failures)
        return Failed(Work(work), number, failures)

    def begin(self, work: Work, number: int) -> None:
        """Say what is under way now."""
        struct.pack_into("<Qq", self._bytes, 0, work, number)

    def end(self) -> None:
        """Say that nothing is."""
        struct.pack_into("<Qq", self._bytes, 0, Work.NOTHING, 0)

    def close(self) -> None:
        """Let go of the file; twice is harmless."""
        self._bytes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
