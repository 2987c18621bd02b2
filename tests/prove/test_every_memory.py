"""What is kept of old tasks, and how a run goes from one task to the next, through deaths right there.

The curriculum passes a stage (`CurriculumJudged`), what the stage needed is consolidated from the buffer, actors move
on to another environment; adapters begin at an update. Each of these is a moment in which the state changes beside an
update, so each is died at: before it is appended, appended and not durable, durable and told to nobody; and around the
first checkpoint that has it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_simic.curriculum_facts import CurriculumAdvanced, CurriculumHeld
from esper_simic.events import AdaptersBegun, CurriculumJudged, ExperienceAdmitted
from esper_simic.rate_facts import RateChanged
from tests.prove.deaths import (
    LOCKSTEP,
    assert_replayed,
    assert_same,
    dying,
    fired,
    folded,
    lives,
    passages,
    records,
    settings_of,
    steps,
    told,
    whole,
)
from tests.prove.test_lockstep import reach

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1500)]

Proof = Callable[[str, str], None]

STAGES = (
    "[{name: short, difficulty: 0.3, min_success_rate: 0.5, min_episodes: 30, max_episodes: 1000,"
    " success: 'return >= 5', environment: {kwargs: {max_episode_steps: 12}}},"
    " {name: longer, difficulty: 0.6, min_success_rate: 0.5, min_episodes: 60, max_episodes: 1000,"
    " success: 'return >= 8', environment: {kwargs: {max_episode_steps: 20}}},"
    " {name: whole, difficulty: 1, min_success_rate: 1, min_episodes: 60, max_episodes: 60,"
    " success: 'return >= 500'}]"
)
"""The last one is never passed: its rounds fail, and after two of them its breaker opens."""

CURRICULUM: dict[str, Any] = {
    "environment__id": "CartPole-v1",
    "experience_buffer__replay_ratio": 0.25,
    "supervisor__max_updates": 150,
    **settings_of(
        {
            "simic_trainer": {
                "network": "lstm",
                "curriculum_stages": STAGES,
                "curriculum_breaker_failure_threshold": 2,
                "curriculum_breaker_recovery_timeout_s": 20,
                "ewc_lambda": 1.0,
                "ewc_sample_size": 16,
                "ewc_fraction": 0.7,
                "ewc_adjusts_rate": "true",
                "conservative_mode_triggers": "[]",
            }
        }
    ),
}


def verdicts(run_dir: Path) -> list[CurriculumJudged]:
    return [record.header_as(CurriculumJudged) for record in records(run_dir, "CurriculumJudged")]


def assert_advanced(run_dir: Path) -> None:
    """Both stages were passed and consolidated, the last one's rounds failed, and experience came from all."""
    judged = verdicts(run_dir)
    passed = [one for one in judged if any(isinstance(fact, CurriculumAdvanced) for fact in one.facts)]
    assert [(one.stage, one.consolidated) for one in passed] == [(1, 16), (2, 16)]
    assert any(isinstance(fact, CurriculumHeld) for one in judged for fact in one.facts)
    stages = [one.header_as(ExperienceAdmitted).stage for one in records(run_dir, "ExperienceAdmitted")]
    assert set(stages) == {0, 1, 2}
    consolidation = folded(run_dir).learner.engine.consolidation
    assert consolidation is not None
    assert any(float(fisher.sum()) > 0 for fisher in consolidation.fisher.values())
    slower = [fact for _, fact in told(run_dir, RateChanged) if "strength" in fact.causes]
    assert slower
    assert all(fact.after < fact.before for fact in slower)


def test_a_curriculum_and_its_consolidation(tmp_path: Path, record_proof: Proof) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole(straight, **CURRICULUM, **LOCKSTEP)
    assert_advanced(straight)
    plan = [
        "learner:learner.judge.before:1",
        "learner:learner.judge.after:1",
        # The verdict that was or was not durable is behind, and a checkpoint holds what was consolidated; at the next
        # one it dies before an actor hears of it.
        "learner:checkpoint.saved.after:1",
        "learner:learner.stage.before:1",
        "learner:recovery.checkpoint.after:1",
        # In the last stage: its next life steps through all three.
        "actor:actor.unroll.after:30",
    ]
    whole(killed, plan, **CURRICULUM, **LOCKSTEP)
    assert lives(killed) == 4
    assert_same(straight, killed)
    assert_advanced(killed)
    report = assert_replayed(killed)
    record_proof(
        "Curriculum and elastic weight consolidation, recurrent",
        f"{report.steps} updates and {len(verdicts(killed))} verdicts straight, and with the learner killed five times "
        f"around them: equal; {report.states_equal} whole states replayed.",
    )


def test_an_asynchronous_curriculum_is_replayed(tmp_path: Path, record_proof: Proof) -> None:
    run_dir = tmp_path / "run"
    plan = [
        "learner:learner.judge.before:1",
        "learner:learner.judge.after:1",
        "learner:learner.stage.before:1",
    ]
    endless = CURRICULUM | {"supervisor__max_updates": "null", "supervisor__max_seconds": 1000}
    with dying(run_dir, plan, **endless) as run:
        reach(run, run_dir, 20)
        while fired(run_dir) < len(plan) or len(verdicts(run_dir)) < 4:
            reach(run, run_dir, len(steps(run_dir)) + 20)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(120) == 0, run.output
    assert lives(run_dir) == len(plan)
    assert_advanced(run_dir)
    report = assert_replayed(run_dir)
    record_proof(
        "Curriculum, asynchronous", f"{report.steps} updates, {len(verdicts(run_dir))} verdicts: equal."
    )


BEGINS = 30

ADAPTERS: dict[str, Any] = {
    "environment__id": "CartPole-v1",
    "experience_buffer__replay_ratio": 0.0,
    "supervisor__max_updates": 90,
    **settings_of(
        {
            "simic_trainer": {
                "algorithm": "PPO",
                "ppo_epochs": 3,
                "ppo_minibatches": 2,
                "network": "lstm",
                "lora_rank": 4,
                "lora_start_step": BEGINS,
                "conservative_mode_triggers": "[]",
            }
        }
    ),
}


def test_adapters_begin_amidst_a_run(tmp_path: Path, record_proof: Proof) -> None:
    straight = tmp_path / "straight"
    whole(straight, **ADAPTERS, **LOCKSTEP)
    [(begun, fact)] = told(straight, AdaptersBegun)
    assert (begun, fact.rank) == (BEGINS, 4)
    assert fact.matrices > 0
    at = passages(straight, 0, BEGINS)
    plans = {
        # What has adapters is folded from a checkpoint that has none; what begins them is made again, or folded.
        "before_its_checkpoint": [
            f"learner:learner.facts.before:{at}",
            "learner:learner.facts.after:1",
            "learner:checkpoint.stage.before:1",
        ],
        # And from one that has them, amidst an update.
        "after_its_checkpoint": [
            f"learner:learner.facts.after:{at}",
            "learner:checkpoint.prune.before:2",
            "learner:recovery.checkpoint.after:1",
            "learner:learner.update.half:20",
        ],
    }
    for name, plan in plans.items():
        killed = tmp_path / name
        whole(killed, plan, **ADAPTERS, **LOCKSTEP)
        assert_same(straight, killed)
        assert folded(killed).learner.engine.adapters is not None
        report = assert_replayed(killed)
        record_proof(
            f"Adapters, killed {name.replace('_', ' ')}",
            f"{report.steps} updates, adapters from the {BEGINS}th on: equal; {report.states_equal} whole states "
            f"replayed.",
        )
