"""No orphan, ever: how a process makes sure that it ends with the one that started it.

Two lines, because each alone has a gap. The kernel's parent-death signal (`die_with_parent`) kills at once, but is
lost when the parent died before it was asked for, and is tied to the thread that forked. The watch on the parent's
sentinel (`exit_with_parent`) closes both gaps, but needs this process to run Python. A fork server counts as the parent
of its children, so it needs the first line itself; `forkserver_preload` gives it that.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from typing import Final

PR_SET_PDEATHSIG: Final = 1

ORPHANED_EXIT_CODE: Final = 70
"""Exit status of a child that noticed its parent's death itself (EX_SOFTWARE of sysexits)."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that forked it ends; Linux only, elsewhere nothing.

    Raises:
        OSError: The kernel refused.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


def exit_with_parent() -> None:
    """Start a thread that ends this process, without any cleaning up, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(ORPHANED_EXIT_CODE)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
