"""First module the fork server imports: it must die with the supervisor, and its words belong into a log.

Importing this module acts, which is the only hook a fork server offers. The children keep the fork server alive, and
the kernel's parent-death signal of a child fires when *its* parent, the fork server, ends; so without this line a
killed supervisor would leave all of them behind.
"""

from __future__ import annotations

import os
from typing import Final

from supervisor.lifeline import die_with_parent

LOG_VARIABLE: Final = "SIMIC_FORKSERVER_LOG"
"""Environment variable with the path of the file that takes the fork server's output."""

if LOG_VARIABLE in os.environ:
    die_with_parent()
    _log = os.open(os.environ[LOG_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(_log, 1)
    os.dup2(_log, 2)
    os.close(_log)
