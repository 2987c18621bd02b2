"""What is asked of a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from supervisor.playback.breaks import BreakCondition

START: Final = "start"


class Request(NamedTuple):
    """What to replay, and where to stop."""

    run_dir: Path
    owner: str = "learner-0"
    origin: str = START
    """`start`, or the name of a checkpoint."""
    until: int | None = None
    """Stop after this step."""
    verify: bool = False
    """Compare every checkpoint on disk that is passed, tensor by tensor."""
    condition: BreakCondition | None = None
    """Stop before the steps for which it holds."""
