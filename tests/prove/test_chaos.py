"""Random deaths of random processes in one long run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor import faults, recovery_proof
from supervisor.recovery_proof import Death, Heard
from tests.prove.conftest import WHOLE
from tests.system.driver import COMMAND, POLL_S, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]

SECONDS, KILLS = (600.0, 30) if WHOLE else (60.0, 4)
SEED = 20_261_121
QUIET_S = 15.0
"""Before the first death, and at the end: a run that has not begun proves nothing."""

VICTIMS = ("learner", "learner", "actor", "actor", "actor", "supervisor", "forkserver")
DEADLINE_S = 120.0


class Run:
    """A run that is started again with the same command whenever its supervisor dies."""

    def __init__(self, directory: Path) -> None:
        self.run_dir, self.notes = directory / "run", directory / "notes"
        self.notes.mkdir(parents=True)
        settings = {**recovery_proof.SETTINGS, "supervisor.num_actors": 3}
        assignments = [f"--set={key}={value}" for key, value in settings.items()]
        self._command = [COMMAND, "run", "--no-evaluation", "--run-dir", self.run_dir, *assignments]
        self._environment = os.environ | {faults.DIRECTORY_VARIABLE: str(self.notes)}
        self._output = directory / "output.txt"
        self.process = self._start()

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8")[-2000:]

    def _start(self) -> subprocess.Popen[bytes]:
        with self._output.open("ab") as output:
            return subprocess.Popen(
                list(map(str, self._command)),
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )

    def victims(self) -> dict[str, list[psutil.Process]]:
        supervisor = psutil.Process(self.process.pid)
        found: dict[str, list[psutil.Process]] = {"supervisor": [supervisor]}
        for process in supervisor.children(recursive=True):
            try:
                words = " ".join(process.cmdline())
                parent = process.ppid()
            except psutil.NoSuchProcess:
                continue
            if "resource_tracker" in words:
                continue
            forked = "forkserver" if parent == supervisor.pid else "actor"
            found.setdefault("learner" if "spawn_main" in words else forked, []).append(process)
        return found

    def kill(self, role: str, process: psutil.Process) -> Death:
        """Kill one process; what had been promised until then. A dead supervisor is followed by another."""
        at_ns = time.time_ns()
        process.kill()
        if role == "supervisor":
            self.process.wait(30)
        heard = recovery_proof.hear(self.notes)
        if role == "supervisor":
            self.process = self._start()
        # A fork server takes its children with it: what has to come back is an actor.
        return Death("actor" if role == "forkserver" else role, at_ns, heard)

    def finish(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


def test_random_deaths_lose_nothing(tmp_path: Path, record_proof: Callable[[str, str], None]) -> None:
    chance = random.Random(SEED)
    run = Run(tmp_path)
    began_s, began_ns = time.monotonic(), time.time_ns()
    killed: list[tuple[str, Death]] = []
    try:
        for at_s in sorted(chance.uniform(QUIET_S, SECONDS - QUIET_S) for _ in range(KILLS)):
            while time.monotonic() - began_s < at_s:
                assert run.process.poll() is None, run.output
                time.sleep(POLL_S)
            there = run.victims()
            role = chance.choice([role for role in VICTIMS if role in there])
            killed.append((role, run.kill(role, chance.choice(there[role]))))
        until(lambda: trains_again(run, killed[-1][1]), "training after the last death", DEADLINE_S)
        assert run.finish() == 0, run.output
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    seconds = time.monotonic() - began_s
    until(lambda: recovery_proof.orphans(run.notes) == [], "the end of every process", 10)
    noted = recovery_proof.history(run.run_dir)
    heard = recovery_proof.hear(run.notes)
    evidence = recovery_proof.examine(noted, heard, [death for _, death in killed])
    report = recovery_proof.replayed(run.run_dir)
    equal = recovery_proof.equal_until(report, noted) == len(noted)
    kinds = Counter(one.kind for one in noted)
    record_proof(
        f"{KILLS} random deaths in one run of {seconds:.0f} s",
        f"{len(heard.promises):,} unrolls acknowledged, {len(evidence.lost)} lost, {len(evidence.duplicated)} "
        f"duplicated; {kinds['LearnerStepped']:,} updates, {kinds['LearnerRecovered']} recoveries of the learner; all "
        f"{report['steps_by_digest']:,} updates and {report['states_equal']} whole states equal to the fold from the "
        f"start: {'yes' if equal else 'NO'}; no orphan.\n\n{deaths_table(run, killed, began_ns)}",
    )
    assert evidence.is_good, evidence
    assert len(heard.promises) > KILLS
    assert kinds["StepSkipped"] == kinds["RecordQuarantined"] == 0
    assert equal, report


def trains_again(run: Run, last: Death) -> bool:
    """Whether training went on after a death."""
    assert run.process.poll() is None, run.output
    noted, supervisors = (recovery_proof.history(run.run_dir, owner) for owner in ("learner-0", "supervisor"))
    return recovery_proof.training_after(noted, supervisors, last.role, last.at_ns) is not None


def deaths_table(run: Run, killed: list[tuple[str, Death]], began_ns: int) -> str:
    """When who died, what had been acknowledged since the death before, and how long it took."""
    noted, supervisors = (recovery_proof.history(run.run_dir, owner) for owner in ("learner-0", "supervisor"))
    lines = ["| at s | killed | acknowledged since the last | s to training again |", "|---:|---|---:|---:|"]
    before = Heard()
    for role, death in killed:
        again = recovery_proof.training_after(noted, supervisors, death.role, death.at_ns)
        took = f"{(again.time_ns - death.at_ns) / 1e9:.1f}" if again else "another death came first"
        since = len(death.heard.promises - before.promises)
        lines.append(f"| {(death.at_ns - began_ns) / 1e9:.0f} | {role} | {since} | {took} |")
        before = death.heard
    return "\n".join(lines)
