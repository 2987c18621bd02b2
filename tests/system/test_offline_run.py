"""A run that learns from another's records, from outside: killed on the way, measured, replayed, begun with weights."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_simic.events import (
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerRecovered,
    LearnerStepped,
    PolicyImported,
)
from esper_simic.ledger import NOT_LIVING
from supervisor.events import LEARNED, PolicyEvaluated
from supervisor.journal import Record, read
from supervisor.vitals import ProcessView, Snapshot
from tests.system.driver import Running, is_ready, left_after, output_path, running, say
from tests.system.test_gym_run import ACTORS, SETTINGS

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]

RECORDING: dict[str, Any] = SETTINGS | {"supervisor__max_updates": 8, "evaluation": False}
OFFLINE: dict[str, Any] = SETTINGS | {
    "simic_trainer__algorithm": "BC",
    "environment__behaviour": "recorded",
    "supervisor__max_updates": 2_500,
    "supervisor__restart_backoff_s": 0.05,
    "supervisor__checkpoint_interval_steps": 400,
}


class Told(NamedTuple):
    recorded: Path
    run_dir: Path
    code: int
    output: str
    left: list[str]


def records(run_dir: Path, owner: str, kind: str) -> list[Record]:
    return [record for record in read(run_dir / "journal" / owner) if record.kind == kind]


def _kill(run: Running, role: str) -> None:
    """kill -9 of one process of a role, and the next life at work."""

    def ready(shot: Snapshot) -> list[ProcessView]:
        return [one for one in shot.processes if is_ready(one, role)]

    shot = run.until(ready, role)
    victim = ready(shot)[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)

    def goes_on(now: Snapshot) -> bool:
        next_life = victim.index, victim.incarnation + 1
        return now.learner.step > shot.learner.step and next_life in {
            (one.index, one.incarnation) for one in ready(now)
        }

    run.until(goes_on, f"another {role} that goes on", 120.0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    directory = tmp_path_factory.mktemp("offline")
    recorded, run_dir = directory / "recorded", directory / "run"
    with running(recorded, preset="gym", **RECORDING) as first:
        assert first.process.wait(200) == 0, first.output
    changed = OFFLINE | {
        "environment__records": f"[{recorded}]",
        "simic_trainer__initial_policy": str(recorded),
    }
    with running(run_dir, preset="gym", **changed) as run:
        run.until_it_learns(ACTORS)
        for role in ("actor", "learner"):
            _kill(run, role)
        shutil.move(recorded / "checkpoints", directory / "away")  # the weights were needed once
        code = run.process.wait(300)
        left = [str(process) for process in left_after(run.process.pid)]
    return Told(recorded, run_dir, code, output_path(run_dir).read_text("utf-8"), left)


def test_it_ends_well_whoever_was_killed(told: Told) -> None:
    assert told.code == 0, told.output
    assert told.left == []
    (recovered,) = records(told.run_dir, "learner-0", "LearnerRecovered")
    assert recovered.header_as(LearnerRecovered).is_exact
    steps = [record.header["step"] for record in records(told.run_dir, "learner-0", "LearnerStepped")]
    assert steps == list(range(1, OFFLINE["supervisor__max_updates"] + 1))


def test_each_actor_ships_its_records_in_their_order_over_all_lives(told: Told) -> None:
    frames = [
        tuple(bytes(frame) for frame in record.frames)
        for record in records(told.recorded, "learner-0", "ExperienceAdmitted")
    ]
    assert len(set(frames)) == len(frames) > ACTORS
    turns = dict.fromkeys(range(ACTORS), 0)
    lives = set()
    for record in records(told.run_dir, "learner-0", "ExperienceAdmitted"):
        event = record.header_as(ExperienceAdmitted)
        assert event.behaviour == "recorded"
        expected = (turns[event.actor] * ACTORS + event.actor) % len(frames)
        assert tuple(bytes(frame) for frame in record.frames) == frames[expected]
        turns[event.actor] += 1
        lives.add((event.actor, event.incarnation))
    assert len(lives) > ACTORS, "of an actor that was killed, too"
    assert max(turns.values()) > len(frames) / ACTORS, "more than one pass"
    refused = [
        record.header_as(ExperienceRefused)
        for record in records(told.run_dir, "learner-0", "ExperienceRefused")
    ]
    assert {one.reason for one in refused} <= {NOT_LIVING}, "what was under way when its sender was killed"


def test_no_return_of_the_records_is_shown_as_the_policys(told: Told) -> None:
    newest = records(told.run_dir, "learner-0", "LearnerStepped")[-1].header_as(LearnerStepped)
    assert "behaviour_return" in newest.metrics
    assert "episodic_return" not in newest.metrics
    assert "behaviour return" in told.output
    measured = [
        record.header_as(PolicyEvaluated) for record in records(told.run_dir, "supervisor", "PolicyEvaluated")
    ]
    assert {event.policy for event in measured} == {LEARNED, "random"}


def test_it_began_with_the_weights_of_the_recorded_run(told: Told) -> None:
    (record,) = records(told.run_dir, "learner-0", "PolicyImported")
    assert record.position == 1
    assert Path(record.header_as(PolicyImported).source).parent == told.recorded / "checkpoints"


def test_it_is_replayed_to_the_bit_without_records_and_weights(told: Told) -> None:
    shutil.rmtree(told.recorded)
    again = say("replay", told.run_dir, "--verify", "--json")
    assert again.code == 0, again.err
    report = again.json()
    assert (report["outcome"], report["steps_by_digest"]) == ("equal", OFFLINE["supervisor__max_updates"])


def test_what_does_not_fit_ends_a_run_with_78_and_the_remedy(tmp_path: Path) -> None:
    said = say(
        *("run", "--preset", "gym", "--run-dir", tmp_path / "run", "--no-evaluation"),
        *("--set", "simic_trainer.algorithm=BC", "--set", "environment.behaviour=recorded"),
        *("--set", f"environment.records=[{tmp_path / 'gone'}]", "--set", "supervisor.metrics_port=null"),
    )
    assert said.code == 78, said.out
    words = " ".join((said.out + said.err).split())
    assert "environment.records" in words
    assert "is not there" in words
