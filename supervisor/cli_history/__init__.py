"""The door to a run's past: its event log, its checkpoints, and doing it all again.

Nothing here needs a living run, and nothing here changes one.
"""

from __future__ import annotations

from supervisor.cli_history.checkpoint import checkpoint_app
from supervisor.cli_history.log import log_app
from supervisor.cli_history.recovery import verify_recovery
from supervisor.cli_history.replay import replay

__all__ = ["checkpoint_app", "log_app", "replay", "verify_recovery"]
