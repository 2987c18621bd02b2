"""Replaying a learner's journal: equal where it is, the right first divergent step where it is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from esper_simic.errors import ContractError
from supervisor.clock import ManualClock
from supervisor.journal import Record
from supervisor.playback import (
    Pause,
    Progress,
    Request,
    RequestError,
    console,
    parse_break,
    replay,
    words,
)
from supervisor.roles.attempts import Attempts, Work
from supervisor.roles.fold import LearnerFold
from tests.supervisor.recorded_learner import (
    OWNER,
    Rewriting,
    changed_header,
    last_step,
    life,
    look,
    make_config,
    records,
    rewritten,
)

REWARD_FRAME = -3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lives of a learner: 25 updates, a refusal, three checkpoints, a tail folded by the second life."""
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    with life(run_dir) as first:
        first.learn(range(8))
        first.refuse()
        first.checkpoint()
        first.learn(range(8, 18))
        first.checkpoint()
        first.learn(range(18, 22))
    with life(run_dir, incarnation=2) as second:
        second.learn(range(22, 32))
        second.checkpoint()
        second.learn(range(32, 36))
    return run_dir


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


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


# -- divergent ---------------------------------------------------------------------------------------------------------


def with_reward_changed(position: int, by: float = 1.0) -> Callable[[Record], Rewriting | None]:
    def change(record: Record) -> Rewriting | None:
        if record.position != position:
            return None
        frames = [bytes(frame) for frame in record.frames]
        rewards = np.frombuffer(frames[REWARD_FRAME], dtype="<f4").copy()
        rewards[0] += by
        frames[REWARD_FRAME] = rewards.tobytes()
        return record.header, frames

    return change


def digests_by_hand(run_dir: Path) -> dict[int, tuple[str, ...]]:
    """All that was computed at each position where the journal has a digest."""
    fold = LearnerFold(make_config(), run_dir / "journal" / OWNER, run_dir / "checkpoints")
    found = {}
    for record in records(run_dir):
        folded = fold.take(record)
        if record.kind in ("LearnerStepped", "CheckpointStaged", "LearnerRecovered"):
            both = (folded.report.digest if folded.report else None, folded.state_digest)
            found[record.position] = tuple(digest for digest in both if digest is not None)
    return found


@pytest.mark.parametrize("which", [0, 5, 17, 30])
def test_a_changed_reward_is_found_where_it_first_mattered(run: Path, tmp_path: Path, which: int) -> None:
    position = records(run, "ExperienceAdmitted")[which].position
    altered = rewritten(run, tmp_path / "altered", with_reward_changed(position))
    truth, other = digests_by_hand(run), digests_by_hand(altered)
    first = next(at for at in truth if truth[at] != other[at])
    (record,) = [one for one in records(run) if one.position == first]

    report = look(altered)
    found = report.divergence
    assert found is not None
    assert (report.outcome, report.is_good) == ("divergent", False)
    assert (found.position, found.kind, found.step) == (first, record.kind, record.header["step"])
    unequal = next(pair for pair in zip(truth[first], other[first], strict=True) if pair[0] != pair[1])
    assert (found.recorded, found.computed) == unequal
    assert report.steps_by_digest == sum(r.position < first for r in records(run, "LearnerStepped"))
    assert position in [event.position for event in found.since_equal]
    begin = 0 if found.equal_position is None else found.equal_position + 1
    assert [event.position for event in found.since_equal] == list(range(begin, first + 1))
    assert found.equal_position == max((at for at in truth if at < first), default=None)
    assert found.equal_position is None or found.equal_position < position
    if record.kind == "LearnerStepped":
        assert {one.name for one in found.metrics} >= {"reward_deviation"}
    assert found.fingerprint_recorded == found.fingerprint_here
    staged = [r.position for r in records(run, "CheckpointStaged") if r.position >= first]
    assert (found.checkpoint.position if found.checkpoint else None) == next(iter(staged), None)
    if found.checkpoint is not None:
        differing = {one.name for one in found.checkpoint.tensor_differences}
        assert any(name.startswith("policy.") for name in differing) or record.kind == "CheckpointStaged"
        assert all(one.max_abs > 0 for one in found.checkpoint.tensor_differences)
        assert {one.path for one in found.checkpoint.value_differences} >= {
            "numbers.reward_scale.sum_squares"
        }
    text = "\n".join(words(report))
    assert f"FIRST DIVERGENT STEP: {found.step} (record {first}, {record.kind})" in text
    assert all(digest in text for digest in unequal)


def test_the_very_number_by_which_a_tensor_differs(run: Path, tmp_path: Path) -> None:
    """A changed copy of a checkpoint: one weight moved by a half, one moment turned."""
    from supervisor import checkpoints
    from supervisor.roles.fold import checkpoint_files, read_state

    altered = tmp_path / "altered"
    shutil.copytree(run, altered)
    name = names(run)[1]
    manifest, state = read_state(run / "checkpoints" / name)
    weight, moment = "policy.heads.slot_out.weight", "optimizer.value.0.exp_avg"
    state.tensors[weight].view(-1)[0] += 0.5
    state.tensors[moment].neg_()
    state.numbers["reward_scale"]["count"] += 1
    shutil.rmtree(altered / "checkpoints" / name)
    fields = msgspec.to_builtins(manifest) | {"state_digest": state.digest}
    assert checkpoints.save(altered / "checkpoints", checkpoint_files(state), fields).name == name

    report = look(altered, verify=True)
    assert report.outcome == "divergent"
    assert report.divergence is None
    (bad,) = [one for one in report.checkpoints if not one.is_equal]
    first, second = bad.tensor_differences
    assert (first.name, second.name) == (moment, weight)
    assert second.max_abs == pytest.approx(0.5)
    assert second.elements_differing == 1
    assert first.max_relative == pytest.approx(2.0)
    (value,) = bad.value_differences
    assert value.path == "numbers.reward_scale.count"
    assert value.recorded == value.computed + 1


def test_a_false_digest_is_a_divergence_of_nothing_else(run: Path, tmp_path: Path) -> None:
    record = records(run, "LearnerStepped")[2]
    report = look(rewritten(run, tmp_path / "altered", changed_header(record.position, digest="f" * 16)))
    found = report.divergence
    assert found is not None
    assert (found.step, found.recorded, found.computed) == (3, "f" * 16, record.header["digest"])
    assert found.metrics == []
    assert found.checkpoint is not None
    assert found.checkpoint.is_equal
    assert "equal to the bit" in "\n".join(words(report))


def test_a_false_state_digest_is_found_at_its_checkpoint(run: Path, tmp_path: Path) -> None:
    record = records(run, "CheckpointStaged")[1]
    report = look(
        rewritten(run, tmp_path / "altered", changed_header(record.position, state_digest="f" * 16))
    )
    found = report.divergence
    assert found is not None
    assert (found.kind, found.what, found.position) == ("CheckpointStaged", "state", record.position)
    assert found.checkpoint is not None
    assert found.checkpoint.position == record.position


def test_behind_the_last_checkpoint_there_are_no_tensors_to_compare(run: Path, tmp_path: Path) -> None:
    record = records(run, "LearnerStepped")[-1]
    report = look(rewritten(run, tmp_path / "altered", changed_header(record.position, digest="f" * 16)))
    assert report.divergence is not None
    assert report.divergence.checkpoint is None
    assert "no checkpoint on disk was staged after it" in "\n".join(words(report))


def test_a_step_without_its_experience_is_a_divergence(run: Path, tmp_path: Path) -> None:
    """The second unroll of the run stands there as refused: the first update cannot be made."""
    second = records(run, "ExperienceAdmitted")[1]
    refused = {key: second.header[key] for key in ("actor", "incarnation", "sequence", "policy_version")}
    altered = tmp_path / "altered"
    from supervisor.journal import Journal

    with Journal(altered / "journal" / OWNER, owner=OWNER, run_id="run-1") as journal:
        for record in records(run):
            if record.position == second.position:
                journal.append("ExperienceRefused", refused | {"steps": 12, "reason": "too_old"})
            else:
                journal.append(record.kind, record.header, [bytes(frame) for frame in record.frames])
        journal.sync()
    report = look(altered)
    assert report.divergence is not None
    assert (report.divergence.step, report.divergence.what) == (1, "error")
    assert "without enough experience" in report.divergence.computed


def test_other_metrics_under_equal_digests_are_said_and_nothing_more(run: Path, tmp_path: Path) -> None:
    record = records(run, "LearnerStepped")[3]
    metrics = record.header["metrics"] | {"entropy": 0.0}
    altered = rewritten(run, tmp_path / "altered", changed_header(record.position, metrics=metrics))
    report = look(altered)
    assert report.outcome == "equal"
    assert report.notes == ["metrics of 1 steps with equal digests differ, the first at step 4: entropy"]


# -- another fingerprint -----------------------------------------------------------------------------------------------


def elsewhere(noise: dict[int, float]) -> Callable[[Record], Rewriting | None]:
    """As another machine would have recorded it: another fingerprint, other digests, metrics off by some noise."""

    def change(record: Record) -> Rewriting | None:
        header = dict(record.header)
        if record.kind == "RunStarted":
            header["fingerprint"] = header["fingerprint"] | {"cpu_capability": "OTHER"}
        elif record.kind == "LearnerStepped":
            factor = 1.0 + noise.get(header["step"], 1e-5)
            header["digest"] = "0" * 16
            header["metrics"] = {name: value * factor for name, value in header["metrics"].items()}
        else:
            return None
        return header, record.frames

    return change


def recorded_elsewhere(run: Path, target: Path, change: Callable[[Record], Rewriting | None]) -> Path:
    """The run as another machine would have recorded it, its checkpoints too."""
    rewritten(run, target, change)
    (target / "checkpoints").unlink()
    shutil.copytree(run / "checkpoints", target / "checkpoints")
    for path in target.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["fingerprint"]["cpu_capability"] = "OTHER"
        path.write_text(json.dumps(manifest))
    return target


def test_under_another_fingerprint_metrics_are_compared_within_the_tolerance(
    run: Path, tmp_path: Path
) -> None:
    report = look(recorded_elsewhere(run, tmp_path / "other", elsewhere({})))
    assert (report.outcome, report.is_good) == ("within_tolerance", True)
    assert report.steps_by_tolerance == report.steps == last_step(run)
    assert list(report.fingerprint_differences) == ["cpu_capability"]
    assert report.fingerprint_differences["cpu_capability"][0] == "OTHER"
    assert [one.name for one in report.checkpoints] == names(run), "compared, and gone on from"
    text = "\n".join(words(report))
    assert "cpu_capability: recorded OTHER, here" in text
    assert "within 0.001 of themselves or 0.0001" in text


def test_under_another_fingerprint_the_first_step_outside_is_named(run: Path, tmp_path: Path) -> None:
    report = look(recorded_elsewhere(run, tmp_path / "other", elsewhere({9: 0.01, 11: 0.5})))
    found = report.divergence
    assert (report.outcome, report.steps_by_tolerance) == ("divergent", 8)
    assert found is not None
    assert (found.step, found.what) == (9, "metrics")
    assert "grad_norm" in found.recorded
    assert found.fingerprint_recorded["cpu_capability"] == "OTHER" != found.fingerprint_here["cpu_capability"]
    assert "FIRST STEP OUTSIDE THE TOLERANCE: 9" in "\n".join(words(report))


def test_at_a_checkpoint_the_small_differences_begin_anew(run: Path, tmp_path: Path) -> None:
    """A reward that is off by little stands for another machine's rounding; behind the first checkpoint no batch has
    it."""
    first = records(run, "ExperienceAdmitted")[0].position
    nudged = with_reward_changed(first, by=1e-4)

    def change(record: Record) -> Rewriting | None:
        if record.kind == "RunStarted":
            return elsewhere({})(record)
        return nudged(record)

    report = look(recorded_elsewhere(run, tmp_path / "other", change))
    assert report.outcome == "within_tolerance", words(report)
    behind = records(run, "CheckpointStaged")[0].header["step"]
    assert (report.steps_by_tolerance, report.steps_by_digest) == (behind, last_step(run) - behind)
    (compared,) = report.checkpoints
    assert compared.tensor_differences
    assert compared.is_equal, "within the tolerance"


def test_equal_digests_count_under_any_fingerprint(run: Path, tmp_path: Path) -> None:
    started = records(run, "RunStarted")[0]
    moved = changed_header(0, fingerprint=started.header["fingerprint"] | {"mkldnn": "False"})
    report = look(rewritten(run, tmp_path / "other", moved))
    assert report.outcome == "equal"
    assert list(report.fingerprint_differences) == ["mkldnn"]


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


# -- stopping before a step --------------------------------------------------------------------------------------------


def test_before_a_step_the_state_is_there_and_looking_changes_nothing(run: Path) -> None:
    seen: list[Pause] = []

    def look_around(pause: Pause) -> None:
        seen.append(pause)
        shown = pause.names()
        assert shown["learner"].steps_done == 11
        assert shown["policy"] is shown["learner"].policy
        assert len(shown["batch"].serials) == 8
        assert shown["metrics"] == records(run, "LearnerStepped")[11].header["metrics"]
        assert shown["record"].kind == "LearnerStepped"
        for name in shown:
            assert name in pause.banner()

    report = look(run, condition=parse_break("12"), interact=look_around)
    assert [pause.step for pause in seen] == [12]
    assert (report.outcome, report.steps) == ("equal", last_step(run))


def test_advance_makes_the_step_once_and_the_replay_goes_on_to_the_next_match(run: Path) -> None:
    answers: list[dict[str, Any]] = []
    limit = records(run, "LearnerStepped")[4].header["metrics"]["grad_norm"]
    expected = [r.header for r in records(run, "LearnerStepped") if r.header["metrics"]["grad_norm"] >= limit]

    def make(pause: Pause) -> None:
        answers.append(pause.advance())
        assert pause.advance()["made"] == "already"
        assert pause.learner.steps_done == pause.step

    report = look(run, condition=parse_break(f"grad_norm >= {limit!r}"), interact=make)
    assert [answer["step"] for answer in answers] == [header["step"] for header in expected]
    for answer, header in zip(answers, expected, strict=True):
        assert answer["digest"] == {"recorded": header["digest"], "computed": header["digest"]}
        assert answer["metrics"] == header["metrics"]
        assert answer["metrics_differing"] == []
    assert (report.outcome, report.steps) == ("equal", last_step(run))


@pytest.mark.parametrize("is_made", [False, True])
def test_stop_ends_the_replay(run: Path, is_made: bool) -> None:
    def enough(pause: Pause) -> None:
        if is_made:
            pause.advance()
        pause.stop()

    report = look(run, condition=parse_break("5"), interact=enough)
    assert report.stopped is not None
    assert (report.stopped.step, report.stopped.is_before) == (5, not is_made)
    assert report.steps == report.steps_by_digest == 4 + is_made


def test_without_anybody_to_ask_it_ends_before_the_step(run: Path) -> None:
    report = look(run, condition=parse_break("5"))
    assert report.stopped is not None
    assert (report.stopped.step, report.stopped.is_before, report.steps) == (5, True, 4)
    assert report.stopped.metrics == records(run, "LearnerStepped")[4].header["metrics"]
    assert any(line.startswith("stopped before step 5") for line in words(report))


def test_where_nothing_matches_that_is_said(run: Path) -> None:
    for condition in ("nan", "grad_norm > 1e9"):
        report = look(run, condition=parse_break(condition))
        assert (report.outcome, report.stopped) == ("equal", None)
        assert report.notes == ["nothing was there to stop before"]


def test_the_console_shows_the_banner_and_obeys(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["print('at', learner.steps_done, step)", "advance()['step']", "stop()"])

    def typed(_: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = look(run, condition=parse_break("3"), interact=console)
    said = capsys.readouterr()
    assert "at 2 3\n3\n" in said.out
    assert "Before step 3 (record " in said.err
    assert report.stopped is not None
    assert report.steps == 3


def test_where_ipython_is_installed_it_is_the_console(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its documented door; it is no dependency of ours, so a stand-in takes the call."""

    def start_ipython(argv: list[str], user_ns: dict[str, Any]) -> None:
        assert argv == ["--no-banner"]
        assert user_ns["learner"].steps_done == 2
        user_ns["advance"]()
        user_ns["stop"]()

    stand_in = ModuleType("IPython")
    stand_in.start_ipython = start_ipython  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", stand_in)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: stand_in)
    report = look(run, condition=parse_break("3"), interact=console)
    assert report.steps == 3
    assert "Before step 3 (record " in capsys.readouterr().out


def test_exit_in_the_console_ends_the_replay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_: str = "") -> str:
        return "raise SystemExit"

    monkeypatch.setattr("builtins.input", leave)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = look(run, condition=parse_break("3"), interact=console)
    assert report.stopped is not None
    assert report.steps == 2


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
