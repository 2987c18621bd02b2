"""A run in a run directory: taken, begun or gone on with, and left in order."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from esper_simic.config import Config
from esper_simic.errors import UnavailableError
from supervisor import files
from supervisor.bus import runtime_directory
from supervisor.clock import Clock
from supervisor.decide import is_done
from supervisor.events import (
    Role,
)
from supervisor.loop import Observer, RunFacts, Supervisor
from supervisor.outcome import RunOutcome, outcome_of, past_of
from supervisor.processes import LocalPlacement
from supervisor.resume import check_resumable
from supervisor.signals import signal_inbox

ROLES: Final[dict[Role, str]] = {
    "learner": "supervisor.roles.learner:main",
    "actor": "supervisor.roles.actor:main",
    "evaluate": "supervisor.roles.evaluate:main",
}
"""The main of each role."""

PRELOAD: Final = ("supervisor.roles.actor", "supervisor.roles.evaluate")
"""What the fork server imports once for all its children."""


def run(
    run_dir: Path,
    config: Config,
    facts: RunFacts,
    *,
    clock: Clock,
    observer: Observer | None = None,
    roles: Mapping[Role, str] | None = None,
    preload: tuple[str, ...] = PRELOAD,
) -> RunOutcome:
    """Train and evaluate in a run directory; returns when no child is left.

    A directory with a finished run gives its outcome again, unless the run is extended to other limits; any other run
    in it goes on, however it ended. Must be called in the main thread.

    Args:
        run_dir: Made if missing; one supervisor at a time.
        config: The resolved configuration; `facts.config_text` is the same as YAML.
        facts: What goes into the first event.
        clock: Time.
        observer: Called about twice a second with a snapshot; must return soon.
        roles: The main of each role, as `package.module:function`.
        preload: Modules the fork server imports.

    Raises:
        UnavailableError: Another supervisor holds the directory, it cannot be written, or a socket or process cannot
            be made.
        ConfigError: The directory holds a run that cannot go on, or not under this configuration.
    """
    run_dir = run_dir.resolve()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(run_dir))
        past = past_of(run_dir)
        if is_done(past, config.supervisor, is_extended=facts.is_extended, trains_on=facts.trains_on):
            return outcome_of(past)
        if past.started is not None:
            check_resumable(past.started.config, config)
        _forget_temporary_files(run_dir)
        stack.callback(_forget_temporary_files, run_dir)
        # Around everything that has to be cleaned up: an impatient second signal must not interrupt that.
        inbox = stack.enter_context(signal_inbox())
        # First of the slow things: the fork server imports while the rest is prepared.
        placement = stack.enter_context(LocalPlacement(run_dir, roles or ROLES, preload=preload))
        sockets = stack.enter_context(runtime_directory())
        supervisor = stack.enter_context(
            Supervisor(
                run_dir,
                config,
                past,
                clock=clock,
                placement=placement,
                inbox=inbox,
                sockets=sockets,
                observer=observer,
            )
        )
        return supervisor.run(facts)


def _locked(run_dir: Path) -> files.FileLock:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return files.exclusive_lock(run_dir / "lock")
    except OSError as error:
        raise UnavailableError(
            f"cannot take the run directory {run_dir}: {error}. Make it and its file 'lock' writable, or use another "
            f"--run-dir"
        ) from error


def _forget_temporary_files(run_dir: Path) -> None:
    """Remove what children left in their temporary directory; what cannot be removed now is tried again next time."""
    shutil.rmtree(run_dir / "tmp", ignore_errors=True)
