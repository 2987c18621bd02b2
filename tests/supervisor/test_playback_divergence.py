"""Replays that differ from what was recorded: the right first step, here and under another fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from supervisor.journal import Record
from supervisor.playback import (
    words,
)
from supervisor.roles.fold import LearnerFold
from tests.supervisor.recorded_learner import (
    OWNER,
    Rewriting,
    changed_header,
    last_step,
    look,
    make_config,
    records,
    rewritten,
)
from tests.supervisor.recorded_replays import names, record_two_lives, with_reward_changed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_two_lives(tmp_path_factory.mktemp("recorded") / "run")


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
