"""Progress is work, waiting is excused only while somebody works; memory is what the kernel says."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import psutil

from esper_simic.config import SupervisorConfig
from esper_simic.telemetry import StepHistograms
from supervisor.events import ChildId, ChildSaidReady, ExitReason
from supervisor.memory import (
    machine_available_bytes,
    machine_total_bytes,
    proportional_bytes,
    resident_bytes,
)
from supervisor.protocol import COMPILING, CONSOLIDATING, Progress
from supervisor.vitals import COMPILING_GRACE_S, Snapshot, Vitals
from tests.supervisor.worlds import LEARNER, World, actor, learner, pid_of


def report(who: ChildId, work: int, **fields: object) -> Progress:
    role, index, incarnation = who
    return Progress(role=role, index=index, incarnation=incarnation, work=work, **fields)  # type: ignore[arg-type]


def test_a_report_without_new_work_is_no_progress() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1), 1.0)
    vitals.heard(report(actor(0), 1), 5.0)
    assert vitals.progressed_at_s(5.0, [actor(0)]) == {actor(0): 1.0}
    vitals.heard(report(actor(0), 2), 6.0)
    assert vitals.progressed_at_s(6.0, [actor(0)]) == {actor(0): 6.0}


BOTH = [LEARNER, actor(0)]


def test_who_waits_is_excused_while_another_is_at_it_and_not_when_all_wait() -> None:
    vitals = Vitals()
    vitals.heard(report(LEARNER, 1), 50.0)
    vitals.heard(report(actor(0), 1, waiting_for="credit"), 52.0)
    assert vitals.progressed_at_s(52.0, BOTH) == {LEARNER: 50.0, actor(0): 52.0}
    vitals.heard(report(LEARNER, 1, waiting_for="experience"), 90.0)
    vitals.heard(report(actor(0), 1, waiting_for="credit"), 90.0)
    assert set(vitals.progressed_at_s(91.0, BOTH).values()) == {52.0}, (
        "a circle of waiting is nobody's progress"
    )


def test_a_learner_that_compiles_may_be_silent_for_long_and_not_for_ever() -> None:
    vitals = Vitals()
    vitals.heard(report(LEARNER, 4, learner_step=9, metrics={"loss": 1.0}), 10.0)
    vitals.heard(report(LEARNER, 4, phase=COMPILING), 20.0)
    assert vitals.progressed_at_s(900.0, [LEARNER]) == {LEARNER: 900.0}
    assert vitals.progressed_at_s(20.5 + COMPILING_GRACE_S, [LEARNER]) == {LEARNER: 20.0 + COMPILING_GRACE_S}
    shown = snapshot(World(), vitals).learner
    assert (shown.step, shown.metrics) == (9, {"loss": 1.0}), "what it said before stands"
    vitals.heard(report(LEARNER, 5, learner_step=10), 1000.0)
    assert vitals.progressed_at_s(1100.0, [LEARNER]) == {LEARNER: 1000.0}, (
        "then the clock runs as for everybody"
    )


def test_a_learner_that_consolidates_works_batch_by_batch_and_no_longer_than_that() -> None:
    vitals = Vitals()
    vitals.heard(report(LEARNER, 4, learner_step=9, environment_steps=90, metrics={"loss": 1.0}), 10.0)
    vitals.heard(report(LEARNER, 5, phase=CONSOLIDATING), 20.0)
    vitals.heard(report(LEARNER, 6, phase=CONSOLIDATING), 150.0)
    assert vitals.progressed_at_s(500.0, [LEARNER]) == {LEARNER: 150.0}, "a batch that does not end hangs"
    world = World()
    world.train()
    shot = snapshot(world, vitals)
    assert (shot.learner.step, shot.environment.steps, shot.learner.metrics) == (9, 90, {"loss": 1.0})
    assert [process.phase for process in shot.processes if process.role == "learner"] == [CONSOLIDATING]
    vitals.heard(report(LEARNER, 7, learner_step=10), 160.0)
    shot = snapshot(world, vitals)
    assert (shot.learner.step, {process.phase for process in shot.processes}) == (10, {""})


def test_what_is_consolidated_on_the_way_back_hides_no_recovery() -> None:
    vitals = Vitals()
    vitals.heard(report(LEARNER, 1, phase="recovering", metrics=RECOVERY), 2.0)
    vitals.heard(report(LEARNER, 2, phase=CONSOLIDATING), 3.0)
    assert snapshot(World(), vitals).learner.metrics == RECOVERY


def test_who_says_nothing_any_more_is_late_and_those_who_wait_for_him_are_not() -> None:
    """A learner that was stopped while it waited: its last word was an excuse."""
    vitals = Vitals()
    vitals.heard(report(LEARNER, 4, waiting_for="experience"), 10.0)
    for at_s in (10.0, 14.0, 18.0, 22.0):
        vitals.heard(report(actor(0), 1, waiting_for="credit"), at_s)
    assert vitals.progressed_at_s(22.0, BOTH) == {LEARNER: 10.0, actor(0): 22.0}


def test_a_stopped_actor_is_late_although_its_last_word_was_that_it_waits_and_others_work() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1, waiting_for="credit"), 10.0)
    vitals.heard(report(LEARNER, 4), 10.0)
    vitals.heard(report(LEARNER, 9), 200.0)
    assert vitals.progressed_at_s(200.0, BOTH)[actor(0)] == 10.0


def test_nobody_is_late_who_waits_for_one_that_is_on_its_way() -> None:
    """A learner is being started, has said nothing yet, and takes its time."""
    vitals = Vitals()
    vitals.heard(report(actor(0), 1, waiting_for="learner"), 300.0)
    assert vitals.progressed_at_s(301.0, [learner(2), actor(0)]) == {actor(0): 301.0}
    assert vitals.progressed_at_s(301.0, [actor(0)]) == {actor(0): 300.0}


def test_on_a_full_disk_nobody_is_late() -> None:
    vitals = Vitals()
    for at_s in (1.0, 500.0):
        vitals.heard(report(LEARNER, 1, waiting_for="disk"), at_s)
        vitals.heard(report(actor(0), 1, waiting_for="credit"), at_s)
    assert set(vitals.progressed_at_s(500.0, BOTH).values()) == {500.0}


def test_while_a_breaker_is_open_nobody_is_late() -> None:
    vitals = Vitals()
    for at_s in (1.0, 500.0):
        vitals.heard(report(LEARNER, 1, waiting_for="breaker"), at_s)
        vitals.heard(report(actor(0), 1, waiting_for="credit"), at_s)
    assert set(vitals.progressed_at_s(500.0, BOTH).values()) == {500.0}


def test_a_forgotten_child_is_gone_from_the_table() -> None:
    vitals = Vitals()
    vitals.heard(report(actor(0), 1), 1.0)
    vitals.forget(actor(0))
    assert vitals.progressed_at_s(2.0, []) == {}


# A learner that recovers


RECOVERY = {"recovery.done": 61.0, "recovery.total": 170.0, "recovery.seconds_left": 3.0}


def test_while_a_learner_recovers_the_last_counts_stand_and_its_progress_is_seen() -> None:
    world, vitals = World(), Vitals()
    world.train()
    vitals.heard(report(LEARNER, 9, learner_step=9, environment_steps=90, metrics={"entropy": 1.0}), 1.0)
    vitals.forget(LEARNER)
    world.gone(LEARNER, ExitReason.SIGNAL)
    vitals.heard(report(learner(2), 1, phase="recovering", metrics=RECOVERY), 2.0)
    assert vitals.progressed_at_s(2.0, [learner(2)]) == {learner(2): 2.0}
    shot = snapshot(world, vitals)
    assert (shot.learner.step, shot.environment.steps) == (9, 90)
    assert shot.learner.metrics == {"entropy": 1.0} | RECOVERY
    vitals.learner_stands_at(8, 80)
    shot = snapshot(world, vitals)
    assert (shot.learner.step, shot.environment.steps) == (8, 80), "what was not durable is taken back"
    assert shot.learner.metrics == {"entropy": 1.0}


def test_a_learner_that_dies_while_it_recovers_recovers_no_more() -> None:
    vitals = Vitals()
    vitals.heard(report(LEARNER, 1, phase="recovering", metrics=RECOVERY), 2.0)
    vitals.forget(LEARNER)
    assert snapshot(World(), vitals).learner.metrics == {}


def test_a_run_that_goes_on_counts_from_where_it_was_found() -> None:
    world, vitals = World(max_seconds=5), Vitals()
    world.train()
    world.gone(actor(0), ExitReason.SIGNAL)
    world.resume()
    assert snapshot(world, vitals).learner.step == 0, "nobody knows yet"
    world.train(learner_step=40, environment_steps=400)
    shot = snapshot(world, vitals)
    assert (shot.learner.step, shot.learner.before) == (40, 40)
    assert (shot.environment.steps, shot.environment.before) == (400, 400)
    vitals.heard(report(learner(2), 1, learner_step=41, environment_steps=410), 1.0)
    shot = snapshot(world, vitals)
    assert (shot.learner.step, shot.learner.before) == (41, 40)
    assert (shot.environment.steps, shot.environment.before, shot.resumes) == (410, 400, 1)
    assert {view.restarts for view in shot.processes} == {0}, "restarts are of this invocation"


def test_a_run_that_only_has_to_measure_shows_where_its_last_checkpoint_stands() -> None:
    world, vitals = World(max_seconds=5), Vitals()
    world.train()
    world.time_is_up()
    world.end_training(learner_step=7)
    world.resume()
    shot = snapshot(world, vitals)
    assert (shot.state, shot.learner.step, shot.learner.before) == ("evaluating", 7, 7)
    assert (shot.environment.steps, shot.training_elapsed_s) == (70, 5.0)


def test_troubles_and_notes_are_read_from_the_learners_metrics() -> None:
    world, vitals = World(), Vitals()
    world.train()
    well = {"admission_paused": 0.0, "inexact": 0.0, "quarantined": 0.0}
    vitals.heard(report(LEARNER, 1, metrics=well), 1.0)
    shot = snapshot(world, vitals)
    assert (shot.troubles, shot.notes) == ([], [])
    vitals.heard(
        report(LEARNER, 2, metrics={"admission_paused": 1.0, "inexact": 1.0, "quarantined": 2.0}), 2.0
    )
    shot = snapshot(world, vitals)
    assert shot.troubles == [
        "the disk is full: nothing is taken in until there is room again",
        "2 records of the learner's journal are quarantined: not learned from",
    ]
    assert shot.notes == ["the learner's last recovery was not exact: see LearnerRecovered in its journal"]


def test_what_the_learner_notes_of_itself_and_how_it_computes_is_in_the_picture() -> None:
    world, vitals = World(), Vitals()
    world.spawn()
    assert (snapshot(world, vitals).execution, snapshot(world, vitals).notes) == ("", [])
    said = ChildSaidReady(child=LEARNER, pid=pid_of(LEARNER), execution="cpu: adam fused, compile none")
    assert "ChildReady" in world.tell(said)
    vitals.heard(msgspec.structs.replace(report(LEARNER, 1), notes=("the loss is run as it is",)), 1.0)
    shot = snapshot(world, vitals)
    assert shot.notes == ["the loss is run as it is"]
    assert shot.execution == "cpu: adam fused, compile none"


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


def test_what_a_careful_training_does_is_said() -> None:
    world, vitals = World(), Vitals()
    world.train()
    metrics = {
        "breaker.training": 2.0,
        "breaker.vtrace": 2.0,
        "conservative_mode": 1.0,
        "slo_budget_left.throughput": 0.0,
        "slo_budget_left.step_latency": 0.5,
    }
    vitals.heard(
        Progress(role="learner", index=0, incarnation=LEARNER.incarnation, work=1, metrics=metrics), 1.0
    )
    shown = snapshot(world, vitals)
    assert len(shown.troubles) == 1
    assert "the training's breaker is open" in shown.troubles[0]
    assert [note.split(":")[0] for note in shown.notes] == [
        "conservative mode",
        "V-trace's breaker is open",
        "objectives out of their error budget",
    ]
    assert shown.notes[-1].endswith(": throughput")


def test_counters_and_histograms_add_up_over_the_learners_lives() -> None:
    world, vitals = World(), Vitals()
    world.train()
    for life, refused in ((1, 3.0), (2, 2.0)):
        counts = StepHistograms().followed({"grad_norm": 0.5}).by_source
        report = Progress(
            role="learner",
            index=0,
            incarnation=life,
            work=1,
            metrics={"refused.too_old": refused},
            histograms=counts,
        )
        vitals.heard(report, float(life))
        vitals.heard(report, float(life))  # said twice, counted once
    shown = snapshot(world, vitals)
    assert shown.counters["refused.too_old"] == 5.0
    assert shown.histograms["grad_norm"].count == 2
