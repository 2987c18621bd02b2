"""Replays that stop before a step, and who looks then."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from supervisor.playback import (
    Pause,
    console,
    parse_break,
    words,
)
from tests.supervisor.recorded_learner import (
    last_step,
    look,
    records,
)
from tests.supervisor.recorded_replays import record_two_lives


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_two_lives(tmp_path_factory.mktemp("recorded") / "run")


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
