"""Every task and kind of host through whole runs: replayed bit for bit, and in lockstep killed equals never killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_simic.actions import OP, Op
from esper_simic.config_environment import BLUEPRINT_NAMES
from esper_simic.events import ExperienceAdmitted
from supervisor import recovery_proof
from supervisor.clock import SystemClock
from supervisor.journal import read
from supervisor.playback import ReplayReport, Request, replay
from supervisor.recovery_proof import Heard
from supervisor.roles.fold import LearnerFold, config_of_journal
from tests.prove.conftest import WHOLE
from tests.prove.test_lockstep import kill_all, last_state, pid_of, reach, updates
from tests.system.driver import running

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

EVERY_BLUEPRINT = f"[{', '.join(BLUEPRINT_NAMES)}]"
"""Those that a host cannot take are masked."""

SMALL: dict[str, Any] = {
    "environment__environments_per_actor": 4,
    "environment__max_epochs": 14,
    "environment__training_epochs_min": 2,
    "environment__prune_age_min": 2,
    "environment__embargo_epochs": 1,
    "environment__train_batches": 2,
    "environment__train_batch_size": 8,
    "environment__validation_samples": 30,
    "environment__blueprints": EVERY_BLUEPRINT,
    "experience_buffer__min_experiences": 8,
    "simic_trainer__batch_size": 8,
    "simic_trainer__unroll_length": 6,
    "simic_trainer__hidden_size": 16,
    "simic_trainer__graph_layers": 1,
    "simic_trainer__digest_every_steps": 3,
    "supervisor__checkpoint_interval_steps": 8,
    "supervisor__max_updates": 24,
    "supervisor__max_seconds": "null",
    "supervisor__restart_backoff_s": 0.1,
}

STRICT = {
    "environment__gates": "strict",
    "environment__blending_epochs_min": 1,
    "environment__improvement_min": 0,
    "environment__contribution_min": 0,
    "environment__gradient_ratio_min": 0,
}

WORLDS: dict[str, dict[str, Any]] = {
    "wine-mlp": {"task": "wine", "host": "mlp"},
    "mnist1d-series": {"task": "mnist1d", "host": "series", "slots": "[r0c0, r1c0, r0c2]"},
    "characters-transformer": {"task": "characters", "host": "transformer"},
    "digits-augment": {"task": "digits", "host": "augment", "reward.mode": "shaped"},
    "digits32-rescue": {"task": "digits32", "host": "rescue"},
    "synthetic-minimal": {"task": "synthetic:2x6x6:5:200", "host": "minimal"},
    "synthetic-deep_impaired": {
        "task": "synthetic:3x32x32:10:120",
        "host": "deep_impaired",
        "slots": "[r0c0, r0c2, r1c2, r0c4]",
    },
    "digits-alpha_full": {"task": "digits", "host": "rescue", "alpha_control": "full"},
    "digits-strict_escrow": {"task": "digits", "host": "rescue", "reward.mode": "escrow"},
}
"""Keys of `environment` by name of the world."""

IN_LOCKSTEP = ("characters-transformer", "digits-alpha_full")
"""A transformer is what differs most from a convolutional host, and under full control the most can happen to alpha."""

UPDATES_IN_LOCKSTEP = 60
ACTOR_KILLED_AT, ALL_KILLED_AT = 5, 20
"""Updates after which an actor is killed, whose next life steps its hosts through all that was recorded, and then
everything; the latter under `make prove` only, because it costs a third start."""


def settings(name: str) -> dict[str, Any]:
    strict = STRICT if "strict" in name else {}
    world = {f"environment__{key.replace('.', '__')}": value for key, value in WORLDS[name].items()}
    return {**SMALL, **strict, **world}


class Seen(NamedTuple):
    """What the actors' unrolls show."""

    unrolls: int
    episodes: int
    seeds: int
    operations: set[Op]
    lives: set[int]
    """Incarnations of actors that made them."""


def seen(run_dir: Path) -> Seen:
    """Look into every unroll of a learner's journal."""
    journal = run_dir / "journal" / "learner-0"
    fold = LearnerFold(config_of_journal(journal), journal, run_dir / "checkpoints")
    unrolls = episodes = seeds = 0
    operations: set[Op] = set()
    lives: set[int] = set()
    for record in read(journal):
        if record.kind != "ExperienceAdmitted":
            continue
        event = record.header_as(ExperienceAdmitted)
        trajectory = fold.trajectory_of(record, event)
        unrolls, episodes = unrolls + 1, episodes + len(event.episodes)
        seeds += int((trajectory.observations["slot_nodes"][..., 0] > 0).sum())
        lives.add(event.incarnation)
        operations |= {Op(value) for value in trajectory.actions[..., OP].unique().tolist()}
    return Seen(unrolls, episodes, seeds, operations, lives)


def replayed(run_dir: Path) -> ReplayReport:
    """The run done again from its journal; each of its updates and states, and every checkpoint, must be equal."""
    report = replay(Request(run_dir, verify=True), SystemClock())
    assert report.outcome == "equal", report
    assert report.steps == report.steps_by_digest == len(updates(run_dir))
    assert report.states_equal > 0
    assert all(one.is_equal for one in report.checkpoints), report.checkpoints
    assert report.crossings == []
    return report


@pytest.mark.parametrize("name", [name for name in WORLDS if name not in IN_LOCKSTEP])
def test_a_run_is_replayed_bit_for_bit(
    name: str, tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, evaluation=False, **settings(name)) as run:
        assert run.process.wait(240) == 0, run.output
    report, made = replayed(run_dir), seen(run_dir)
    assert made.episodes > 0
    assert made.seeds > 0, "hosts were grown"
    record_proof(
        f"Replay: {name}",
        f"{made.unrolls} unrolls with {made.episodes} ended episodes; {report.steps_by_digest} updates, "
        f"{report.states_equal} whole states and {len(report.checkpoints)} checkpoints equal.",
    )


@pytest.mark.parametrize("name", IN_LOCKSTEP)
def test_killed_and_resumed_equals_never_killed(
    name: str, tmp_path: Path, record_proof: Callable[[str, str], None]
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    in_lockstep = settings(name) | {
        "supervisor__lockstep": "true",
        "supervisor__num_actors": 2,
        "supervisor__max_updates": UPDATES_IN_LOCKSTEP,
    }
    with running(straight, evaluation=False, **in_lockstep) as run:
        assert run.process.wait(240) == 0, run.output
    with running(killed, evaluation=False, **in_lockstep) as run:
        reach(run, killed, ACTOR_KILLED_AT)
        os.kill(pid_of(run, "actor"), signal.SIGKILL)
        if WHOLE:
            reach(run, killed, ALL_KILLED_AT)
            kill_all(run)
        else:
            assert run.process.wait(240) == 0, run.output
    before = len(updates(killed))
    if WHOLE:
        with running(killed, evaluation=False, **in_lockstep) as run:
            assert run.process.wait(240) == 0, run.output
    made = seen(killed)
    assert max(made.lives) == (3 if WHOLE else 2)
    assert made._replace(lives=set()) == seen(straight)._replace(lives=set())
    assert made.seeds > 0, "hosts were grown"
    if "alpha_full" in name:
        assert {Op.SET_ALPHA_TARGET, Op.PRUNE} <= made.operations
    assert len(updates(straight)) == UPDATES_IN_LOCKSTEP
    assert updates(killed) == updates(straight)
    assert last_state(killed) == last_state(straight)
    admissions = recovery_proof.examine(recovery_proof.history(killed), Heard(), lockstep=True)
    assert (admissions.duplicated, admissions.steps_broken) == ([], [])
    report = replayed(killed)
    record_proof(
        f"Lockstep and replay: {name}",
        f"{len(updates(straight))} updates straight, and with an actor killed after {ACTOR_KILLED_AT} and everything "
        f"after {before}: all digests, metrics and the state's digest equal; the killed run's journal replays to "
        f"{report.states_equal} equal states.",
    )
