"""Actors in whose lanes a script acts, beside a real learner's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper_simic.actions import BLUEPRINT, OP, Op
from esper_simic.events import ExperienceAdmitted, LearnerStepped
from supervisor.journal import Record
from supervisor.playback.summaries import summary
from supervisor.protocol import Acknowledged
from supervisor.report.past import LearnerPast
from supervisor.roles import actor, learner_line
from tests.roles.bench import LANES, Bench, T, bench
from tests.roles.pair import SMALL, Pair, control_line
from tests.roles.test_actor_lockstep import Run

HEURISTIC = ("environment.behaviour=heuristic", "environment.max_epochs=16", "environment.host_lr=1.0e-9")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_line, "GREETING_INTERVAL_S", 0.1)
    monkeypatch.setattr(actor, "WAIT_MS", 20.0)


def unrolls_of(held: Bench) -> list[tuple[Record, ExperienceAdmitted]]:
    records = held.records("ExperienceAdmitted")
    return [(record, record.header_as(ExperienceAdmitted)) for record in records]


def test_a_script_acts_and_the_learner_is_told_so(tmp_path: Path) -> None:
    with (
        bench(tmp_path, *SMALL, "environment.behaviour=never-grow", "simic_trainer.algorithm=BC") as held,
        control_line() as control,
    ):
        pair = Pair(held, control)
        child = pair.begin()
        pair.wait(lambda: held.loop.learner.ledger.unrolls(0) >= 8, pair.step_turn)
        pair.stop(child)
        learner = held.loop.learner
        for record, event in unrolls_of(held):
            assert event.behaviour == "never-grow"
            assert " by never-grow" in summary(event)
            count = event.length * event.lanes * 8
            frames = [bytes(frame) for frame in record.frames]
            actions = memoryview(frames[-5]).cast("q")
            assert len(actions) == count
            assert set(actions[OP::8]) == {int(Op.WAIT)}
            assert not any(memoryview(frames[-4]).cast("f")), "it is certain to wait"
        episodes = [episode for _, event in unrolls_of(held) for episode in event.episodes]
        assert any(episode.is_whole for episode in episodes)
        assert learner.score is None
        assert learner.ledger.others_episodes
        assert learner.steps_done > 0
        told = [
            record for record in held.records("LearnerStepped") if "behaviour_return" in metrics_of(record)
        ]
        assert told
        for step in told:
            before = [
                episode.episode_return
                for record, event in unrolls_of(held)
                for episode in event.episodes
                if episode.is_whole and record.position < step.position
            ]
            assert metrics_of(step)["behaviour_return"] == pytest.approx(sum(before) / len(before))


def metrics_of(record: Record) -> dict[str, float]:
    return record.header_as(LearnerStepped).metrics


def history(directory: Path, *, lives: int) -> list[tuple[dict[str, Any], list[bytes]]]:
    assignments = (*SMALL, *HEURISTIC, "simic_trainer.algorithm=BC", "supervisor.lockstep=true")
    with bench(directory, *assignments) as held, control_line() as control:
        run = Run(Pair(held, control))
        for life in range(1, lives + 1):
            run.begin(0, 1)
            run.until(6 * life // lives, 6 * life // lives)
            run.end(0, 1)
        return [
            (
                {name: value for name, value in record.header.items() if name != "incarnation"},
                [bytes(frame) for frame in record.frames],
            )
            for record, event in unrolls_of(held)
            if event.sequence <= 6
        ]


def test_in_lockstep_a_later_life_goes_on_with_all_that_the_script_remembers(tmp_path: Path) -> None:
    whole = history(tmp_path / "whole", lives=1)
    germinations = [
        blueprint
        for header, frames in whole
        if header["actor"] == 0
        for row in range(T * LANES)
        if (actions := memoryview(frames[-6]).cast("q"))[8 * row + OP] == Op.GERMINATE
        for blueprint in [actions[8 * row + BLUEPRINT]]
    ]
    assert len(set(germinations)) > 1, "its rotation of blueprints, which it remembers, moves on"
    assert history(tmp_path / "broken", lives=3) == whole


def test_what_a_script_did_is_never_too_old(tmp_path: Path) -> None:
    settings = ("environment.behaviour=patient", "simic_trainer.max_policy_lag=1")
    with bench(tmp_path, *settings) as held:
        sender = held.actor()
        for _ in range(4):
            held.send(sender, behaviour="patient")
            held.make_durable()
        held.loop.step()
        held.make_durable()
        assert held.loop.learner.steps_done == 1
        sender.heard.clear()
        held.send(sender, version=0, behaviour="patient")
        held.make_durable()
        assert len(sender.take(Acknowledged)) == 1
        assert held.records("ExperienceRefused") == []


@pytest.mark.parametrize(("behaviour", "is_counted"), [("policy", True), ("patient", False)])
def test_a_report_takes_no_episode_of_another_for_one_of_the_training(
    tmp_path: Path, behaviour: str, is_counted: bool
) -> None:
    with bench(tmp_path, *SMALL, f"environment.behaviour={behaviour}") as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.wait(lambda: held.loop.learner.ledger.unrolls(0) >= 6, pair.step_turn)
        pair.stop(child)
        past = LearnerPast()
        for record in held.records():
            past.take(record)
        assert past.environment_steps == held.loop.learner.environment_steps > 0
        assert (past.whole_episodes > 0) is is_counted
        assert bool(past.unrolls) is is_counted
