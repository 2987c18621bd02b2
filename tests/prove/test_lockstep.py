"""In lockstep a run is a function of its seed: killed five times, it makes the same updates as if never killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import recovery_proof
from supervisor.journal import read
from supervisor.recovery_proof import Heard
from supervisor.vitals import Snapshot
from tests.prove.conftest import WHOLE
from tests.system.driver import Running, is_ready, running, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1200)]

SEEDS = (0, 1, 2, 3, 4)
UPDATES = 80
KILLED_AT = (3, 14, 25, 36, 50) if WHOLE else (14, 36)
"""Updates after which everything is killed; in between, one process each."""


def settings(seed: int) -> dict[str, Any]:
    return {
        "simic_trainer__seed": seed,
        "simic_trainer__digest_every_steps": 7,
        "supervisor__lockstep": "true",
        "supervisor__num_actors": 2,
        "supervisor__max_updates": UPDATES,
        "supervisor__checkpoint_interval_steps": 11,
        "supervisor__max_seconds": "null",
        "supervisor__restart_backoff_s": 0.1,
    }


def updates(run_dir: Path) -> list[dict[str, Any]]:
    journal = run_dir / "journal" / "learner-0"
    if not journal.is_dir():
        return []
    return [record.header for record in read(journal) if record.kind == "LearnerStepped"]


def last_state(run_dir: Path) -> dict[str, Any]:
    staged = [
        record.header
        for record in read(run_dir / "journal" / "learner-0")
        if record.kind == "CheckpointStaged"
    ]
    return staged[-1]


def kill_all(run: Running) -> None:
    """The whole group at once, as a power switch would."""
    tree = run.tree()
    os.killpg(run.process.pid, signal.SIGKILL)
    psutil.wait_procs(tree, timeout=30)


def reach(run: Running, run_dir: Path, update: int) -> None:
    until(lambda: len(updates(run_dir)) >= update or run.process.poll() is not None, f"update {update}", 240)
    assert run.process.poll() is None, run.output


def pid_of(run: Running, role: str) -> int:
    """A process of this role that is ready."""

    def found(shot: Snapshot) -> list[int]:
        return [one.pid for one in shot.processes if is_ready(one, role)]

    return found(run.until(found, f"a {role} that is ready"))[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_resumed_equals_never_killed(
    seed: int, tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with running(straight, evaluation=False, **settings(seed)) as run:
        assert run.process.wait(240) == 0, run.output
    for number, update in enumerate(KILLED_AT):
        with running(killed, evaluation=False, **settings(seed)) as run:
            reach(run, killed, update)
            if number % 2:
                # First one process, then everything.
                role = "learner" if number == 1 else "actor"
                os.kill(pid_of(run, role), signal.SIGKILL)
                reach(run, killed, update + 4)
            kill_all(run)
    with running(killed, evaluation=False, **settings(seed)) as run:
        assert run.process.wait(240) == 0, run.output
    assert len(updates(straight)) == UPDATES
    assert updates(killed) == updates(straight)
    assert last_state(killed) == last_state(straight)
    admissions = recovery_proof.examine(recovery_proof.history(killed), Heard(), lockstep=True)
    assert admissions.duplicated == [], "no round twice, whichever life of an actor made it"
    assert admissions.steps_broken == []
    record_proof(
        f"Lockstep, seed {seed}",
        f"{UPDATES} updates straight, and killed after {', '.join(map(str, KILLED_AT))} (everything; twice one process "
        f"before): all digests, metrics and the state's digest {last_state(killed)['state_digest']} equal.",
    )
