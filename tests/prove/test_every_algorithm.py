"""Every algorithm through whole runs that are killed: in lockstep equal to one that was not, else replayed bit for bit.

Each dies at a fault point of its own, and at a moment that nobody chose.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_simic.events import LearnerStepped
from tests.prove.deaths import (
    LOCKSTEP,
    SETTINGS,
    WITHIN_S,
    assert_replayed,
    assert_same,
    dying,
    fired,
    kill,
    lives,
    settings_of,
    steps,
    whole,
)
from tests.prove.test_every_host import SMALL
from tests.prove.test_lockstep import pid_of, reach

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1500)]

Proof = Callable[[str, str], None]

UPDATES = 150
KILLED_FROM, KILLED_TO = 30, 70
"""Updates between which the learner is killed; at fifty a second that is at no update in particular."""


class Case(NamedTuple):
    """An algorithm in a small world, and where its learner dies."""

    world: str
    trainer: dict[str, Any]
    replay_ratio: float
    dies_at: str
    behaviour: str = "policy"


CASES = {
    "IMPALA": Case("esper_simic/Recall-v0", {"network": "lstm"}, 0.25, "learner.step.after:17"),
    # Of 4 epochs with 2 minibatches the 43rd gradient is one amidst an update.
    "PPO": Case(
        "CartPole-v1",
        {"ppo_epochs": 4, "ppo_minibatches": 2, "ppo_target_kl": 0.002, "learning_rate": 0.003},
        0.0,
        "learner.update.half:43",
    ),
    "APPO": Case(
        "esper_simic/Catch-v0", {"network": "lstm", "ppo_epochs": 2}, 0.25, "learner.announce.before:17"
    ),
    "IQL": Case("esper_simic/Chain-v0", {"iql_cql_alpha": 0.5}, 0.5, "checkpoint.rename.before:1"),
    "BC": Case("esper_simic/Target-v0", {}, 0.25, "journal.write.half:40", behaviour="random"),
}


def settings(name: str) -> dict[str, Any]:
    case = CASES[name]
    return {
        "environment__id": case.world,
        "environment__behaviour": case.behaviour,
        "experience_buffer__replay_ratio": case.replay_ratio,
        "supervisor__max_updates": UPDATES,
        **settings_of({"simic_trainer": {"algorithm": name, **case.trainer}}),
    }


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_equals_never_killed(name: str, tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    in_lockstep = settings(name) | LOCKSTEP
    whole(straight, **in_lockstep)
    assert len(steps(straight)) == UPDATES
    assert_stops_early(straight, is_wanted=name == "PPO")

    plan = [f"learner:{CASES[name].dies_at}"]
    moment = random.Random(name).randint(KILLED_FROM, KILLED_TO)
    with dying(killed, plan, **in_lockstep) as run:
        reach(run, killed, moment)
        kill(pid_of(run, "learner"))
        before = len(steps(killed))
        assert run.process.wait(WITHIN_S) == 0, run.output
    assert fired(killed) == 1
    assert lives(killed) == 2
    assert_same(straight, killed)
    report = assert_replayed(killed)
    record_proof(
        f"{name} in lockstep",
        f"{UPDATES} updates straight, and with the learner killed at {CASES[name].dies_at} and after {before}: "
        f"all updates and the state's digest equal; {report.states_equal} whole states replayed.",
    )


def assert_stops_early(run_dir: Path, *, is_wanted: bool) -> None:
    """Some updates were ended by their divergence, and some were not: those went through all of their minibatches."""
    made = [one.metrics for one in steps(run_dir) if isinstance(one, LearnerStepped)]
    stopped = [metrics["ppo_steps"] for metrics in made if metrics.get("ppo_stopped_early")]
    if not is_wanted:
        return
    assert 0 < len(stopped) < len(made)
    assert max(stopped) < 8
    assert {metrics["ppo_steps"] for metrics in made if not metrics["ppo_stopped_early"]} == {8.0}


@pytest.mark.parametrize("name", CASES)
def test_an_asynchronous_run_is_replayed(name: str, tmp_path: Path, record_proof: Proof) -> None:
    run_dir = tmp_path / "run"
    endless = settings(name) | {"supervisor__max_updates": "null", "supervisor__max_seconds": 1000}
    with dying(run_dir, [], **endless) as run:
        reach(run, run_dir, 60)
        kill(pid_of(run, "actor"))
        kill(pid_of(run, "learner"))
        reach(run, run_dir, len(steps(run_dir)) + 60)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(120) == 0, run.output
    assert lives(run_dir) == 1
    report = assert_replayed(run_dir)
    record_proof(
        f"{name}, asynchronous",
        f"Learner and actor killed at once: {report.steps} updates and {report.states_equal} whole states replayed "
        f"equal.",
    )


GROWING: dict[str, Any] = {
    **{key: value for key, value in SETTINGS.items() if key.startswith("supervisor__")},
    **SMALL,
    **LOCKSTEP,
    "environment__task": "wine",
    "environment__host": "mlp",
    "experience_buffer__replay_ratio": 0.0,
    "simic_trainer__algorithm": "PPO",
    "simic_trainer__ppo_epochs": 2,
    "simic_trainer__ppo_minibatches": 2,
}


def test_ppo_on_a_growing_host(tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole(straight, base={}, **GROWING)
    whole(
        killed, ["learner:learner.update.half:38", "learner:learner.acknowledge.after:5"], base={}, **GROWING
    )
    assert lives(killed) == 2
    assert_same(straight, killed)
    report = assert_replayed(killed)
    record_proof(
        "PPO on a growing host",
        f"{report.steps} updates straight, and with the learner killed amidst an update and after an answer: equal.",
    )
