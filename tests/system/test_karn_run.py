"""A run of the second controller from outside: trained, its learner killed, measured, replayed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from supervisor.checkpoints import read_manifest
from supervisor.events import LEARNED, PolicyEvaluated, RunStarted
from supervisor.journal import read
from supervisor.vitals import Snapshot
from tests.system.driver import is_ready, left_after, output_path, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]

UPDATES = 60

SETTINGS: dict[str, Any] = {
    "environment__max_epochs": None,  # the driver's small settings are of growing hosts
    "environment__train_batches": None,
    "environment__environments_per_actor": 16,
    "simic_trainer__batch_size": 16,
    "simic_trainer__hidden_size": 16,
    "simic_trainer__digest_every_steps": 5,
    "experience_buffer__min_experiences": 16,
    "supervisor__max_updates": UPDATES,
    "supervisor__checkpoint_interval_steps": 10,
    "supervisor__restart_backoff_s": 0.1,
    "supervisor__evaluation_episodes": 40,
}


class Ended(NamedTuple):
    run_dir: Path
    code: int
    output: str
    shot: Snapshot


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A whole run whose learner was killed once, in the middle of its training."""
    run_dir = tmp_path_factory.mktemp("karn") / "run"
    with running(run_dir, preset="karn", **SETTINGS) as run:
        shot = run.until_it_learns()
        (learner,) = (view for view in shot.processes if view.role == "learner")
        os.kill(learner.pid, signal.SIGKILL)
        run.until(
            lambda shot: (
                any(is_ready(view, "learner", 2) for view in shot.processes) or shot.state != "training"
            ),
            "another learner",
            200,
        )
        code = run.process.wait(200)
        assert not left_after(run.process.pid)
    return Ended(run_dir, code, output_path(run_dir).read_text("utf-8"), shot)


def test_it_ends_well_and_the_whole_way_can_be_replayed(ended: Ended) -> None:
    assert ended.code == 0, ended.output
    said = say("replay", ended.run_dir, "--verify")
    assert said.code == 0, said.out + said.err
    kinds = [record.kind for record in read(ended.run_dir / "journal" / "learner-0")]
    assert kinds.count("LearnerStepped") == UPDATES
    assert kinds.count("LearnerRecovered") == 1


def test_everything_says_whose_policy_it_is(ended: Ended) -> None:
    assert ended.shot.controller == "karn"
    records = list(read(ended.run_dir / "journal" / "supervisor"))
    (started,) = (record for record in records if record.kind == "RunStarted")
    assert started.header_as(RunStarted).controller == "karn"
    (checkpoint, *_) = sorted((ended.run_dir / "checkpoints").glob("step-*"))
    assert read_manifest(checkpoint).controller == "karn"
    shown = say("status", ended.run_dir)
    assert "controller  karn" in shown.out


def test_it_is_measured_beside_the_best_that_is_known(ended: Ended) -> None:
    found = {
        event.policy: event
        for record in read(ended.run_dir / "journal" / "supervisor")
        if record.kind == "PolicyEvaluated"
        for event in [record.header_as(PolicyEvaluated)]
    }
    assert set(found) == {LEARNED, "best-possible", "best-single", "random"}
    means = {name: msgspec.structs.asdict(event)["summary"]["return_mean"] for name, event in found.items()}
    assert means["best-possible"] == max(means.values())
    for name in found:
        assert name in ended.output
