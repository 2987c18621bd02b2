"""Runs as they lie on a disk, for pages: journals whose records are at the times of their events."""

from __future__ import annotations

from pathlib import Path

from supervisor.clock import ManualClock
from supervisor.events import RunConfigured
from supervisor.journal import Journal
from tests.supervisor.worlds import World


def write_supervisor(run_dir: Path, world: World, run_id: str = "run-1") -> None:
    """The supervisor's journal of a world; a life that begins with `RunResumed` counts from its own start."""
    clock, base_s = ManualClock(), 0.0
    directory = run_dir / "journal" / "supervisor"
    with Journal(directory, owner="supervisor", run_id=run_id, clock=clock) as journal:
        for event in world.events:
            if isinstance(event, RunConfigured):
                base_s = event.started_unix_s
            clock.set_now(base_s + event.at_s)
            journal.append(type(event).__name__, event)
        journal.sync()


def write_learner(run_dir: Path, *events: tuple[float, object], run_id: str = "run-1") -> None:
    """A learner's journal: each event at its second."""
    clock = ManualClock()
    directory = run_dir / "journal" / "learner-0"
    with Journal(directory, owner="learner-0", run_id=run_id, clock=clock) as journal:
        for at_s, event in events:
            clock.set_now(at_s)
            journal.append(type(event).__name__, event)
        journal.sync()
