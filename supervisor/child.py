"""What every child process does before and after its role's main.

In this order: output into its log, a temporary directory of the run's own, the lifelines, deaf to the terminal's
signals (the supervisor decides when a child ends, or a Ctrl-C would race with the checkpoint), a signal that writes the
stacks of a hung process, then the role.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from esper_simic.errors import ConfigError
from supervisor import faults
from supervisor.events import ChildId
from supervisor.lifeline import die_with_parent, exit_with_parent

DUMP_SIGNAL: Final = signal.SIGUSR1
"""A child that gets it writes the stacks of all its threads and goes on."""

DEAF_TO: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a terminal or a service manager sends to the whole group."""

CONFIGURATION_EXIT_CODE: Final = 78

LOG_BYTES_MAX: Final = 8 * 2**20
"""A larger log is moved to `<name>.log.1`, over an older one, when the next life of its child begins."""


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a child is told at its birth.

    `endpoints` maps names (`control`, `experience`) to addresses; `config_text` is the whole resolved configuration as
    YAML; `checkpoint` is the policy to evaluate; `lift` is the newest takeover of the run in which an operator asked to
    let a halted training go on, 0 for none or once a learner has stood ready under it.
    """

    who: ChildId
    run_id: str
    run_dir: str
    endpoints: dict[str, str]
    config_text: str
    checkpoint: str = ""
    lift: int = 0

    @property
    def identity(self) -> str:
        """Name on every socket, such as `actor-3-1`: role, index, incarnation."""
        return f"{self.who.name}-{self.who.incarnation}"


Main = Callable[[ChildSpec], None]


def log_path(run_dir: Path, who: ChildId) -> Path:
    """Where the output of all lives of a child goes."""
    return run_dir / "logs" / f"{who.name}.log"


def stacks_path(run_dir: Path, who: ChildId) -> Path:
    """Where one life of a child writes its stacks when it hangs."""
    return run_dir / "stacks" / f"{who.name}-{who.incarnation}.txt"


def run_child(main_path: str, spec: ChildSpec) -> None:
    """Be the child: prepare this process, then run the role's main to its end.

    Args:
        main_path: The role's main as `package.module:function`.
        spec: What to hand to it.

    Raises:
        SystemExit: With status 78 after a `ConfigError`. Any other error goes to the interpreter, which writes its
            trace into the log and exits with 1.
    """
    faults.arm(spec.who.role)
    run_dir = Path(spec.run_dir)
    _write_output_to(log_path(run_dir, spec.who))
    _use_temporary_directory(run_dir / "tmp")
    die_with_parent()
    exit_with_parent()
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    # They were blocked while this process came into being; from here on they are ignored instead.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)
    # The file stays open as long as the process: the dump may come at any time.
    stacks = stacks_path(run_dir, spec.who).open("w", encoding="utf-8")
    faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
    faulthandler.enable()
    try:
        resolve(main_path)(spec)
    except ConfigError as error:
        sys.stderr.write(f"configuration: {error}\n")
        raise SystemExit(CONFIGURATION_EXIT_CODE) from None


def resolve(main_path: str) -> Main:
    """Import `package.module:function`.

    Raises:
        ConfigError: There is no such function.
    """
    module_name, _, function_name = main_path.partition(":")
    found = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(found):
        raise ConfigError(f"a role's main is package.module:function, {main_path!r} names none")
    main: Main = found
    return main


def _use_temporary_directory(path: Path) -> None:
    """Libraries leave generated modules behind; they shall lie in the run's directory, not in the machine's."""
    path.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(path)


def _write_output_to(path: Path) -> None:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # The streams were opened on what is now a file; lines must not wait for a buffer to fill.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
