"""The curriculum between processes: when actors hear of a stage, where they go then, what comes back after a death."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esper_simic.config import parse
from esper_simic.errors import ConfigError
from esper_simic.events import CurriculumJudged, EpisodeFinished, ExperienceAdmitted, ExperienceRefused
from esper_simic.growing_host.tasks import load_task
from supervisor.protocol import PullWeights, Refused, Weights
from supervisor.roles import actor, learner_line
from supervisor.roles.data import examined_data
from tests.roles.bench import LANES, Actor, Bench, bench, episode, make_config
from tests.roles.pair import SMALL, Pair, control_line
from tests.roles.test_actor_lockstep import ACTORS, ROUNDS, History, Run, history
from tests.roles.test_failed_steps import folded

SHORT, LONG = 4, 6
"""Steps of an episode in each stage."""

ROW = "min_success_rate: 0.5, min_episodes: 4, max_episodes: 1000, success: 'return >= -1000000'"
STAGE_ROWS = (
    f"{{name: short, difficulty: 0.5, {ROW}, environment: {{max_epochs: {SHORT}}}}}",
    f"{{name: long, difficulty: 1.0, {ROW}}}",
)
STAGES = (f"simic_trainer.curriculum_stages=[{', '.join(STAGE_ROWS)}]", "environment.stagger=false")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_line, "GREETING_INTERVAL_S", 0.1)
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path, *SMALL, *STAGES) as made:
        yield made


def passed() -> list[EpisodeFinished]:
    """What passes a stage."""
    return [episode(lane, number=0, success=True, cut=False) for lane in range(LANES)]


def stage_told(held: Bench, one: Actor) -> int:
    """The stage that comes with the weights now."""
    one.client.send(PullWeights(have_version=-1))
    held.settle(one)
    (weights,) = one.take(Weights)
    return int(weights.stage)


def admitted(held: Bench) -> list[ExperienceAdmitted]:
    return [record.header_as(ExperienceAdmitted) for record in held.records("ExperienceAdmitted")]


def test_actors_hear_of_a_stage_once_its_verdict_is_durable(held: Bench) -> None:
    one = held.actor()
    held.send(one, episodes=passed())
    assert held.loop.learner.stage == 1
    held.pay()
    assert stage_told(held, one) == 0, "a crash now would take the verdict back"
    held.make_durable()
    assert stage_told(held, one) == 1
    (verdict,) = [record.header_as(CurriculumJudged) for record in held.records("CurriculumJudged")]
    assert (verdict.stage, verdict.consolidated) == (1, LANES)
    assert held.loop.counters()["facts.CurriculumAdvanced"] == 1


def test_what_is_not_durable_is_judged_again_by_the_next_life(held: Bench) -> None:
    one = held.actor()
    held.send(one, episodes=passed())
    held.kill()
    held.live(2)
    assert held.loop.learner.stage == 0
    again = held.actor(incarnation=2)
    held.send(again, episodes=passed())
    held.make_durable()
    assert stage_told(held, again) == 1


def test_a_journal_with_stages_folds_to_the_same_state_and_the_stage_is_told_at_once(held: Bench) -> None:
    one, two = held.actor(0), held.actor(1)
    held.send(one, episodes=passed())
    held.send(two, stage=1)
    held.make_durable()
    held.send(one, stage=1, episodes=passed()[:1])
    held.send(two, stage=1)
    held.step_all()
    held.make_durable()
    learner = held.loop.learner
    digest, consolidation = learner.state().digest, learner.engine.consolidation
    assert learner.steps_done > 0
    assert consolidation is not None
    held.kill()
    held.live(2)
    assert held.loop.learner.state().digest == digest
    assert held.loop.learner.engine.consolidation is not None
    assert held.loop.learner.curriculum.episodes == 1
    assert stage_told(held, held.actor(incarnation=2)) == 1


@pytest.mark.parametrize("lost", ["outcomes", "verdict", "experience"])
def test_where_something_is_quarantined_the_stage_is_still_the_one_in_which_actors_are(
    held: Bench, lost: str
) -> None:
    one, two = held.actor(0), held.actor(1)
    held.send(two)
    held.send(one, episodes=passed())
    held.send(one, stage=1, episodes=passed()[:1])
    held.make_durable()
    learner = held.loop.learner
    assert learner.stage == 1
    records = {record.position: record for record in held.records()}
    (verdict,) = [position for position, record in records.items() if record.kind == "CurriculumJudged"]
    experience = [position for position, record in records.items() if record.kind == "ExperienceAdmitted"]
    quarantined = {"verdict": verdict, "experience": experience[0], "outcomes": experience[1]}[lost]
    fold = folded(held, quarantined=(quarantined,))
    assert fold.learner.stage == 1, "no stage is gone back to"
    assert fold.learner.curriculum.episodes == learner.curriculum.episodes == 1
    assert (fold.learner.engine.consolidation is None) == (lost == "verdict")


@pytest.mark.parametrize("stage", [-1, 2, 10**6])
def test_an_unroll_of_no_stage_is_malformed(held: Bench, stage: int) -> None:
    one = held.actor()
    held.send(one, stage=stage)
    held.make_durable()
    (refused,) = one.take(Refused)
    assert refused.reason == "malformed"
    (record,) = held.records("ExperienceRefused")
    said = record.header_as(ExperienceRefused).reason
    assert said == f"malformed: stage {stage} of the curriculum; there are 2"
    assert held.loop.learner.curriculum.strays == 0
    held.send(one, stage=1)
    assert len(admitted(held)) == 1, "its sender may send another"


def test_without_a_curriculum_there_is_stage_0_alone(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL) as held:
        one = held.actor()
        held.send(one, stage=1)
        held.make_durable()
        assert [refused.reason for refused in one.take(Refused)] == ["malformed"]
        assert stage_told(held, one) == 0


# -- an actor that moves -----------------------------------------------------------------------------------------------


def test_an_actor_moves_and_begins_the_next_episodes_there(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL, *STAGES) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        learner = held.loop.learner

        def has_played_long() -> bool:
            return learner.curriculum.episodes >= LANES and learner.stage == 1

        pair.wait(has_played_long, pair.step_turn)
        pair.stop(child)
        events = admitted(held)
    stages = [event.stage for event in events]
    assert stages == sorted(stages)
    assert set(stages) == {0, 1}
    before = [event for event in events if event.stage == 0]
    after = [event for event in events if event.stage == 1]
    assert {one.length for event in before for one in event.episodes} == {SHORT}
    assert {one.length for event in after for one in event.episodes} == {LONG}
    reached = max([*before[-1].episode_numbers, *(one.number for one in before[-1].episodes)])
    assert min(after[0].episode_numbers) > reached, "episodes of their own, by numbers that nobody had"
    assert len(set(after[0].episode_numbers)) == 1, "all lanes began anew"


@contextmanager
def lockstep(directory: Path) -> Iterator[Run]:
    with (
        bench(directory, *SMALL, *STAGES, "supervisor.lockstep=true") as held,
        control_line() as control,
    ):
        yield Run(Pair(held, control))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> History:
    with lockstep(tmp_path_factory.mktemp("whole")) as run:
        run.begin(*ACTORS)
        run.until(ROUNDS, ROUNDS)
        run.end(*ACTORS)
        made = history(run)
        order = [
            (record.kind, record.header.get("sequence"))
            for record in run.held.records()
            if record.kind in ("ExperienceAdmitted", "CurriculumJudged")
        ]
    verdicts = [at for at, (kind, _) in enumerate(order) if kind == "CurriculumJudged"]
    assert len(verdicts) == 1
    assert verdicts[0] % len(ACTORS) == 0, "between two rounds"
    rounds: dict[int, set[int]] = {}
    for header, _ in made.unrolls:
        rounds.setdefault(header["sequence"], set()).add(header.get("stage", 0))
    assert all(len(stages) == 1 for stages in rounds.values()), "a round is made in one stage"
    assert [min(rounds[number]) for number in sorted(rounds)] == [0, 0, 1, 1, 1, 1]
    return made


def assert_same(run: Run, expected: History) -> None:
    found = history(run)
    assert found.unrolls == expected.unrolls
    common = min(len(found.digests), len(expected.digests))
    assert common >= 3
    assert found.digests[:common] == expected.digests[:common]
    assert run.held.records("ExperienceRefused") == []


@pytest.mark.parametrize("lived", [2, 4])
def test_in_lockstep_the_next_life_makes_the_same_unrolls_across_a_change_of_stage(
    tmp_path: Path, uninterrupted: History, lived: int
) -> None:
    with lockstep(tmp_path) as run:
        run.begin(*ACTORS)
        run.until(lived, lived)
        run.end(0)
        run.begin(0)
        run.until(ROUNDS, ROUNDS)
        run.end(*ACTORS)
        assert_same(run, uninterrupted)


def test_in_lockstep_everybody_may_die_across_a_change_of_stage(
    tmp_path: Path, uninterrupted: History
) -> None:
    with lockstep(tmp_path) as run:
        for rounds in (2, 3, ROUNDS):
            run.begin(*ACTORS)
            run.until(rounds, rounds)
            run.end(*ACTORS)
            if rounds < ROUNDS:
                run.replace_learner()
        assert_same(run, uninterrupted)


# -- what is examined before anybody acts ------------------------------------------------------------------------------


def staged(*environments: str) -> tuple[str, ...]:
    rows = ", ".join(
        f"{{name: stage-{index}, difficulty: {(index + 1) / 10}, {ROW}, environment: {environment}}}"
        for index, environment in enumerate(environments)
    )
    return (*SMALL, f"simic_trainer.curriculum_stages=[{rows}]")


def test_the_data_of_every_stage_are_examined() -> None:
    others = ("{max_epochs: 4}", "{task: digits32}")
    config = make_config(*staged(*others))
    digests = [load_task(name).digest for name in ("digits", "digits32")]
    assert examined_data(config) == hashlib.sha256("".join(digests).encode()).hexdigest()
    with pytest.raises(ConfigError, match="task 'cifar10'"):
        examined_data(make_config(*staged("{max_epochs: 4}", "{task: 'cifar10:nowhere'}")))


def lakes(**stage: Any) -> dict[str, Any]:
    row = {"min_success_rate": 0.5, "min_episodes": 4, "max_episodes": 8, "success": "return >= 1"}
    return {
        "environment": {"id": "FrozenLake-v1", "environments_per_actor": 32, "stagger": False},
        "simic_trainer": {
            "curriculum_stages": [row | {"name": "lake", "difficulty": 0.5, "environment": {"kwargs": stage}}]
        },
    }


def test_a_world_whose_stage_has_other_spaces_is_refused_before_anybody_acts() -> None:
    examined_data(parse("", base=lakes(is_slippery=False)))
    with pytest.raises(ConfigError, match="stage 'lake' would need another policy") as caught:
        examined_data(parse("", base=lakes(map_name="8x8")))
    assert caught.value.key == "simic_trainer.curriculum_stages"
