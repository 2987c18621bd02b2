"""Looking back: a learner's run done again from its journal, step by step, and compared with what it was.

`replay` does it; `parse_break` reads where to stop; `words` says what was found.
"""

from __future__ import annotations

from supervisor.playback.breaks import RequestError, parse_break
from supervisor.playback.pause import Pause, console
from supervisor.playback.replay import Progress, replay
from supervisor.playback.report import Audited, ReplayReport
from supervisor.playback.request import START, Request
from supervisor.playback.wording import words

__all__ = [
    "START",
    "Audited",
    "Pause",
    "Progress",
    "ReplayReport",
    "Request",
    "RequestError",
    "console",
    "parse_break",
    "replay",
    "words",
]
