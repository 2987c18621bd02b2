"""How much memory processes hold. Values only; what to do about them is decided elsewhere.

Resident size is cheap (a read of one file) and counts shared pages in every process that maps them, so forked
children look larger than they are. Proportional size divides shared pages among those who share them, adds up to the
truth, and costs the kernel milliseconds a process: ask for it rarely.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import psutil

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Resident set of a process in bytes; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional_bytes(pid: int) -> int:
    """Resident set in which a page shared by n processes counts as a n-th, in bytes; 0 once the process is gone.

    Raises:
        PermissionError: The process belongs to somebody else.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def machine_total_bytes() -> int:
    """Memory of this machine in bytes."""
    return int(psutil.virtual_memory().total)


def machine_available_bytes() -> int:
    """Memory that could be given to processes without swapping, in bytes."""
    return int(psutil.virtual_memory().available)
