"""The event log: an append-only, checksummed file format with one writer and any number of readers.

`Journal` writes, `read`, `read_last` and `Tail` read, `format` says what stands in the files.
"""

from __future__ import annotations

from supervisor.journal.format import JournalDamage, Record, TornTail
from supervisor.journal.reader import Tail, read, read_last
from supervisor.journal.writer import Journal, JournalCounters

__all__ = ["Journal", "JournalCounters", "JournalDamage", "Record", "Tail", "TornTail", "read", "read_last"]
