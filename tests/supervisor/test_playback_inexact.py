"""Replaying a run whose way of computing promises no equal bits: no step is a divergence, and the largest is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.clock import ManualClock
from supervisor.journal import Record
from supervisor.playback import Request, replay
from supervisor.playback.report import ReplayReport
from supervisor.playback.wording import words
from tests.supervisor.recorded_learner import Rewriting, life, rewritten
from tests.supervisor.recorded_replays import with_reward_changed

WAY = {
    "device": "NVIDIA H200",
    "compile": "inductor",
    "autocast": "bfloat16",
    "replay": "within a tolerance",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint in the middle."""
    run_dir = tmp_path_factory.mktemp("inexact") / "run"
    with life(run_dir) as living:
        living.learn(range(10))
        living.checkpoint()
        living.learn(range(10, 16))
    return run_dir


def on_a_gpu(noise: dict[int, float], *, others: bool = True) -> Callable[[Record], Rewriting | None]:
    """As a GPU would have recorded it: digests of its own, metrics off by some noise."""

    def change(record: Record) -> Rewriting | None:
        header = dict(record.header)
        if record.kind == "RunStarted":
            header["fingerprint"] = header["fingerprint"] | WAY
        elif record.kind == "LearnerStepped" and others:
            factor = 1.0 + noise.get(header["step"], 1e-5)
            header["digest"] = "0" * 16
            header["metrics"] = {name: value * factor for name, value in header["metrics"].items()}
        else:
            return None
        return header, record.frames

    return change


def look(run: Path, target: Path, change: Callable[[Record], Rewriting | None]) -> ReplayReport:
    rewritten(run, target, change)
    (target / "checkpoints").unlink()
    shutil.copytree(run / "checkpoints", target / "checkpoints")
    for path in target.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["fingerprint"] |= WAY
        path.write_text(json.dumps(manifest))
    return replay(Request(target), ManualClock())


def test_within_the_tolerance_it_is_good_and_the_largest_difference_is_told(
    run: Path, tmp_path: Path
) -> None:
    report = look(run, tmp_path / "gpu", on_a_gpu({5: 5e-4}))
    assert (report.outcome, report.is_good) == ("within_tolerance", True)
    assert (report.steps_by_tolerance, report.steps_beyond) == (report.steps, 0)
    assert report.largest is not None
    assert report.largest.step == 5
    assert report.largest.metric.relative == pytest.approx(5e-4, rel=1e-2)
    text = "\n".join(words(report))
    assert (
        "recorded in a way that promises no equal bits (NVIDIA H200: adam fused, compile inductor, autocast bfloat16"
        in text
    )
    assert f"largest relative difference of a metric 5.0e-04 ({report.largest.metric.name} of step 5)" in text


def test_steps_beyond_the_tolerance_are_counted_and_the_replay_goes_on(run: Path, tmp_path: Path) -> None:
    report = look(run, tmp_path / "gpu", on_a_gpu({3: 0.25, 4: 0.01}))
    assert (report.outcome, report.is_good, report.divergence) == ("drifted", False, None)
    assert (report.steps_beyond, report.steps_by_tolerance) == (2, report.steps - 2)
    assert report.largest is not None
    assert report.largest.step == 3
    assert report.largest.metric.relative == pytest.approx(0.2, rel=1e-2)
    last = words(report)[-1]
    assert f"{report.steps_by_tolerance} within the tolerance, 2 beyond it; largest relative" in last
    assert "DRIFTED, as this way may" in last


def test_tensors_that_are_others_at_a_checkpoint_are_drift_too(run: Path, tmp_path: Path) -> None:
    first = next(iter(_admitted(run)))
    other = with_reward_changed(first, by=3.0)

    def change(record: Record) -> Rewriting | None:
        return other(record) or on_a_gpu({}, others=False)(record)

    report = look(run, tmp_path / "gpu", change)
    assert report.outcome == "drifted"
    (compared,) = report.checkpoints
    assert compared.tensor_differences
    assert not compared.is_equal
    assert report.steps_by_digest > 0, "behind the checkpoint it begins anew"


def _admitted(run: Path) -> list[int]:
    from tests.supervisor.recorded_learner import records

    return [record.position for record in records(run, "ExperienceAdmitted")]


def test_equal_digests_are_equal_whatever_was_promised(run: Path, tmp_path: Path) -> None:
    report = look(run, tmp_path / "gpu", on_a_gpu({}, others=False))
    assert (report.outcome, report.largest) == ("equal", None)
    assert report.steps_by_digest == report.steps


def test_what_differs_by_next_to_nothing_is_not_the_largest(run: Path, tmp_path: Path) -> None:
    def change(record: Record) -> Rewriting | None:
        if record.kind != "LearnerStepped":
            return on_a_gpu({})(record)
        header = dict(record.header) | {"digest": "0" * 16}
        header["metrics"] = header["metrics"] | {"mean_advantage": header["metrics"]["mean_advantage"] + 5e-5}
        return header, record.frames

    report = look(run, tmp_path / "gpu", change)
    assert (report.outcome, report.largest) == ("within_tolerance", None)
    assert "largest" not in words(report)[-1]
