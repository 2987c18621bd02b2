"""A run that is killed again and again until every planned fault has fired."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from esper_simic.errors import ContractError, UnavailableError
from supervisor import faults, status
from supervisor.faults import Fault
from supervisor.journal import JournalDamage
from supervisor.recovery_proof.evidence import Death, hear, history, training_after
from supervisor.recovery_proof.planning import AT_THE_END, needs_events, needs_trouble

POLL_S: Final = 0.1
"""Far shorter than any process needs to come back: what is noted when a death is seen was noted before it."""

STALLED_S: Final = 120.0
"""Without another death for so long, the next fault will not fire any more."""

STIR_INTERVAL_S: Final = 2.0
"""How often an actor is killed so that a supervisor has something to write down."""

GONE_S: Final = 30.0
"""How long the lifelines may take to end what belonged to a dead supervisor. Nearly all of it ends at once; a fork
server that was born in the very moment of the death notices only when its imports are done."""

SETTINGS: Final[Mapping[str, Any]] = {
    "environment.environments_per_actor": 4,
    "environment.max_epochs": 12,
    "environment.train_batches": 2,
    "experience_buffer.min_experiences": 8,
    "experience_buffer.capacity": 64,
    "simic_trainer.batch_size": 8,
    "simic_trainer.digest_every_steps": 5,
    "supervisor.num_actors": 2,
    "supervisor.max_seconds": "null",
    "supervisor.max_restarts": 1000,
    "supervisor.restart_backoff_s": 0.1,
    "supervisor.restart_backoff_max_s": 0.2,
    "supervisor.recovery_attempts_max": 1000,
    "supervisor.checkpoint_interval_steps": 10,
    "supervisor.keep_last": 1,
    "supervisor.keep_best": 0,
    "supervisor.journal_segment_bytes_max": 2**20,
    "supervisor.journal_commit_interval_ms": 300,
    "supervisor.disk_reserve_bytes": 2**20,
    "supervisor.metrics_port": "null",
}
"""A run small enough to die often, with segments and checkpoints small and frequent enough to be torn. Nothing counts
the deaths: they are wanted. Records wait long for company, so that whoever promises before it is durable is caught."""

TROUBLE: Final[Mapping[str, Any]] = {
    "simic_trainer.vtrace_log_ratio_max": 0.0001,
    "simic_trainer.circuit_breaker_recovery_timeout_s": 0.05,
    "simic_trainer.conservative_mode_triggers": [],
    "simic_trainer.ewc_sample_size": 8,
    "simic_trainer.curriculum_breaker_failure_threshold": 1000,
    "simic_trainer.curriculum_stages": [
        {
            "name": "eased",
            "difficulty": 0.5,
            "success": "accuracy >= 0",
            "min_success_rate": 0.5,
            "min_episodes": 8,
            "max_episodes": 8,
            "environment": {"train_batches": 1},
        },
        {
            "name": "impossible",
            "difficulty": 1.0,
            "success": "accuracy >= 100",
            "min_success_rate": 1.0,
            "min_episodes": 4,
            "max_episodes": 4,
        },
    ],
}
"""Laid over `SETTINGS` where a point lies beside the daily work: V-trace finds its ratios out of range again and again,
one stage is passed and held on to, and of the next one round after the other fails."""


def settings_of(planned: Sequence[Fault]) -> dict[str, Any]:
    """Configuration, by dotted key, of a run that passes all of these points."""
    return {**SETTINGS, **(TROUBLE if needs_trouble(planned) else {})}


class Campaign:
    """One run of one role's faults.

    Args:
        directory: Where the run (`run/`), the notes (`notes/`) and the output (`output.txt`) go.
        planned: The faults, in order.
        settings: Configuration by dotted key.
        tell: Told in a line of every death.

    Raises:
        UnavailableError: The directory has been used before.
    """

    def __init__(
        self,
        directory: Path,
        planned: Sequence[Fault],
        settings: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self.run_dir, self.notes = directory / "run", directory / "notes"
        self._output, self._planned, self._tell = directory / "output.txt", planned, tell
        self.deaths: dict[int, Death] = {}
        """By the number of the fault."""
        try:
            self.notes.mkdir(parents=True)
        except FileExistsError:
            raise UnavailableError(f"{directory} holds an earlier proof: name another directory") from None
        command = [sys.executable, "-P", "-m", "supervisor.cli", "run", "--no-evaluation"]
        assignments = [f"--set={key}={value}" for key, value in settings.items()]
        self._command = [*command, "--run-dir", str(self.run_dir), *assignments]
        self._environment = os.environ | {
            faults.FAULTS_VARIABLE: ";".join(fault.text for fault in planned),
            faults.DIRECTORY_VARIABLE: str(self.notes),
        }
        self._changed_s = self._stirred_s = self._looked_s = time.monotonic()

    def run(self) -> None:
        """Start the run again after each death of its supervisor, until it has ended in order.

        Raises:
            UnavailableError: It ended in another way, or not at all, or left a process behind.
        """
        while (code := self._live()) != 0:
            if code != -signal.SIGKILL:
                last = self._output.read_text("utf-8", errors="replace")[-1000:]
                raise UnavailableError(f"the run in {self.run_dir} ended with status {code}: {last}")
            self._confirm_gone()
        self._confirm_gone()

    def _live(self) -> int:
        """One life of the supervisor; its exit status."""
        with self._output.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        try:
            is_stopping = False
            while (code := process.poll()) is None:
                time.sleep(POLL_S)
                self._look()
                if not is_stopping and (self._is_done() or self._stalled_s() > STALLED_S):
                    is_stopping = True
                    process.send_signal(signal.SIGTERM)
                if self._stalled_s() > 2 * STALLED_S:
                    raise UnavailableError(f"the run in {self.run_dir} neither goes on nor stops")
                self._stir()
            self._look()
            return code
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _look(self) -> None:
        for number, fault in enumerate(self._planned):
            mark = faults.fired(self.notes, number)
            if number in self.deaths or not mark.exists():
                continue
            self.deaths[number] = Death(fault.role, mark.stat().st_mtime_ns, hear(self.notes))
            self._changed_s = time.monotonic()
            self._tell(f"{len(self.deaths)} of {len(self._planned)}: {fault.role} died at {fault.point}")

    @property
    def _next(self) -> Fault | None:
        left = (fault for number, fault in enumerate(self._planned) if number not in self.deaths)
        return next(left, None)

    def _is_done(self) -> bool:
        """Whether only the end is missing: all other faults have fired, and training went on after the last one."""
        due = self._next
        return (due is None or due.point in AT_THE_END) and self._trains()

    def _trains(self) -> bool:
        if time.monotonic() - self._looked_s < 1.0:
            return False
        self._looked_s = time.monotonic()
        last_ns = max((death.at_ns for death in self.deaths.values()), default=0)
        try:
            noted = history(self.run_dir)
            supervisors = history(self.run_dir, "supervisor")
        except JournalDamage:  # a torn tail is being cut off at this moment; in the end it is read again
            return False
        return training_after(noted, supervisors, self._planned[0].role, last_ns) is not None

    def _stalled_s(self) -> float:
        return time.monotonic() - self._changed_s

    def _stir(self) -> None:
        """Let something happen that the supervisor has to write down, while the run trains: the end of an actor."""
        due = self._next
        if due is None or not needs_events(due) or time.monotonic() - self._stirred_s < STIR_INTERVAL_S:
            return
        self._stirred_s = time.monotonic()
        try:
            seen = status.observe(self.run_dir, timeout_ms=500)
        except (UnavailableError, ContractError, JournalDamage):  # it is not up yet, or just died
            return
        if seen.state != "training" or seen.training_elapsed_s < STIR_INTERVAL_S:
            return
        actors = [view.pid for view in seen.processes if view.role == "actor" and view.state == "ready"]
        for pid in actors[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):  # died by itself meanwhile
                psutil.Process(pid).kill()

    def _confirm_gone(self) -> None:
        """Everything that belonged to a dead supervisor must end with it."""
        deadline_s = time.monotonic() + GONE_S
        while left := orphans(self.notes):
            if time.monotonic() > deadline_s:
                for process in left:
                    process.kill()
                raise UnavailableError(f"orphans of the run in {self.run_dir}: {', '.join(map(str, left))}")
            time.sleep(POLL_S)


def orphans(notes: Path) -> list[psutil.Process]:
    """Processes of a proof that are alive: they all know the directory of its notes."""
    left = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(faults.DIRECTORY_VARIABLE) == str(notes)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
