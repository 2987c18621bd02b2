"""Progress is work, waiting is excused only while somebody works; memory is what the kernel says."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import psutil

from esper_simic.config import SupervisorConfig
from supervisor.events import ChildId
from supervisor.memory import (
    machine_available_bytes,
    machine_total_bytes,
    proportional_bytes,
    resident_bytes,
)
from supervisor.protocol import Progress
from supervisor.vitals import Snapshot, Vitals
from tests.supervisor.worlds import LEARNER, World, actor, pid_of


def report(who: ChildId, work: int, **fields: object) -> Progress:
    role, index, incarnation = who
    return Progress(role=role, index=index, incarnation=incarnation, work=work, **fields)  # type: ignore[arg-type]


def test_a_report_without_new_work_is_no_progress() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1), 1.0)
    vitals.heard(report(actor(0), 1), 5.0)
    assert vitals.progressed_at_s() == {actor(0): 1.0}
    vitals.heard(report(actor(0), 2), 6.0)
    assert vitals.progressed_at_s() == {actor(0): 6.0}


def test_who_waits_is_excused_while_anybody_works_and_not_when_all_wait() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1, waiting_for="credit"), 1.0)
    vitals.heard(report(LEARNER, 1), 2.0)
    vitals.heard(report(LEARNER, 2), 50.0)
    assert vitals.progressed_at_s()[actor(0)] == 50.0
    vitals.heard(report(LEARNER, 2, waiting_for="experience"), 90.0)
    assert set(vitals.progressed_at_s().values()) == {50.0}, "a circle of waiting is nobody's progress"


def test_a_forgotten_child_is_gone_from_the_table() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1), 1.0)
    vitals.forget(actor(0))
    assert vitals.progressed_at_s() == {}


def snapshot(world: World, vitals: Vitals) -> Snapshot:
    memory = {pid_of(LEARNER): 1000}
    config = SupervisorConfig(max_seconds=60)
    return vitals.snapshot(
        world.state,
        now_s=world.now_s,
        run_dir="runs/x",
        config=config,
        memory_bytes=memory,
        refused={"checksum": 2},
    )


def test_a_snapshot_shows_the_run_and_each_child_once() -> None:
    world, vitals = World(), Vitals()
    world.wait(2)
    world.train()
    vitals.heard(report(LEARNER, 3, learner_step=3, environment_steps=960, metrics={"value_loss": 0.5}), 3.0)
    world.now_s = 10.0
    world.gone(actor(1))
    shot = snapshot(world, vitals)
    assert (shot.state, shot.elapsed_s, shot.training_elapsed_s) == ("training", 10.0, 8.0)
    assert (shot.learner.step, shot.learner.metrics, shot.environment.steps) == (3, {"value_loss": 0.5}, 960)
    states = {
        (view.role, view.index): (view.state, view.restarts, view.memory_bytes) for view in shot.processes
    }
    assert states == {
        ("learner", 0): ("ready", 0, 1000),
        ("actor", 0): ("ready", 0, 0),
        ("actor", 1): ("scheduled", 1, 0),
    }
    assert shot.refused_messages == {"checksum": 2}


def test_the_clock_of_training_stands_still_after_its_end() -> None:
    world, vitals = World(max_seconds=5), Vitals()
    world.train()
    world.wait(5)
    world.now_s = 30.0
    assert snapshot(world, vitals).training_elapsed_s == 5.0


def test_a_snapshot_is_plain_json_with_the_promised_names() -> None:
    world, vitals = World(), Vitals()
    world.train()
    plain = msgspec.json.decode(msgspec.json.encode(snapshot(world, vitals)))
    assert plain["schema"] == 1
    assert plain["learner"]["step"] == 0
    assert plain["environment"]["steps"] == 0
    assert {"role", "pid", "memory_bytes"} <= set(plain["processes"][0])


def test_memory_of_a_process_agrees_with_another_reader() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        resident = resident_bytes(process.pid)
        assert resident > 0
        assert 0 < proportional_bytes(process.pid) <= psutil.Process(process.pid).memory_info().rss
    finally:
        process.communicate()
    assert resident_bytes(process.pid) == 0
    assert proportional_bytes(process.pid) == 0


def test_this_machine_has_more_memory_than_this_process() -> None:
    assert resident_bytes(os.getpid()) < machine_total_bytes()
    assert 0 < machine_available_bytes() <= machine_total_bytes()
