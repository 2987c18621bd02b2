"""Requests about the curriculum at a learner at work: journaled, answered once durable, and alike by later lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper_simic.curriculum_facts import (
    CoordinationMode,
    CurriculumAdvanced,
    CurriculumAnswered,
    CurriculumReply,
    CurriculumRequest,
)
from esper_simic.events import CurriculumJudged
from supervisor.protocol import AskCurriculum, CurriculumSettled, Progress
from tests.roles.bench import LANES, Bench, bench
from tests.roles.pair import SMALL
from tests.roles.scribe import is_same_state
from tests.roles.test_curriculum_roles import STAGES, passed, stage_told
from tests.roles.test_failed_steps import folded
from tests.roles.test_learner_main import living


def request(name: str, stage: str = "long", **given: Any) -> CurriculumRequest:
    fields: dict[str, Any] = {
        "request_id": name,
        "stage": stage,
        "difficulty": {"short": 0.5, "long": 1.0}.get(stage, 0.5),
        "min_success_rate": 0.5,
        "min_episodes": 4,
        "max_episodes": 1000,
        "mode": CoordinationMode.STRATEGY_DRIVEN,
        "issued_at_s": 5.0,
        "correlation_id": f"{name}'s",
    }
    return CurriculumRequest(**fields | given)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path, *SMALL, *STAGES, "simic_trainer.digest_every_steps=1") as made:
        yield made


def ask(held: Bench, asked: CurriculumRequest) -> list[CurriculumReply]:
    """Ask; the list gets the answer once it is given."""
    answers: list[CurriculumReply] = []
    held.loop.ask(asked, answers.append)
    held.loop.answer_requests()
    return answers


def judged(held: Bench) -> list[CurriculumJudged]:
    return [record.header_as(CurriculumJudged) for record in held.records("CurriculumJudged")]


def test_a_request_is_journaled_with_its_answer_and_answered_once_that_is_durable(held: Bench) -> None:
    one = held.actor()
    asked = request("r1")
    answers = ask(held, asked)
    assert held.loop.learner.stage == 1
    held.loop.pay()
    assert (answers, stage_told(held, one)) == ([], 0), "a crash now would take it back"
    held.make_durable()
    (reply,) = answers
    assert (reply.request_id, reply.correlation_id, reply.stage, reply.advanced, reply.refusal) == (
        "r1",
        "r1's",
        "long",
        True,
        "",
    )
    assert stage_told(held, one) == 1
    (event,) = judged(held)
    assert event.facts[0] == CurriculumAnswered(request=asked, reply=reply)
    assert isinstance(event.facts[1], CurriculumAdvanced)
    assert (event.stage, event.consolidated) == (1, 0)
    assert held.loop.counters()["facts.CurriculumAnswered"] == 1


def test_a_stage_that_is_left_on_request_is_held_as_one_that_was_passed(held: Bench) -> None:
    held.send(held.actor())
    ask(held, request("r1"))
    (event,) = judged(held)
    assert event.consolidated == LANES
    assert held.loop.learner.engine.consolidation is not None
    assert is_same_state(folded(held).learner.state(), held.loop.learner.state())


def test_later_lives_stand_where_the_request_led_and_answer_it_alike(held: Bench) -> None:
    first = ask(held, request("hold", "short"))
    refused = ask(held, request("back", "shrot"))
    held.send(held.actor(), episodes=passed())
    held.make_durable()
    assert held.loop.learner.stage == 0, "it stays until told otherwise"
    assert "unknown stage 'shrot'" in refused[0].refusal
    digest = held.loop.learner.state().digest
    held.kill()
    assert held.live(2).is_exact
    assert held.loop.learner.state().digest == digest
    before = len(judged(held))
    again = ask(held, request("hold", "short")), ask(held, request("back", "shrot"))
    held.make_durable()
    assert again == (first, refused)
    assert len(judged(held)) == before == 2
    ask(held, request("free", "short", mode=CoordinationMode.INDEPENDENT))
    held.send(held.actor(incarnation=2))
    assert held.loop.learner.stage == 1, "what was played meanwhile counts"


def test_where_there_is_no_curriculum_that_is_the_answer(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL) as held:
        answers = ask(held, request("r1"))
        held.make_durable()
        assert "follows no curriculum" in answers[0].refusal
        assert judged(held) == []


def test_in_lockstep_a_request_waits_for_the_round_to_end(tmp_path: Path) -> None:
    with bench(tmp_path, *SMALL, *STAGES, "supervisor.lockstep=true") as held:
        one, two = held.actor(0), held.actor(1)
        answers = ask(held, request("r1"))
        held.send(one)
        held.loop.answer_requests()
        held.make_durable()
        assert answers == []
        assert held.loop.learner.stage == 0
        held.send(two)
        held.step_all()
        held.loop.answer_requests()
        held.loop.open_round()
        held.make_durable()
        assert answers[0].advanced
        kinds = [record.kind for record in held.records() if record.kind != "LearnerStepped"]
        assert kinds[-3:] == ["ExperienceAdmitted", "ExperienceAdmitted", "CurriculumJudged"]
        digest = held.loop.learner.state().digest
        held.kill()
        held.live(2)
        assert held.loop.learner.state().digest == digest


def test_what_was_obeyed_is_told_although_the_learner_is_stopped(tmp_path: Path) -> None:
    """Otherwise the supervisor would say that the training ended first, and the journal that it obeyed."""
    with living(tmp_path / "run", *SMALL, *STAGES, "supervisor.journal_commit_interval_ms=1000") as life:
        life.begin()
        life.until_ready()
        life.server.send("learner-0-1", AskCurriculum(request=request("r1")))
        life.until(lambda: any(report.metrics.get("curriculum_stage") == 1 for report in life.said(Progress)))
        life.stop()
        assert [settled.reply.advanced for settled in life.said(CurriculumSettled)] == [True]


def test_the_learners_process_is_asked_and_answers_over_its_line(tmp_path: Path) -> None:
    with living(tmp_path / "run", *SMALL, *STAGES) as life:
        life.begin()
        life.until_ready()
        life.until(lambda: life.said(Progress))
        assert life.said(Progress)[0].metrics["curriculum_stage"] == 0, "before the first update, too"
        life.server.send("learner-0-1", AskCurriculum(request=request("r1")))
        life.until(lambda: life.said(CurriculumSettled))
        (settled,) = life.said(CurriculumSettled)
        assert (settled.role, settled.incarnation) == ("learner", 1)
        assert (settled.reply.stage, settled.reply.advanced) == ("long", True)
        assert [record.kind for record in life.records(CurriculumJudged)] == ["CurriculumJudged"]
