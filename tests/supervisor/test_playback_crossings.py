"""Replays across recoveries that were not exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from supervisor.playback import (
    words,
)
from supervisor.roles.attempts import Attempts, Work
from tests.supervisor.recorded_learner import (
    OWNER,
    last_step,
    life,
    look,
    records,
)
from tests.supervisor.recorded_replays import names, record_two_lives


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_two_lives(tmp_path_factory.mktemp("recorded") / "run")


# -- inexact recoveries ------------------------------------------------------------------------------------------------


@pytest.fixture
def quarantined(tmp_path: Path) -> tuple[Path, int]:
    """A record that three lives died of, quarantined by the fourth, which goes on from a checkpoint."""
    run_dir = tmp_path / "run"
    with life(run_dir) as first:
        first.learn(range(6))
        position = first.admit(6)
        first.step_all()
        first.learn(range(7, 10))
    for _ in range(3):
        with Attempts(run_dir / f"{OWNER}.attempts") as attempts:
            attempts.begin(Work.RECORD, position)
    with life(run_dir, incarnation=4) as fourth:
        fourth.learn(range(10, 18))
        fourth.checkpoint()
        fourth.learn(range(18, 20))
    assert [r.header["position"] for r in records(run_dir, "RecordQuarantined")] == [position]
    return run_dir, position


def test_a_quarantined_record_is_crossed_through_the_checkpoint_after_it(
    quarantined: tuple[Path, int],
) -> None:
    run_dir, position = quarantined
    report = look(run_dir, verify=True)
    assert report.outcome == "equal"
    (crossing,) = report.crossings
    assert crossing.position == position
    assert crossing.reason.startswith(f"record {position} was quarantined")
    before = [r for r in records(run_dir, "LearnerStepped") if r.position < position]
    after = [r for r in records(run_dir, "LearnerStepped") if r.position > (crossing.resumed_at or 0)]
    assert (len(before), len(after)) == (crossing.step, report.steps - crossing.step)
    assert report.last_step == last_step(run_dir)
    assert crossing.checkpoint in names(run_dir)
    assert f"went on from checkpoint {crossing.checkpoint}" in "\n".join(words(report))


def test_without_a_checkpoint_after_it_the_replay_ends_there(quarantined: tuple[Path, int]) -> None:
    run_dir, position = quarantined
    shutil.rmtree(run_dir / "checkpoints")
    report = look(run_dir)
    assert (report.outcome, report.is_good) == ("incomplete", False)
    assert report.next_position == position
    assert "no good checkpoint after it is on disk" in "\n".join(words(report))


@pytest.mark.parametrize("is_pruned", [True, False], ids=["pruned", "bad"])
def test_a_later_checkpoint_serves_where_the_first_does_not(
    quarantined: tuple[Path, int], is_pruned: bool
) -> None:
    run_dir, _ = quarantined
    first, second = names(run_dir)
    if is_pruned:
        shutil.rmtree(run_dir / "checkpoints" / first)
    else:
        (run_dir / "checkpoints" / first / "numbers.json").write_bytes(b"{}")
    report = look(run_dir)
    assert (report.outcome, report.crossings[0].checkpoint) == ("equal", second)
    assert any(first in note for note in report.notes) is not is_pruned


def test_a_checkpoint_before_the_recovery_is_no_way_across(tmp_path: Path) -> None:
    """It was hidden while the learner recovered, and is back now: it holds what the record did to the state."""
    run_dir, hidden = tmp_path / "run", tmp_path / "hidden"
    with life(run_dir) as first:
        first.learn(range(6))
        position = first.admit(6)
        first.learn(range(7, 10))
        before = first.checkpoint()
        first.learn(range(10, 12))
    before.rename(hidden)
    for _ in range(3):
        with Attempts(run_dir / f"{OWNER}.attempts") as attempts:
            attempts.begin(Work.RECORD, position)
    with life(run_dir, incarnation=4) as fourth:
        fourth.learn(range(12, 16))
    hidden.rename(before)
    report = look(run_dir)
    assert report.outcome == "equal"
    assert report.crossings[0].checkpoint != before.name
    assert report.crossings[0].resumed_at == records(run_dir, "CheckpointStaged")[1].position


def test_a_step_inside_the_gap_cannot_be_shown(quarantined: tuple[Path, int]) -> None:
    run_dir, position = quarantined
    inside = next(r.header["step"] for r in records(run_dir, "LearnerStepped") if r.position > position)
    report = look(run_dir, until=inside)
    assert (report.outcome, report.stopped) == ("incomplete", None)
    assert report.notes == [f"step {inside} is among those that were not replayed"]
    assert look(run_dir, until=inside - 1).stopped is not None
