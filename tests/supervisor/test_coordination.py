"""Requests about the curriculum at the supervisor: written down, owed to the learner, answered once."""

from __future__ import annotations

from typing import Any

import pytest

from esper_simic.curriculum_facts import CoordinationMode, CurriculumReply, CurriculumRequest
from supervisor.coordination import OPEN_REQUESTS_MAX
from supervisor.events import CommandReceived, CurriculumHeard, SendCurriculumRequest
from supervisor.state import Phase
from tests.supervisor.worlds import LEARNER, World, actor, learner


def request(name: str = "r1") -> CurriculumRequest:
    return CurriculumRequest(
        request_id=name,
        stage="walk",
        difficulty=0.5,
        min_success_rate=0.5,
        min_episodes=1,
        max_episodes=2,
        mode=CoordinationMode.STRATEGY_DRIVEN,
        issued_at_s=0.0,
    )


def reply(name: str = "r1", refusal: str = "") -> CurriculumReply:
    return CurriculumReply(
        request_id=name,
        correlation_id="",
        stage="walk",
        episodes=0,
        success_rate=0.0,
        advanced=not refusal,
        refusal=refusal,
    )


def ask(world: World, name: str = "r1", **changed: Any) -> list[str]:
    fields: dict[str, Any] = {"command_id": name, "name": "curriculum", "request": request(name)}
    return world.tell(CommandReceived(**fields | changed))


def answer(world: World, name: str = "r1", refusal: str = "") -> list[str]:
    return world.tell(CurriculumHeard(child=LEARNER, reply=reply(name, refusal)))


def trained() -> World:
    world = World()
    world.train()
    return world


def requests_owed(world: World) -> list[SendCurriculumRequest]:
    return [effect for effect in world.owed() if isinstance(effect, SendCurriculumRequest)]


def test_a_request_is_owed_until_it_is_answered() -> None:
    world = trained()
    assert ask(world) == ["CurriculumRequested"]
    assert ask(world) == [], "it waits already"
    assert requests_owed(world) == [SendCurriculumRequest(child=LEARNER, request=request())]
    assert "r1" not in world.state.commands
    assert answer(world) == ["CurriculumAnswered"]
    assert requests_owed(world) == []
    assert world.state.commands["r1"] == ""
    assert world.state.replies["r1"] == reply()
    assert answer(world) == [], "the first answer holds"
    assert ask(world) == [], "and is that of a repeat"


def test_a_refusal_of_the_learner_is_that_of_the_command() -> None:
    world = trained()
    ask(world)
    answer(world, refusal="unknown stage")
    assert world.state.commands["r1"] == "unknown stage"


def test_it_is_owed_to_whichever_life_of_the_learner_is_there() -> None:
    world = World()
    assert ask(world) == ["CurriculumRequested"], "before the training has begun, too"
    assert requests_owed(world) == []
    world.train()
    assert requests_owed(world)[0].child == LEARNER
    world.gone(LEARNER)
    assert requests_owed(world) == []
    world.wait(10)
    world.spawn()
    world.ready(learner(2))
    assert requests_owed(world)[0].child == learner(2)


def test_it_outlives_the_supervisor() -> None:
    world = trained()
    ask(world)
    ask(world, "r2")
    answer(world, "r2")
    world.resume()
    world.train()
    assert [effect.request.request_id for effect in requests_owed(world)] == ["r1"]
    assert world.state.replies["r2"] == reply("r2")


@pytest.mark.parametrize("changed", [{"request": None}, {"request": request("another")}])
def test_a_request_has_the_id_of_its_command(changed: dict[str, Any]) -> None:
    world = trained()
    assert ask(world, **changed) == ["CommandRefused"]
    assert "request of its own id" in world.state.commands["r1"]


def test_there_is_a_limit_on_requests_that_wait() -> None:
    world = trained()
    for number in range(OPEN_REQUESTS_MAX):
        assert ask(world, f"r{number}") == ["CurriculumRequested"]
    assert ask(world, "more") == ["CommandRefused"]
    answer(world, "r0")
    assert ask(world, "more again") == ["CurriculumRequested"]


def test_without_a_training_it_is_refused() -> None:
    world = trained()
    ask(world)
    world.tell(CommandReceived(command_id="s", name="stop"))
    assert ask(world, "late") == ["CommandRefused"]
    assert "the run is stopping" in world.state.commands["late"]
    world.gone(actor(0))
    world.gone(actor(1))
    world.report_checkpoint()
    assert "r1" in world.state.asked, "the learner may still answer"
    assert "CommandRefused" in world.gone(LEARNER)
    assert world.state.commands["r1"] == "the training ended before the learner answered"
    assert world.state.asked == {}
    assert world.state.phase is Phase.STOPPED
