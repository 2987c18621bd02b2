"""A run in a Gymnasium world from outside: it trains, measures, is replayed, and can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from esper_simic.events import ExperienceAdmitted, LearnerStepped
from supervisor.events import LEARNED, PolicyEvaluated
from supervisor.journal import Record, read
from tests.system.driver import left_after, output_path, running, say

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

UPDATES = 12
EPISODES = 6
ACTORS = 2
LANES, LENGTH = 8, 16

SETTINGS: dict[str, Any] = {
    "environment__id": "CartPole-v1",
    "environment__max_epochs": None,  # the driver's small settings are of growing hosts
    "environment__train_batches": None,
    "environment__environments_per_actor": LANES,
    "environment__success_return": 15.0,
    "simic_trainer__batch_size": 8,
    "simic_trainer__unroll_length": LENGTH,
    "simic_trainer__hidden_size": 16,
    "simic_trainer__digest_every_steps": 3,
    "experience_buffer__min_experiences": 8,
    "experience_buffer__replay_ratio": 0.25,
    "supervisor__num_actors": ACTORS,
    "supervisor__max_updates": UPDATES,
    "supervisor__evaluation_episodes": EPISODES,
}


class Played(NamedTuple):
    run_dir: Path
    code: int
    output: str
    left: list[str]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    run_dir = tmp_path_factory.mktemp("gym") / "run"
    with running(run_dir, preset="gym", **SETTINGS) as run:
        code = run.process.wait(200)
        left = [str(process) for process in left_after(run.process.pid)]
    return Played(run_dir, code, output_path(run_dir).read_text("utf-8"), left)


def records(played: Played, owner: str, kind: str) -> list[Record]:
    return [record for record in read(played.run_dir / "journal" / owner) if record.kind == kind]


def test_it_ends_well_and_leaves_no_process(played: Played) -> None:
    assert played.code == 0, played.output
    assert played.left == []
    for log in (played.run_dir / "logs").glob("*.log"):
        assert "Traceback" not in log.read_text("utf-8"), log


def test_both_actors_bring_experience_and_the_updates_that_were_asked_for_are_made(played: Played) -> None:
    admitted = [
        record.header_as(ExperienceAdmitted) for record in records(played, "learner-0", "ExperienceAdmitted")
    ]
    assert {event.actor for event in admitted} == set(range(ACTORS))
    assert {(event.length, event.lanes) for event in admitted} == {(LENGTH, LANES)}
    episodes = [episode for event in admitted for episode in event.episodes]
    assert episodes
    for episode in episodes:
        assert episode.episode_return == episode.length >= 1, "CartPole pays 1 a step"
        assert episode.success == (episode.episode_return >= 15.0)
        assert (episode.accuracy, episode.parameters_added, episode.fossils) == (None, None, None)
    steps = [record.header_as(LearnerStepped) for record in records(played, "learner-0", "LearnerStepped")]
    assert [event.step for event in steps] == list(range(1, UPDATES + 1))
    assert "episodic_return" in steps[-1].metrics
    assert "episodic_accuracy" not in steps[-1].metrics


def test_the_learned_and_the_random_policy_are_measured_and_compared_by_their_returns(played: Played) -> None:
    measured = {
        event.policy: event
        for event in (
            record.header_as(PolicyEvaluated) for record in records(played, "supervisor", "PolicyEvaluated")
        )
    }
    assert set(measured) == {LEARNED, "random"}
    for event in measured.values():
        assert len(event.returns) == EPISODES
        assert all(earned == int(earned) >= 1 for earned in event.returns)
        assert (event.accuracies, event.parameters) == ((), ())
        assert {name.partition("_")[0] for name in event.summary} == {"return"}
    rows = [line for line in played.output.splitlines() if line.startswith("| ")]
    header, *body = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]
    assert header == ["policy", "return", "learned minus it"]
    assert [row[0] for row in body] == [LEARNED, "random"]


def test_the_journals_are_sound_and_a_replay_comes_to_the_same_bits(played: Played) -> None:
    said = say("log", "verify", played.run_dir)
    assert (said.code, said.out.count(": sound")) == (0, 2), said.out
    again = say("replay", played.run_dir, "--verify", "--json")
    assert again.code == 0, again.err
    report = again.json()
    assert report["outcome"] == "equal"
    assert report["steps_by_digest"] == UPDATES


def test_its_page_speaks_of_no_host(played: Played) -> None:
    said = say("report", played.run_dir)
    assert said.code == 0, said.err
    page = (played.run_dir / "report.html").read_text("utf-8")
    for words in ("return", "learned", "random", "episodic_length"):
        assert words in page, words
    for words in ("host accuracy", "parameters added", "A grown host", "on the front"):
        assert words not in page, words


def test_its_status_is_told(played: Played) -> None:
    said = say("status", played.run_dir, "--json")
    assert said.code == 3, said.err
    shown = said.json()
    assert shown["state"] == "finished"
    assert sorted(shown["evaluated"]) == [LEARNED, "random"]
    assert shown["learner"]["step"] == UPDATES
