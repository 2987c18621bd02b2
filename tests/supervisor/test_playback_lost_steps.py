"""Replays over updates that gave no new weights: failed, given up, or never finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_simic.errors import InvariantViolation
from esper_simic.events import StepFailed, StepSkipped
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated
from supervisor.playback import Pause, parse_break, words
from supervisor.roles.attempts import Attempts, Work
from tests.supervisor.recorded_learner import (
    OWNER,
    Life,
    changed_header,
    last_step,
    life,
    look,
    make_config,
    records,
    rewritten,
)

TRUNCATION_FRAME = -1


def poison(living: Life, seed: int) -> None:
    """An unroll of which no update can be made: a value of a cut episode that squares to infinity."""
    frames = living.frames(seed)
    values = np.full_like(np.frombuffer(frames[TRUNCATION_FRAME], dtype="<f4"), 3e38)
    living.admit(seed, frames=[*frames[:TRUNCATION_FRAME], values.tobytes()])


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """A run in which one update failed, was recorded so, and others followed."""
    run_dir = tmp_path / "run"
    with life(run_dir) as living:
        living.learn(range(8))
        poison(living, 8)
        living.learn(range(9, 14))
        living.checkpoint()
        living.learn(range(14, 16))
    return run_dir


def test_a_run_with_a_step_that_failed_is_equal(failed: Path) -> None:
    report = look(failed, verify=True)
    steps, failures = records(failed, "LearnerStepped"), records(failed, "StepFailed")
    assert len(failures) >= 1
    assert (report.outcome, report.last_step) == ("equal", last_step(failed))
    assert report.steps == report.steps_by_digest == len(steps) + len(failures)
    assert report.steps_failed == len(failures)
    assert words(report)[-1].startswith(
        f"{report.steps} steps replayed ({len(failures)} failed, as recorded), "
    )
    assert [one.is_equal for one in report.checkpoints] == [True]


def test_before_a_step_that_failed_the_batch_is_there_and_its_failure_is_computed_again(failed: Path) -> None:
    answers: list[dict[str, Any]] = []

    def make(pause: Pause) -> None:
        assert (type(pause.event), pause.metrics, pause.learner.steps_done) == (
            StepFailed,
            {},
            pause.step - 1,
        )
        assert pause.batch is not None
        assert pause.record is not None
        assert f"nothing: it failed: {pause.record.header['reason']}" in pause.banner()
        answers.append(pause.advance())
        assert pause.advance()["made"] == "already"
        assert pause.learner.steps_done == pause.step

    report = look(failed, condition=parse_break("nan"), interact=make)
    expected = [record.header for record in records(failed, "StepFailed")]
    assert [answer["step"] for answer in answers] == [header["step"] for header in expected]
    for answer, header in zip(answers, expected, strict=True):
        assert answer["failure"] == {"recorded": header["reason"], "computed": header["reason"]}
        assert answer["digest"] == {"recorded": header["digest"], "computed": header["digest"]}
    assert (report.outcome, report.last_step) == ("equal", last_step(failed)), "it went on behind them"


def test_a_failure_for_want_of_memory_is_not_tried_again(failed: Path, tmp_path: Path) -> None:
    record = records(failed, "StepFailed")[0]
    wanting = changed_header(record.position, out_of_memory=True, reason="out of memory: 3 GiB")
    answers: list[dict[str, Any]] = []

    def make(pause: Pause) -> None:
        answers.append(pause.advance())
        pause.stop()

    where = parse_break(str(record.header["step"]))
    report = look(rewritten(failed, tmp_path / "altered", wanting), condition=where, interact=make)
    assert answers[0]["failure"] == {"recorded": "out of memory: 3 GiB", "computed": None}
    assert report.stopped is not None
    assert (report.stopped.is_before, report.stopped.failure) == (False, "out of memory: 3 GiB")


def test_a_journal_may_end_with_a_step_that_failed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with life(run_dir) as living:
        living.learn(range(8))
        poison(living, 8)
        living.learn([9])
    last = records(run_dir)[-1]
    assert last.kind == "StepFailed"
    report = look(run_dir, until=last.header["step"])
    assert report.stopped is not None
    assert (report.last_step, report.stopped.position) == (last.header["step"], last.position)


def test_before_a_step_its_batch_is_as_small_as_it_was(tmp_path: Path) -> None:
    """After a step that did not fit into memory the next ones are smaller."""
    with life(tmp_path / "run", make_config("simic_trainer.batch_size=16")) as living:
        living.learn(range(10))
        update = living.learner.engine._update

        def runs_short(batch: Batch, terms: Terms) -> Updated:
            living.learner.engine._update = update
            raise torch.OutOfMemoryError

        living.learner.engine._update = runs_short
        living.learn(range(10, 18))
    (failure,) = records(tmp_path / "run", "StepFailed")
    step = failure.header["step"]
    sizes: dict[int, int] = {}

    def count(pause: Pause) -> None:
        assert pause.batch is not None
        sizes[pause.step] = len(pause.batch.serials)
        pause.stop()

    for asked in (step, step + 1):
        look(tmp_path / "run", condition=parse_break(str(asked)), interact=count)
    assert sizes == {step: 16, step + 1: 8}


@pytest.mark.parametrize("asked", ["condition", "until"])
def test_where_it_stops_at_a_step_that_failed_it_says_why(failed: Path, asked: str) -> None:
    header = records(failed, "StepFailed")[0].header
    where = {"condition": parse_break("nan")} if asked == "condition" else {"until": header["step"]}
    report = look(failed, **where)
    assert report.stopped is not None
    assert (report.stopped.step, report.stopped.is_before) == (header["step"], asked == "condition")
    assert report.stopped.failure == header["reason"]
    assert f"  it failed: {header['reason']}" in words(report)


def test_a_false_digest_of_a_step_that_failed_is_a_divergence(failed: Path, tmp_path: Path) -> None:
    record = records(failed, "StepFailed")[0]
    report = look(rewritten(failed, tmp_path / "altered", changed_header(record.position, digest="f" * 16)))
    found = report.divergence
    assert found is not None
    assert (found.kind, found.what, found.step) == ("StepFailed", "parameters", record.header["step"])


@pytest.fixture
def died(tmp_path: Path) -> Path:
    """A run of before there were failed steps, which died of its next update."""
    run_dir = tmp_path / "run"
    with life(run_dir, is_old=True) as living:
        living.learn(range(8))
        poison(living, 8)
        living.admit(9)
        with pytest.raises(InvariantViolation, match="gradient norm"):
            living.step_all()
    assert {record.header["inputs"] for record in records(run_dir, "LearnerStepped")} == {None}
    return run_dir


@pytest.fixture(params=[False, True], ids=["sound", "poisoned"])
def killed(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, bool]:
    """A run that was killed in the middle of its next update, and whether that was going to fail."""
    run_dir = tmp_path / "run"
    with life(run_dir) as living:
        living.learn(range(8))
        if request.param:
            poison(living, 8)
        else:
            living.admit(8)
        living.admit(9)
        assert living.learner.can_step()
    return run_dir, request.param


@pytest.mark.parametrize("condition", ["nan", "the next"])
def test_the_step_that_the_run_died_of(died: Path, condition: str) -> None:
    last = last_step(died)
    raised: list[str] = []

    def make(pause: Pause) -> None:
        assert (pause.step, pause.record, pause.metrics) == (last + 1, None, {})
        assert pause.batch is not None
        assert "nothing: it was never finished" in pause.banner()
        with pytest.raises(InvariantViolation) as error:
            pause.advance()
        raised.append(str(error.value))

    where = condition if condition == "nan" else str(last + 1)
    report = look(died, condition=parse_break(where), interact=make)
    assert "gradient norm" in raised[0]
    assert (report.outcome, report.steps) == ("equal", last)
    assert report.stopped is not None
    assert (report.stopped.step, report.stopped.position) == (last + 1, None)


def test_the_step_in_the_middle_of_which_a_run_was_killed(killed: tuple[Path, bool]) -> None:
    run_dir, is_poisoned = killed
    last = last_step(run_dir)
    answers: list[dict[str, Any]] = []

    def make(pause: Pause) -> None:
        assert (pause.step, pause.record, pause.metrics) == (last + 1, None, {})
        answers.append(pause.advance())

    report = look(run_dir, condition=parse_break(str(last + 1)), interact=make)
    assert answers[0]["step"] == last + 1
    assert ("gradient norm" in answers[0].get("failure", "")) is is_poisoned
    assert ("metrics" in answers[0]) is not is_poisoned
    assert report.stopped is not None
    assert (report.stopped.position, report.stopped.is_before) == (None, False)
    assert (report.outcome, report.steps) == ("equal", last), "only what the journal holds is replayed"


def test_nan_stops_before_an_unfinished_step_only_where_it_fails(killed: tuple[Path, bool]) -> None:
    run_dir, is_poisoned = killed
    report = look(run_dir, condition=parse_break("nan"))
    assert (report.stopped is not None) is is_poisoned
    assert ("nothing was there to stop before" in report.notes) is not is_poisoned


def test_a_step_that_was_given_up_is_one_that_the_run_died_of(died: Path) -> None:
    given_up(died)


def test_a_step_that_was_killed_again_and_again_is_one_that_the_run_died_of(
    killed: tuple[Path, bool],
) -> None:
    given_up(killed[0])


def given_up(run_dir: Path) -> None:
    """Three lives die of the next update, the next one gives it up, and a replay stops there."""
    for _ in range(3):
        with Attempts(run_dir / f"{OWNER}.attempts") as attempts:
            attempts.begin(Work.STEP, last_step(run_dir) + 1)
    with life(run_dir, incarnation=5):
        (skipped,) = records(run_dir, "StepSkipped")
    seen: list[Pause] = []
    report = look(run_dir, condition=parse_break("nan"), interact=seen.append)
    assert [type(pause.event) for pause in seen] == [StepSkipped]
    assert seen[0].step == skipped.header["step"]
    assert "it was given up: the learner died 3 times" in " ".join(seen[0].banner().split())
    assert report.outcome == "equal"
