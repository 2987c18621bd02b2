"""The page of a run in which nothing grows: what is of hosts is left out, the rest is there."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from esper_simic.config_gym import GROWING_HOST
from esper_simic.events import EpisodeFinished, ExperienceAdmitted, LearnerStepped, RunStarted
from supervisor.events import PolicyEvaluated, RunConfigured
from tests.supervisor.doors import Door, open_door
from tests.supervisor.recorded_runs import training
from tests.supervisor.report_runs import write_learner, write_supervisor
from tests.supervisor.test_report import Document, read_page

OF_HOSTS = (
    "Accuracy against parameters",
    "A grown host",
    "on the front",
    "parameters added",
    "host accuracy",
)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    return open_door(monkeypatch, capsys, tmp_path / "cwd")


def paged(door: Door, run_dir: Path, world_id: str) -> Document:
    world = training()
    config = {"environment": {"id": world_id}}
    world.events = [
        msgspec.structs.replace(event, config=config) if isinstance(event, RunConfigured) else event
        for event in world.events
    ]
    world.events += [
        PolicyEvaluated(
            at_s=5.0, policy=name, returns=(level, level, level + 1), accuracies=(), parameters=(), summary={}
        )
        for name, level in (("learned", 480.0), ("random", 20.0))
    ]
    write_supervisor(run_dir, world)
    ended = [
        EpisodeFinished(
            lane=lane, number=0, episode_return=20.0, length=20, truncated=cut, success=False, cut=cut
        )
        for lane, cut in enumerate((False, False, True))
    ]
    admitted = ExperienceAdmitted(
        actor=0,
        incarnation=1,
        sequence=1,
        policy_version=0,
        length=32,
        lanes=4,
        episode_numbers=[0] * 4,
        episodes=ended,
    )
    stepped = LearnerStepped(
        step=1, environment_steps=128, digest="d", state_digest=None, metrics={"episodic_return": 20.0}
    )
    started = RunStarted(run_id="run-1", config=config, fingerprint={})
    write_learner(run_dir, (1.0, started), (2.0, admitted), (4.0, stepped))
    said = door("report", run_dir)
    assert (said.code, said.err) == (0, "")
    return read_page(run_dir / "report.html")


def test_nothing_is_said_of_hosts_and_everything_of_returns(door: Door, tmp_path: Path) -> None:
    document = paged(door, tmp_path / "run", "CartPole-v1")
    for words in OF_HOSTS:
        assert words not in document.text, words
    assert "The highest interquartile mean return is that of learned" in document.text
    assert "learned against random, on the same 3 seeds: return higher" in document.text
    assert re.search(r"whole episodes2(?!\d)", document.text), "one of the three was cut short"
    assert [label for label in document.labels if label.startswith("return")]


def test_the_same_of_growing_hosts_has_their_sections(door: Door, tmp_path: Path) -> None:
    document = paged(door, tmp_path / "run", GROWING_HOST)
    for words in ("Accuracy against parameters", "A grown host"):
        assert words in document.text, words
