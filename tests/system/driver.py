"""Whole runs from outside, as an operator sees them: the installed command, its output, its files, its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from esper_simic.errors import SimicError
from supervisor import status
from supervisor.vitals import ProcessView, Snapshot

COMMAND = Path(sys.executable).with_name("simic-supervisor")
START_DEADLINE_S = 180.0
"""A busy machine imports the heavy libraries twice, in the learner and in the fork server."""
DEADLINE_S = 120.0
POLL_S = 0.05

SETTINGS = {
    "environment.environments_per_actor": 4,
    "environment.max_epochs": 12,
    "environment.train_batches": 2,
    "experience_buffer.min_experiences": 8,
    "experience_buffer.capacity": 64,
    "simic_trainer.batch_size": 8,
    "supervisor.num_actors": 1,
    "supervisor.evaluation_episodes": 4,
    "supervisor.evaluation_workers": 1,
    "supervisor.metrics_port": "null",
}
"""A run in seconds, most of them spent on imports."""


class Said(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def say(*arguments: str | Path, cwd: Path | None = None, within_s: float = START_DEADLINE_S) -> Said:
    """Run the command to its end."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=within_s,
        cwd=cwd,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    return Said(done.returncode, done.stdout, done.stderr)


def run_arguments(
    run_dir: Path, *, evaluation: bool = True, preset: str = "", **changed: Any
) -> list[str | Path]:
    """`run` with the small settings; changes by dotted key, dots as double underscores, None for one not to be set."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    assignments = [f"--set={key}={value}" for key, value in settings.items() if value is not None]
    measured = "--evaluation" if evaluation else "--no-evaluation"
    named = [f"--preset={preset}"] if preset else []
    return ["run", *named, "--run-dir", run_dir, measured, *assignments]


def until(condition: Callable[[], object], what: str, within_s: float = DEADLINE_S) -> None:
    """Wait for a condition, not for a time."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {within_s:g} s"
        time.sleep(POLL_S)


class Running:
    """A run under way, in a session of its own: its process group stands for a terminal's."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.process, self.run_dir = process, run_dir

    @property
    def output(self) -> str:
        return output_path(self.run_dir).read_text("utf-8")

    def snapshot(self) -> Snapshot | None:
        """The run as its supervisor shows it; None before there is one."""
        assert self.process.poll() is None, f"the run ended early:\n{self.output}"
        try:
            return status.observe(self.run_dir)
        except SimicError:
            return None

    def until(
        self, condition: Callable[[Snapshot], object], what: str, within_s: float = DEADLINE_S
    ) -> Snapshot:
        """Wait until a snapshot satisfies a condition; that snapshot."""
        seen: list[Snapshot] = []

        def satisfied() -> bool:
            snapshot = self.snapshot()
            if snapshot is None or not condition(snapshot):
                return False
            seen.append(snapshot)
            return True

        until(satisfied, f"{what} in {self.run_dir}", within_s)
        return seen[0]

    def until_it_learns(self, actors: int = 1) -> Snapshot:
        """Wait until every actor is ready and updates are made."""
        return self.until(
            lambda shot: (
                shot.state == "training"
                and shot.learner.step >= 2
                and sum(is_ready(view, "actor") for view in shot.processes) == actors
            ),
            "updates",
            START_DEADLINE_S,
        )

    def tree(self) -> list[psutil.Process]:
        """Every process below the supervisor, and itself."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def interrupt(self) -> None:
        """What Ctrl-C does: the signal reaches the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def endpoint(self, name: str) -> str:
        address = msgspec.json.decode((self.run_dir / "supervisor.json").read_bytes())
        return str(address["endpoint"]).removesuffix("control") + name


def output_path(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.out")


@contextmanager
def running(run_dir: Path, **changed: Any) -> Iterator[Running]:
    """Start a run; whatever happens, none of its processes is left."""
    with output_path(run_dir).open("wb") as output:
        process = subprocess.Popen(
            [COMMAND, *map(str, run_arguments(run_dir, **changed))],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(process, run_dir)
    finally:
        left = left_over(process.pid)
        for one in left:
            one.kill()
        psutil.wait_procs(left, timeout=DEADLINE_S)
        process.wait(DEADLINE_S)


def is_ready(view: ProcessView, role: str, incarnation: int | None = None) -> bool:
    """Whether this is a process of the role that is ready, in this life if one is named."""
    return view.role == role and view.state == "ready" and incarnation in (None, view.incarnation)


def left_over(session: int) -> list[psutil.Process]:
    """The processes of a session that are still alive, whoever is their parent now."""
    return [process for process in psutil.process_iter() if _is_alive_in(process, session)]


def _is_alive_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def alive_after(processes: list[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Which of these are not gone in time; a zombie is gone."""
    _, left = psutil.wait_procs(processes, timeout=within_s)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def left_after(session: int, within_s: float = 5.0) -> list[psutil.Process]:
    """What is left of a session whose first process has ended.

    The resource tracker ends by itself, a moment after the last process that could need it.
    """
    return alive_after(left_over(session), within_s)
