"""A run is made on one task's data: who comes with other data under its name ends it, in whichever life of the run."""

from __future__ import annotations

import msgspec
import pytest

from supervisor.events import ChildId, ChildReady, ChildSaidReady
from supervisor.state import RunState, apply
from tests.supervisor.worlds import LEARNER, World, actor, evaluator, learner, pid_of

HERE, ELSEWHERE = "5e" * 32, "e1" * 32


def say_ready(world: World, who: ChildId, data_digest: str) -> list[str]:
    return world.tell(ChildSaidReady(child=who, pid=pid_of(who), data_digest=data_digest))


def training() -> World:
    world = World(max_seconds=100)
    world.spawn()
    world.ready(LEARNER)
    for index in range(2):
        say_ready(world, actor(index), HERE)
    return world


def failure(world: World) -> tuple[str, int]:
    return world.state.failure, world.state.failure_code


def test_all_may_grow_hosts_on_the_same_data() -> None:
    world = training()
    assert (world.state.data_digest, world.state.failure) == (HERE, "")


def test_an_actor_with_other_data_ends_the_run_and_asks_for_a_person() -> None:
    world = World()
    world.spawn()
    world.ready(LEARNER)
    say_ready(world, actor(0), HERE)
    assert "RunFailed" in say_ready(world, actor(1), ELSEWHERE)
    reason, code = failure(world)
    assert code == 78
    for word in ("environment.task", "actor-1 found e1e1e1e1", "began with 5e5e5e5e", "put them back"):
        assert word in reason


def test_a_run_that_goes_on_remembers_its_data() -> None:
    world = training()
    assert world.resume()[0] == "RunResumed"
    world.spawn()
    world.ready(learner(2))
    assert "RunFailed" in say_ready(world, actor(0, 2), ELSEWHERE)
    assert failure(world)[1] == 78
    assert world.resume()[0] == "RunResumed"
    assert world.state.failure == "", "another try, with the data put back, is a fresh one"
    world.spawn()
    world.ready(learner(3))
    assert "RunFailed" not in say_ready(world, actor(0, 3), HERE)
    assert world.state.data_digest == HERE


def test_an_evaluator_must_measure_on_the_data_that_was_trained_on() -> None:
    world = training()
    world.time_is_up()
    world.end_training()
    world.spawn()
    assert "RunFailed" in say_ready(world, evaluator(0), ELSEWHERE)
    assert "evaluate-0 found" in failure(world)[0]


@pytest.mark.parametrize("first", ["", HERE])
def test_who_says_nothing_of_data_is_not_blamed(first: str) -> None:
    """A learner has none; journals of before there were digests tell of none."""
    world = World()
    world.spawn()
    world.ready(LEARNER)
    say_ready(world, actor(0), first)
    say_ready(world, actor(1), "")
    assert (world.state.failure, world.state.data_digest) == ("", first)


def test_a_journal_of_before_there_were_digests_is_still_read() -> None:
    header = {"at_s": 1.0, "role": "actor", "index": 0, "incarnation": 1, "learner_step": 0}
    event = msgspec.convert(header, ChildReady)
    assert apply(RunState(), event).data_digest == event.data_digest == ""
