"""The supervisor's judgement: scripted runs and laws, without a process."""

from __future__ import annotations

import pytest
from hypothesis import given

from esper_simic.config import SupervisorConfig
from supervisor.decide import KILL_CONFIRM_S, STACK_DUMP_S, decide, plan
from supervisor.events import (
    AnyEvent,
    AnyInput,
    AskStop,
    ChildGone,
    ChildId,
    ChildSaidReady,
    ChildSpawned,
    CommandReceived,
    CommandRefused,
    DumpStacks,
    ExitReason,
    KillChild,
    ProgressHeard,
    RunFinished,
    SendEvaluationTask,
    SignalReceived,
    StartChild,
)
from supervisor.restarts import backoff_s
from supervisor.state import Phase, RunState, Status, apply, check
from tests.supervisor.worlds import (
    LEARNER,
    POLICIES,
    STEPS,
    World,
    actor,
    begun,
    evaluator,
    learner,
    pid_of,
)


def outcome(world: World) -> RunFinished:
    assert world.state.finished is not None
    return world.state.finished


def phase(world: World) -> Phase:
    return world.state.phase


# A run from its beginning to its end


def test_a_whole_run_goes_through_its_phases_in_order() -> None:
    world = World(max_seconds=100)
    assert phase(world) is Phase.STARTING
    assert [effect.child for effect in world.owed()] == [actor(0), actor(1), LEARNER]

    world.spawn()
    assert world.owed() == ()
    assert world.ready(actor(0)) == ["ChildReady"]
    assert world.ready(LEARNER) == ["ChildReady", "TrainingStarted"]
    world.ready(actor(1))

    assert world.wait(99.9) == []
    assert world.wait(0.1) == ["TrainingEnded", "ChildStopRequested", "ChildStopRequested"]
    assert {effect.child for effect in world.owed()} == {actor(0), actor(1)}
    assert world.gone(actor(0)) == ["ChildExited"]
    assert world.gone(actor(1)) == ["ChildExited", "ChildStopRequested"]
    assert world.owed() == (AskStop(child=LEARNER, reason="training ended: max_seconds"),)

    assert world.report_checkpoint() == ["CheckpointReported"]
    assert world.gone(LEARNER) == ["ChildExited", "EvaluationStarted", "ChildScheduled", "ChildScheduled"]
    assert phase(world) is Phase.EVALUATING
    world.spawn()
    assert world.ready(evaluator(0)) == ["ChildReady", "EvaluationAssigned"]
    world.ready(evaluator(1))
    assert world.owed() == (
        SendEvaluationTask(child=evaluator(0), policy="learned"),
        SendEvaluationTask(child=evaluator(1), policy="random"),
    )
    assert world.evaluated(evaluator(1), "random") == ["PolicyEvaluated", "EvaluationAssigned"]
    world.evaluated(evaluator(1), "never-grow")
    names = world.evaluated(evaluator(0), "learned")
    assert names == ["PolicyEvaluated", "EvaluationFinished", "ChildStopRequested", "ChildStopRequested"]
    world.gone(evaluator(0))
    assert world.gone(evaluator(1)) == ["ChildExited", "RunFinished"]
    assert (outcome(world).exit_code, outcome(world).outcome) == (0, "finished")
    assert set(world.state.evaluations) == set(POLICIES)
    assert world.owed() == ()


def test_time_counts_from_the_start_of_training_and_steps_from_the_learner() -> None:
    world = World(max_seconds=10, max_steps=500)
    world.wait(60)
    world.train()
    assert world.wait(9.9) == []
    steps = ProgressHeard(child=actor(0), learner_step=0, environment_steps=600)
    assert world.tell(steps) == [], "an actor's count is not the run's"
    assert world.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=499)) == []
    names = world.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=500))
    assert names[0] == "TrainingEnded"
    assert world.state.training_ended is not None
    assert world.state.training_ended.reason == "max_steps"


def test_without_policies_to_compare_the_run_ends_after_training() -> None:
    world = World(policies=(), max_seconds=1)
    world.train()
    world.wait(1)
    world.end_training()
    assert outcome(world).outcome == "finished"


# Deaths and restarts


def test_a_dead_actor_is_restarted_with_doubling_backoff_until_it_is_given_up() -> None:
    world = World(max_restarts=3, restart_backoff_s=0.5, restart_window_s=60, num_actors=2)
    world.train()
    delays = []
    for incarnation in (1, 2, 3):
        who = actor(0, incarnation)
        died_at_s = world.now_s
        assert world.gone(who, ExitReason.SIGNAL, "signal 9") == ["ChildExited", "ChildScheduled"]
        next_life = actor(0, incarnation + 1)
        assert world.owed() == (), "not before the delay is over"
        delays.append(world.state.children[next_life].start_at_s - died_at_s)
        world.wait(delays[-1], learner=world.now_s, actor=world.now_s)
        assert world.owed() == (StartChild(child=next_life),)
        world.spawn()
        world.ready(next_life)
    assert delays == [0.5, 1.0, 2.0]
    assert world.gone(actor(0, 4), ExitReason.ERROR) == ["ChildExited", "ChildGivenUp"]
    assert world.state.phase is Phase.TRAINING, "another actor lives"
    assert world.wait(1) == []


def test_restarts_outside_the_window_are_forgiven() -> None:
    world = World(max_restarts=1, restart_window_s=60, progress_timeout_s=1e6)
    world.train()
    world.gone(actor(0), ExitReason.SIGNAL)
    world.wait(30)
    world.spawn()
    world.ready(actor(0, 2))
    world.wait(31)
    assert world.gone(actor(0, 2), ExitReason.SIGNAL) == ["ChildExited", "ChildScheduled"]
    assert world.state.children[actor(0, 3)].attempt == 1


def test_the_run_fails_when_the_last_actor_is_given_up() -> None:
    world = World(max_restarts=0)
    world.train()
    world.gone(actor(0), ExitReason.ERROR, "exit status 1")
    names = world.gone(actor(1), ExitReason.ERROR, "exit status 1; log: runs/x/logs/actor-1.log")
    assert names == ["ChildExited", "ChildGivenUp", "RunFailed", "ChildStopRequested"]
    world.report_checkpoint()
    world.gone(LEARNER)
    assert outcome(world).exit_code == 1
    assert "logs/actor-1.log" in outcome(world).reason


def test_a_dead_learner_lives_again_while_the_actors_and_the_clock_of_training_go_on() -> None:
    world = World(max_seconds=100)
    world.train()
    world.wait(40, learner=40, actor=40)
    assert world.gone(LEARNER, ExitReason.SIGNAL, "signal 9") == ["ChildExited", "ChildScheduled"]
    assert phase(world) is Phase.TRAINING
    assert set(world.state.live) == {actor(0), actor(1)}
    world.wait(1, actor=41)
    assert world.owed() == (StartChild(child=learner(2)),)
    world.spawn()
    assert world.ready(learner(2), learner_step=9, environment_steps=500) == ["ChildReady"]
    assert world.wait(58.9, learner=99, actor=99) == []
    assert world.wait(0.2, learner=99, actor=99)[0] == "TrainingEnded"


def test_a_learner_that_is_given_up_fails_the_run_and_the_reason_names_its_log() -> None:
    world = World(max_restarts=0)
    world.train()
    names = world.gone(LEARNER, ExitReason.OUT_OF_MEMORY, "signal 9; log: runs/x/logs/learner-0.log")
    assert names == ["ChildExited", "ChildGivenUp", "RunFailed", "ChildStopRequested", "ChildStopRequested"]
    world.gone(actor(0))
    assert world.gone(actor(1)) == ["ChildExited", "RunFinished"]
    assert outcome(world).exit_code == 1
    assert "out_of_memory" in outcome(world).reason
    assert "logs/learner-0.log" in outcome(world).reason


@pytest.mark.parametrize("who", [LEARNER, actor(1)])
def test_a_child_that_asks_for_a_person_ends_the_run_with_its_words_and_is_not_tried_again(
    who: ChildId,
) -> None:
    world = World()
    world.train()
    names = world.gone(who, ExitReason.CONFIGURATION, "00.log:117: bad checksum. Restore it; log: l")
    assert names[:2] == ["ChildExited", "RunFailed"]
    for other in sorted(world.state.live):
        world.gone(other)
    assert (outcome(world).exit_code, outcome(world).outcome) == (78, "failed")
    assert outcome(world).reason == (
        f"{who.name} cannot go on: configuration: 00.log:117: bad checksum. Restore it; log: l"
    )
    assert not any(other.incarnation > 1 for other in world.state.children)


def test_lives_that_never_become_ready_are_counted_however_far_apart_they_end() -> None:
    """A learner whose recovery takes longer than the window, and then dies, would be tried for ever."""
    world = World(max_restarts=2, restart_window_s=60, restart_backoff_max_s=1)
    world.spawn()
    world.ready(actor(0), actor(1))
    for life in (1, 2, 3):
        world.wait(200, actor=world.now_s + 200, learner=world.now_s + 200)
        if life < 3:
            assert world.gone(learner(life), ExitReason.ERROR) == ["ChildExited", "ChildScheduled"]
            world.wait(1, actor=world.now_s + 1)
            world.spawn()
    assert world.gone(learner(3), ExitReason.ERROR, "exit status 1")[:3] == [
        "ChildExited",
        "ChildGivenUp",
        "RunFailed",
    ]
    assert "3 lives in a row were never ready" in world.state.given_up["learner", 0]


def test_a_life_that_became_ready_redeems_those_before_it() -> None:
    world = World(max_restarts=1, restart_window_s=60, restart_backoff_max_s=1)
    world.spawn()
    world.ready(actor(0), actor(1))
    for life in range(1, 8):
        world.wait(100, actor=world.now_s + 100, learner=world.now_s + 100)
        if life % 2 == 0:
            world.ready(learner(life))
        assert world.gone(learner(life), ExitReason.ERROR) == ["ChildExited", "ChildScheduled"]
        world.wait(1, actor=world.now_s + 1)
        world.spawn()


def test_a_start_that_fails_counts_as_a_death() -> None:
    world = World()
    assert world.gone(actor(0), ExitReason.NOT_STARTED, "EOFError") == ["ChildExited", "ChildScheduled"]


def test_a_dead_evaluator_gives_its_policy_back() -> None:
    world = World(max_seconds=1, evaluation_workers=1)
    world.train()
    world.wait(1)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0))
    world.gone(evaluator(0), ExitReason.SIGNAL)
    world.wait(1)
    world.spawn()
    world.ready(evaluator(0, 2))
    assert world.owed() == (SendEvaluationTask(child=evaluator(0, 2), policy="learned"),)
    assert world.evaluated(evaluator(0), "learned") == [], "a late word of the earlier life"


def test_notices_of_earlier_lives_decide_nothing() -> None:
    world = World()
    world.train()
    world.gone(actor(0), ExitReason.SIGNAL)
    world.wait(1)
    world.spawn()
    old, pid = actor(0), pid_of(actor(0))
    for late in (
        ChildSpawned(child=old, pid=pid),
        ChildSaidReady(child=old, pid=pid),
        ChildGone(child=old, reason=ExitReason.CLEAN, detail=""),
        ProgressHeard(child=old, learner_step=0, environment_steps=0),
    ):
        assert world.tell(late) == []
    assert world.state.children[actor(0, 2)].status is Status.STARTED


def test_a_ready_that_overtakes_the_news_of_the_start_counts_once() -> None:
    world = World()
    assert world.ready(actor(0)) == ["ChildStarted", "ChildReady"]
    assert world.tell(ChildSpawned(child=actor(0), pid=pid_of(actor(0)))) == []


def test_a_ready_from_another_process_is_not_believed() -> None:
    world = World()
    world.spawn()
    assert world.tell(ChildSaidReady(child=actor(0), pid=4)) == []


# The stop ladder


def test_a_child_that_is_not_ready_in_time_climbs_the_ladder() -> None:
    world = World(ready_timeout_s=30)
    world.spawn()
    world.ready(LEARNER, actor(0))
    at_work = {LEARNER: 30.0, actor(0): 30.0}
    assert world.wait_for(at_work, 30) == []
    assert world.wait_for(at_work, 0.1) == ["ChildStopRequested"]
    assert world.owed() == (DumpStacks(child=actor(1)),)
    world.wait(STACK_DUMP_S, learner=world.now_s, actor=world.now_s)
    assert world.owed() == (KillChild(child=actor(1)),)
    assert world.gone(actor(1), ExitReason.SIGNAL) == ["ChildExited", "ChildScheduled"]


def test_a_learner_that_recovers_may_take_longer_than_its_time_as_long_as_it_gets_on() -> None:
    world = World(ready_timeout_s=30)
    world.spawn()
    world.ready(actor(0), actor(1))
    for at_s in (25.0, 50.0, 75.0, 100.0):
        assert world.wait_for({LEARNER: at_s, actor(0): at_s, actor(1): at_s}, 25) == []
    at_work = {LEARNER: 100.0, actor(0): 130.0, actor(1): 130.0}
    assert world.wait_for(at_work, 30) == []
    assert world.wait_for(at_work, 0.1) == ["ChildStopRequested"]
    assert world.state.children[LEARNER].reason == "not ready within 30 s"


def test_life_without_progress_is_not_life() -> None:
    world = World(progress_timeout_s=120)
    world.train()
    assert world.wait(120, learner=119) == []
    names = world.wait(0.5, learner=119)
    assert names == ["ChildStopRequested", "ChildStopRequested"], "both actors, not the learner"
    assert "no progress for 120.5 s" in world.state.children[actor(0)].reason


def test_a_child_asked_to_stop_is_killed_after_its_time_and_abandoned_if_the_kernel_keeps_it() -> None:
    world = World(max_seconds=1, stop_timeout_s=20)
    world.train()
    world.wait(1)
    assert world.owed()[0] == AskStop(child=actor(0), reason="training ended: max_seconds")
    world.gone(actor(1))
    world.wait(20)
    assert world.owed() == (DumpStacks(child=actor(0)),)
    world.wait(STACK_DUMP_S)
    assert world.owed() == (KillChild(child=actor(0)),)
    assert world.wait(KILL_CONFIRM_S) == []
    assert world.wait(0.1) == ["ChildAbandoned", "ChildStopRequested"], "now it is the learner's turn"


# Stops from outside


@pytest.mark.parametrize(
    "stop", [SignalReceived(name="SIGINT"), CommandReceived(command_id="c1", name="stop")]
)
def test_the_first_request_ends_in_order_with_a_checkpoint_and_no_evaluation(stop: AnyInput) -> None:
    world = World()
    world.train()
    assert world.tell(stop)[:2] == ["StopRequested", "TrainingEnded"]
    world.end_training()
    assert (outcome(world).exit_code, outcome(world).outcome) == (0, "stopped")
    assert not any(who.role == "evaluate" for who in world.state.children)


def test_the_second_request_kills_at_once() -> None:
    world = World()
    world.train()
    world.tell(SignalReceived(name="SIGINT"))
    world.gone(actor(0))
    world.now_s += 1
    assert world.tell(SignalReceived(name="SIGINT")) == [
        "StopRequested",
        "ChildStopRequested",
        "ChildStopRequested",
    ]
    assert {type(effect) for effect in world.owed()} == {DumpStacks}
    world.gone(actor(1), ExitReason.SIGNAL)
    world.gone(LEARNER, ExitReason.SIGNAL)
    assert (outcome(world).exit_code, outcome(world).outcome) == (0, "stopped")
    assert "no last checkpoint was reported, the journal has everything" in outcome(world).reason


def test_a_stop_before_anybody_is_ready_waits_for_nobody() -> None:
    world = World()
    world.spawn()
    world.tell(SignalReceived(name="SIGTERM"))
    assert {type(effect) for effect in world.owed()} == {DumpStacks}
    world.gone(actor(0), ExitReason.SIGNAL)
    world.gone(actor(1), ExitReason.SIGNAL)
    world.gone(LEARNER, ExitReason.SIGNAL)
    assert (outcome(world).exit_code, outcome(world).outcome) == (0, "stopped")


def test_a_child_that_appears_after_the_stop_is_ended_at_once() -> None:
    world = World()
    world.tell(ChildSpawned(child=LEARNER, pid=pid_of(LEARNER)))
    world.tell(SignalReceived(name="SIGTERM"))
    names = world.tell(ChildSpawned(child=actor(0), pid=pid_of(actor(0))))
    assert names == ["ChildStarted", "ChildStopRequested"]
    assert DumpStacks(child=actor(0)) in world.owed()


def test_a_stop_during_the_evaluation_skips_the_rest() -> None:
    world = World(max_seconds=1)
    world.train()
    world.wait(1)
    world.end_training()
    world.spawn()
    world.ready(evaluator(0), evaluator(1))
    world.tell(SignalReceived(name="SIGTERM"))
    world.gone(evaluator(0))
    world.gone(evaluator(1))
    assert (outcome(world).exit_code, outcome(world).outcome) == (0, "stopped")


def test_a_repeated_command_does_nothing_and_an_unknown_one_is_refused_with_the_known() -> None:
    world = World()
    world.train()
    assert world.tell(CommandReceived(command_id="c1", name="stpo")) == ["CommandRefused"]
    refused = world.events[-1]
    assert isinstance(refused, CommandRefused)
    assert refused.reason == "unknown command 'stpo'; known: stop, curriculum"
    assert world.tell(CommandReceived(command_id="c1", name="stop")) == []
    world.tell(CommandReceived(command_id="c2", name="stop"))
    assert world.tell(CommandReceived(command_id="c2", name="stop")) == []
    assert world.state.stop is not None
    assert not world.state.stop.urgent, "the repeat is no second request"


def test_the_delay_doubles_up_to_its_bound() -> None:
    config = SupervisorConfig(restart_backoff_s=0.5, restart_backoff_max_s=30.0)
    assert [backoff_s(restarts, config) for restarts in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff_s(10**6, config) == 30.0


# Laws

CONFIG = SupervisorConfig(num_actors=2, max_seconds=300, max_steps=1500, max_restarts=2, evaluation_workers=2)


@given(STEPS)
def test_whatever_is_observed_the_state_stays_true_and_the_fold_is_determined(
    steps: list[tuple[AnyInput, float]],
) -> None:
    state, now_s = RunState(), 0.0
    journal: list[AnyEvent] = []
    for observed, delay_s in [(begun(), 0.0), *steps]:
        now_s += delay_s
        events = decide(state, observed, now_s, CONFIG)
        assert events == decide(state, observed, now_s, CONFIG)
        for event in events:
            state = apply(state, event)
            check(state)
        journal.extend(events)
        plan(state, now_s, CONFIG)
    again = RunState()
    for event in journal:
        again = apply(again, event)
    assert again == state


@given(STEPS)
def test_effects_carried_out_are_no_longer_owed(steps: list[tuple[AnyInput, float]]) -> None:
    """A world that obeys always comes to rest, and a child has at most one process at any time."""
    world = World(max_seconds=300, max_restarts=2)
    for observed, delay_s in steps:
        world.now_s += delay_s
        world.tell(observed)
    for _ in range(50):
        owed = world.owed()
        if not owed:
            break
        for effect in owed:
            world.obey(effect)
    assert world.owed() == ()
    names = [(who.role, who.index) for who in world.state.live]
    assert len(names) == len(set(names))


@given(STEPS)
def test_every_run_can_be_ended_by_two_requests(steps: list[tuple[AnyInput, float]]) -> None:
    world = World()
    for observed, delay_s in steps:
        world.now_s += delay_s
        world.tell(observed)
    world.tell(SignalReceived(name="SIGINT"))
    world.tell(SignalReceived(name="SIGINT"))
    for who in sorted(world.state.live):
        world.gone(who, ExitReason.SIGNAL)
    assert world.state.finished is not None


def test_a_training_that_is_never_told_to_end_is_ended_by_its_timeout() -> None:
    world = World()
    world.train()
    assert world.wait_for(dict.fromkeys(world.state.live, 1e9), 24 * 3600 - 1) == []
    ended = world.wait_for(dict.fromkeys(world.state.live, 1e9), 2)
    assert ended[0] == "TrainingEnded"
    assert world.state.training_ended is not None
    assert world.state.training_ended.reason == "training_timeout"
    world.gone(actor(0))
    world.gone(actor(1))
    world.report_checkpoint(LEARNER)
    assert world.gone(LEARNER)[:2] == ["ChildExited", "EvaluationStarted"], "it is measured like any other"


def test_a_learner_that_halts_ends_the_run_and_its_policy_is_kept() -> None:
    world = World()
    world.train()
    told = world.tell(ProgressHeard(child=LEARNER, learner_step=9, environment_steps=90, is_halted=True))
    assert told[0] == "TrainingEnded"
    world.gone(actor(0))
    world.gone(actor(1))
    world.report_checkpoint(LEARNER)
    world.gone(LEARNER)
    finished = world.state.finished
    assert finished is not None
    assert (finished.exit_code, finished.outcome) == (1, "failed")
    assert "halted itself" in finished.reason
    assert "the last good policy is in" in finished.reason
    assert world.state.evaluations == {}
