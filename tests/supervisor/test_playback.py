"""Replaying a learner's journal: what is equal, what cannot be replayed, and the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esper_simic.errors import ContractError
from supervisor.clock import ManualClock
from supervisor.playback import (
    Progress,
    Request,
    RequestError,
    parse_break,
    replay,
    words,
)
from tests.supervisor.recorded_learner import (
    OWNER,
    changed_header,
    last_step,
    look,
    records,
    rewritten,
)
from tests.supervisor.recorded_replays import names, record_two_lives


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_two_lives(tmp_path_factory.mktemp("recorded") / "run")


# -- equal -------------------------------------------------------------------------------------------------------------


def test_a_whole_run_is_equal(run: Path) -> None:
    report = look(run)
    steps = len(records(run, "LearnerStepped"))
    assert steps >= 20
    assert (report.outcome, report.is_good) == ("equal", True)
    assert (report.steps, report.steps_by_digest, report.last_step) == (steps, steps, last_step(run))
    staged, recovered = records(run, "CheckpointStaged"), records(run, "LearnerRecovered")
    with_state = [r for r in records(run, "LearnerStepped") if r.header["state_digest"] is not None]
    assert (len(staged), len(recovered)) == (3, 1)
    assert report.states_equal == len(with_state) + len(staged) + len(recovered)
    assert report.next_position == len(records(run))
    assert words(report)[-1].startswith(f"{steps} steps replayed, all equal")


def test_the_runs_time_is_that_in_which_it_ran(run: Path) -> None:
    """A second passes with every admission, refusal, step and checkpoint; none counts between the lives."""
    moves = ("ExperienceAdmitted", "ExperienceRefused", "LearnerStepped", "CheckpointStaged")
    seconds = sum(record.kind in moves for record in records(run))
    assert look(run).run_seconds == seconds - 1, "the first move's second is before the first unroll"


class Ticking(ManualClock):
    """Every look at it costs a second."""

    def monotonic_s(self) -> float:
        self.advance(1.0)
        return super().monotonic_s()


def test_progress_tells_speed_and_time_left(run: Path) -> None:
    told: list[Progress] = []
    report = replay(Request(run), Ticking(), progress=told.append)
    assert [one.steps for one in told] == list(range(1, report.steps + 1))
    assert {one.steps_total for one in told} == {last_step(run)}
    first, last = told[0], told[-1]
    assert first.steps_per_second == pytest.approx(1 / first.seconds)
    assert first.seconds_left == pytest.approx((last_step(run) - 1) * first.seconds)
    assert last.seconds_left == 0
    assert report.times_as_fast == pytest.approx(report.run_seconds / report.seconds)


def test_verify_compares_every_checkpoint_to_the_bit(run: Path) -> None:
    report = look(run, verify=True)
    assert [one.name for one in report.checkpoints] == names(run)
    assert all(
        one.is_equal and one.tensors > 100 and not one.tensor_differences for one in report.checkpoints
    )
    assert look(run).checkpoints == []


def test_a_checkpoint_that_nobody_saved_is_none(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    shutil.copytree(run / "checkpoints" / names(run)[0], copied / "checkpoints" / f"{names(run)[0]}-2")
    assert [one.name for one in look(copied, verify=True).checkpoints] == names(run)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_from_a_checkpoint_it_is_the_same(run: Path, index: int) -> None:
    origin = names(run)[index]
    report = look(run, origin=origin, verify=True)
    assert report.outcome == "equal"
    assert report.first_step == int(origin.split("-")[1])
    assert report.steps == last_step(run) - report.first_step > 0
    assert [one.name for one in report.checkpoints] == names(run)[index:]
    assert f"from {origin}" in words(report)[-1]


def test_until_stops_after_a_step_and_shows_it(run: Path) -> None:
    record = records(run, "LearnerStepped")[6]
    report = look(run, until=7)
    assert report.steps == 7
    assert report.stopped is not None
    assert (report.stopped.step, report.stopped.position, report.stopped.is_before) == (
        7,
        record.position,
        False,
    )
    assert report.stopped.digest == record.header["digest"]
    assert report.stopped.metrics == record.header["metrics"]
    assert any(record.header["digest"] in line for line in words(report))


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_damage_is_named_after_what_stands_before_it_was_replayed(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (segment,) = (damaged / "journal" / OWNER).glob("*.log")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    report = look(damaged)
    (damage,) = report.damage
    assert (report.outcome, report.is_good) == ("damaged", False)
    assert damage.segment == segment.name
    assert 0 < damage.offset <= len(data) // 2
    assert 0 < report.steps == report.steps_by_digest < last_step(run)
    assert f"{segment.name}:{damage.offset}" in words(report)[-1]
    assert look(damaged, until=last_step(run)).outcome == "damaged"


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"until": 10_000}, r"step 10000 .* steps 1 to \d+"),
        ({"origin": "step-000000000099"}, r"no checkpoint 'step-000000000099'.*there: step-"),
        ({"condition": parse_break("10000")}, "step 10000"),
        ({"condition": parse_break("entropi > 1")}, "did you mean entropy"),
        ({"condition": parse_break("los > 1")}, "did you mean policy_loss, value_loss"),
        ({"condition": parse_break("zzz > 1")}, "it has approx_kl"),
        ({"owner": "supervisor"}, "no learner"),
    ],
)
def test_what_is_not_there_is_refused(run: Path, asked: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        look(run, **asked)


def test_a_step_before_the_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(RequestError, match="steps"):
        look(run, origin=names(run)[0], until=1)


def test_a_journal_of_somebody_else_is_refused(tmp_path: Path) -> None:
    from supervisor.journal import Journal

    with Journal(tmp_path / "journal" / OWNER, owner=OWNER, run_id="r") as journal:
        journal.append("Something", {})
        journal.sync()
    with pytest.raises(ContractError):
        look(tmp_path)


def test_a_bad_checkpoint_is_said_when_it_is_verified(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    first, second, _ = names(copied)
    with (copied / "checkpoints" / first / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    (copied / "checkpoints" / second / "manifest.json").unlink()
    report = look(copied, verify=True)
    assert report.outcome == "divergent"
    assert "100 bytes" in report.checkpoints[0].error
    assert any(second in note for note in report.notes)
    assert look(copied).outcome == "equal", "only who verifies looks at them"


# -- reports -----------------------------------------------------------------------------------------------------------


def test_the_report_is_json(run: Path) -> None:
    decoded = msgspec.json.decode(msgspec.json.encode(look(run, until=3).to_builtins()))
    assert decoded["schema"] == 1
    assert (decoded["outcome"], decoded["is_good"], decoded["steps"]) == ("equal", True, 3)
    assert decoded["stopped"]["digest"]


def test_events_since_the_last_equal_one_are_limited(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supervisor.playback import judge, wording

    changed = changed_header(records(run, "LearnerStepped")[0].position, digest="f" * 16)
    altered = rewritten(run, tmp_path / "altered", changed)
    monkeypatch.setattr(wording, "EVENTS_SHOWN_MAX", 2)
    report = look(altered)
    assert report.divergence is not None
    total = len(report.divergence.since_equal)
    assert total == records(run, "LearnerStepped")[0].position + 1
    assert f"... {total - 2} earlier ones" in "\n".join(words(report))
    assert judge.EVENTS_MAX >= 100
