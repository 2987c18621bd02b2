"""A run's past in bounded memory: what is kept, what is counted, and when things were."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Final, get_args

import msgspec
import pytest

from esper_simic.curriculum_facts import (
    CoordinationMode,
    CurriculumAdvanced,
    CurriculumAnswered,
    CurriculumHeld,
    CurriculumReply,
    CurriculumRequest,
)
from esper_simic.events import (
    AdaptersBegun,
    AdmissionPaused,
    AdmissionResumed,
    CurriculumJudged,
    EpisodeFinished,
    ExperienceAdmitted,
    ExperienceRefused,
    LearnerRecovered,
    LearnerStepped,
    RecordQuarantined,
    RunStarted,
    StepFact,
    StepFailed,
)
from esper_simic.rate_facts import RateChanged, Tampered
from esper_simic.safety_facts import (
    BatchGrown,
    BatchShrunk,
    BreakerClosed,
    BreakerHalfOpened,
    BreakerOpened,
    ClipRelaxed,
    ClipTightened,
    ConservativeModeEntered,
    ConservativeModeLeft,
    ConservativeTriggersAdded,
    FallbackEntered,
    FallbackLeft,
    GoodStateRestored,
    RateLowered,
    RateRaised,
    SafetyFact,
    SloRestored,
    SloViolated,
    TrainingHalted,
    TrainingResumed,
)
from esper_simic.safety_step import StepInputs
from supervisor.events import ExitReason
from supervisor.journal import Record
from supervisor.report.gather import Gathered, gather
from supervisor.report.past import EPISODES_MAX, LearnerPast, Stretch, SupervisorPast
from tests.supervisor.report_runs import write_learner, write_supervisor
from tests.supervisor.worlds import LEARNER, World, actor


def record(at_s: float, event: object, position: int = 0, kind: str = "") -> Record:
    return Record(
        position, round(at_s * 1e9), kind or type(event).__name__, msgspec.msgpack.encode(event), ()
    )


def began(max_epochs: int = 40, unroll_length: int = 10) -> RunStarted:
    config = {"environment": {"max_epochs": max_epochs}, "simic_trainer": {"unroll_length": unroll_length}}
    return RunStarted(run_id="run-1", config=config, fingerprint={"cpu": "x"})


def stepped(step: int, steps: int, **metrics: float) -> LearnerStepped:
    return LearnerStepped(step=step, environment_steps=steps, digest="d", state_digest=None, metrics=metrics)


def ended(lane: int = 0, *, accuracy: float = 40.0, truncated: bool = False) -> EpisodeFinished:
    return EpisodeFinished(
        lane=lane,
        number=0,
        episode_return=1.0,
        length=40,
        accuracy=accuracy,
        parameters_added=12,
        fossils=2,
        truncated=truncated,
    )


def admitted(*episodes: EpisodeFinished, sequence: int = 1, actor_index: int = 0) -> ExperienceAdmitted:
    return ExperienceAdmitted(
        actor=actor_index,
        incarnation=1,
        sequence=sequence,
        policy_version=0,
        length=10,
        lanes=4,
        episode_numbers=[0] * 4,
        episodes=list(episodes),
    )


def recovered(steps: int = 40, *, is_exact: bool = True) -> LearnerRecovered:
    return LearnerRecovered(
        incarnation=2,
        checkpoint="step-1",
        passed_over={},
        records_folded=1,
        steps_redone=0,
        step=1,
        environment_steps=steps,
        state_digest="d",
        is_exact=is_exact,
        seconds=1.0,
    )


def learned(*records: Record, resumed_s: tuple[float, ...] = ()) -> LearnerPast:
    past = LearnerPast(resumed_s)
    for one in records:
        past.take(one)
    past.close()
    return past


def test_experience_is_counted_and_whole_episodes_are_kept() -> None:
    past = learned(
        record(0, began()),
        record(1, admitted(ended(accuracy=50.0), ended(1, truncated=True))),
        record(
            2,
            ExperienceRefused(
                actor=0, incarnation=1, sequence=2, policy_version=0, steps=40, reason="too_old"
            ),
        ),
        record(3, stepped(1, 80, entropy=1.0)),
    )
    assert (past.environment_steps, past.step, past.cut_short) == (80, 1, 1)
    assert dict(past.refused) == {"too_old": 1}
    assert [tuple(episode) for episode in past.episodes] == [(40, 50.0, 12)]
    assert past.curves["entropy"].points().x.tolist() == [80.0]
    assert past.fossils.points().y.tolist() == [2.0]


def test_the_clock_of_the_rate_stands_still_while_no_learner_lives() -> None:
    past = learned(
        record(0, began()),
        record(10, stepped(1, 100)),
        record(500, recovered()),
        record(510, stepped(2, 200)),
    )
    points = past.working.points()
    assert points.x.tolist() == [10.0, 20.0]
    assert points.y.tolist() == [100.0, 200.0]
    assert [mark.lane for mark in past.marks.newest] == ["learner"]
    assert not past.marks.troubles


def test_pauses_are_stretches_also_one_that_has_not_ended() -> None:
    paused, resumed = AdmissionPaused(free_bytes=1, reason="full"), AdmissionResumed(free_bytes=9)
    past = learned(record(1, paused), record(4, resumed), record(6, paused), record(9, stepped(1, 1)))
    assert list(past.pauses) == [
        Stretch(1, 4, "admission paused"),
        Stretch(6, 9, "admission paused"),
    ]
    assert past.marks.troubles == 2


@pytest.mark.parametrize("kind", ["Unheard", "LearnerStepped"])
def test_a_record_of_another_version_is_counted_and_passed_over(kind: str) -> None:
    past = learned(record(0, {"x": 1}, kind=kind), record(1, stepped(1, 10)))
    assert (past.unread, past.step) == (1, 1)
    supervisor = SupervisorPast()
    supervisor.take(record(0, {"x": 1}, kind=kind))
    assert supervisor.unread == 1


def test_values_that_are_no_numbers_do_not_reach_a_curve() -> None:
    past = learned(record(0, stepped(1, 1, loss=math.nan)), record(1, stepped(2, 2, loss=1.0)))
    assert past.curves["loss"].skipped == 1
    assert past.curves["loss"].points().y.tolist() == [1.0]


def test_trouble_is_marked_as_trouble() -> None:
    past = learned(
        record(1, RecordQuarantined(position=3, failures=2, reason="bad")),
        record(2, recovered(is_exact=False)),
    )
    assert past.marks.troubles == 2
    assert "not exactly" in past.marks.newest[-1].text


def test_enough_unrolls_of_each_actor_are_remembered_for_a_whole_episode_and_no_more() -> None:
    past = learned(
        record(0, began(max_epochs=40, unroll_length=10)),
        *(record(n, admitted(sequence=n, actor_index=n % 2), position=n) for n in range(1, 200)),
    )
    assert {actor: len(row) for actor, row in past.unrolls.items()} == {0: 10, 1: 10}
    assert past.unrolls[1][-1].position == 199


def test_memory_does_not_grow_with_the_run() -> None:
    past = LearnerPast()
    past.take(record(0, began()))

    def live(updates: range) -> int:
        for n in updates:
            past.take(record(n, stepped(n, 40 * n, entropy=n / 7, policy_loss=-n / 3), position=n))
            past.take(record(n, admitted(ended(accuracy=float(n % 100)), sequence=n), position=n))
            past.take(record(n, recovered(40 * n), position=n))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early = live(range(1, 4000))
        late = live(range(4000, 16_000))
    finally:
        tracemalloc.stop()
    assert late < early + 200_000
    assert len(past.episodes) <= EPISODES_MAX
    assert past.episodes.count == 15_999


# Phases


def gathered(tmp_path: Path, world: World, *learner: tuple[float, object]) -> Gathered:
    write_supervisor(tmp_path, world)
    if learner:
        write_learner(tmp_path, *learner)
    return gather(tmp_path)


def test_phases_follow_each_other_to_the_end_of_the_run(tmp_path: Path) -> None:
    world = World(max_seconds=60.0)
    world.now_s = 3.0
    world.train()
    world.time_is_up()
    world.end_training()
    world.evaluate()
    found = gathered(tmp_path, world).stretches()
    assert [(round(one.start_s), round(one.stop_s), one.phase) for one in found] == [
        (0, 3, "starting"),
        (3, 63, "training"),
        (63, 63, "stopping"),
        (63, 63, "evaluating"),
        (63, 63, "stopping"),
    ]


def test_a_supervisor_that_died_worked_until_its_learner_was_heard_last(tmp_path: Path) -> None:
    world = World(max_seconds=60.0)
    world.now_s = 3.0
    world.train()
    world.resume()  # at 1000 s
    found = gathered(tmp_path, world, (10.0, stepped(1, 10)), (42.0, stepped(2, 20)), (1001.0, recovered()))
    stretches = [(round(one.start_s), round(one.stop_s), one.phase) for one in found.stretches()]
    assert stretches == [(0, 3, "starting"), (3, 42, "training"), (1000, 1001, "starting")]
    assert found.state == "died", "nobody lives there, and the journal tells of no end"


def test_what_befell_the_processes_is_told(tmp_path: Path) -> None:
    world = World()
    world.now_s = 3.0
    world.train()
    world.gone(actor(0), ExitReason.SIGNAL, "signal 9 (SIGKILL); log: x\nmore lines")
    world.gone(LEARNER, ExitReason.ERROR, "exit status 1")
    texts = [mark.text for mark in gathered(tmp_path, world).supervisor.marks.newest]
    assert "actor-0 (life 1) was gone: signal, signal 9 (SIGKILL); log: x" in texts
    assert "learner-0 (life 1) was gone: error, exit status 1" in texts
    assert any(text.startswith("learner-0 is started again (life 2)") for text in texts)


FACTS: Final[dict[str, tuple[StepFact, bool]]] = {
    "the breaker of V-trace opened after 3 failures in a row": (
        BreakerOpened(name="vtrace", failures=3),
        True,
    ),
    "the breaker of the training let one through to see": (BreakerHalfOpened(name="training"), False),
    "the breaker of the training closed": (BreakerClosed(name="training"), False),
    "objective throughput used up its error budget: 12.5, wanted 180": (
        SloViolated(objective="throughput", value=12.5, target=180.0),
        True,
    ),
    "objective throughput is within its error budget again": (SloRestored(objective="throughput"), False),
    "conservative mode began: memory_pressure, slo_violation": (
        ConservativeModeEntered(triggers=("memory_pressure", "slo_violation"), entries=1),
        True,
    ),
    "conservative mode has more reasons: high_error_rate": (
        ConservativeTriggersAdded(triggers=("high_error_rate",)),
        True,
    ),
    "conservative mode ended after 101 updates and 61 s": (
        ConservativeModeLeft(triggers=("memory_pressure",), seconds=60.6, steps=101),
        False,
    ),
    "a gradient of norm 123.5 exploded: clipped at 0.25 of the norm": (
        ClipTightened(factor=0.25, grad_norm=123.45678),
        True,
    ),
    "gradients stayed calm: clipped at 0.5 of the norm": (ClipRelaxed(factor=0.5), False),
    "the loss rose for 10 epochs: rates are 0.5 of their schedule": (
        RateLowered(factor=0.5, epochs=10),
        True,
    ),
    "no divergence any more: rates are 1 of their schedule": (RateRaised(factor=1.0), False),
    "an update did not fit into memory: batches are 0.5 of what is configured": (
        BatchShrunk(factor=0.5),
        True,
    ),
    "updates fit into memory: batches are 1 of what is configured": (BatchGrown(factor=1.0), False),
    "the last good weights came back: not finite": (GoodStateRestored(reason="not finite"), True),
    "targets are TD(0): failures": (FallbackEntered(targets="TD(0)", reason="failures"), True),
    "V-trace is trusted again": (FallbackLeft(), False),
    "the training halted: nothing helped": (TrainingHalted(reason="nothing helped"), True),
    "the halted training went on": (TrainingResumed(), False),
    "the weights are frozen: adapters of rank 4 on 9 matrices learn": (
        AdaptersBegun(rank=4, alpha=8.0, matrices=9),
        False,
    ),
    "somebody else wrote a learning rate of policy: 0.5, not 0.001": (
        Tampered(name="policy", step=3, group=0, groups=1, found=0.5, written=0.001),
        True,
    ),
}


@pytest.mark.parametrize("text", FACTS)
def test_what_happened_beside_an_update_is_told(text: str) -> None:
    fact, is_trouble = FACTS[text]
    made = msgspec.structs.replace(stepped(7, 70), facts=[fact])
    (mark,) = learned(record(12.0, made)).marks.newest
    assert mark == (12.0, "learner", text, is_trouble)


def test_every_fact_of_safety_has_words() -> None:
    told = {type(fact) for fact, _ in FACTS.values()}
    assert told == {*get_args(SafetyFact), Tampered, AdaptersBegun}


def test_a_rate_that_follows_its_schedule_is_no_news_and_a_failed_update_tells_its_facts() -> None:
    warm = RateChanged(name="policy", step=1, causes=["policy"], before=0.0, after=1.0)
    assert not learned(record(1.0, msgspec.structs.replace(stepped(1, 10), facts=[warm]))).marks.newest
    failed = StepFailed(
        step=2,
        environment_steps=10,
        digest="d",
        state_digest=None,
        reason="the loss is not finite",
        out_of_memory=False,
        inputs=StepInputs(at_s=1.0),
        facts=[GoodStateRestored(reason="not finite")],
    )
    told = [mark.text for mark in learned(record(2.0, failed)).marks.newest]
    assert told == ["update 2 failed: the loss is not finite", "the last good weights came back: not finite"]


def test_what_befell_the_curriculum_is_told() -> None:
    request = CurriculumRequest(
        request_id="r",
        stage="run",
        difficulty=1.0,
        min_success_rate=0.5,
        min_episodes=1,
        max_episodes=2,
        mode=CoordinationMode.STRATEGY_DRIVEN,
        issued_at_s=0.0,
    )
    reply = CurriculumReply(
        request_id="r", correlation_id="", stage="walk", episodes=3, success_rate=0.5, advanced=False
    )
    refused = msgspec.structs.replace(reply, refusal="the breaker is open")
    judged = CurriculumJudged(
        at_s=1.0,
        stage=0,
        facts=[
            CurriculumHeld(stage="walk", rounds=2, episodes=500, success_rate=0.25),
            BreakerOpened(name="curriculum", failures=5),
            CurriculumAnswered(request=request, reply=refused),
            CurriculumAnswered(request=request, reply=reply),
            CurriculumAdvanced(
                from_stage="walk", to_stage="run", difficulty=1.0, episodes=200, success_rate=0.75
            ),
        ],
    )
    told = [(mark.text, mark.is_trouble) for mark in learned(record(2.0, judged)).marks.newest]
    assert told == [
        ("stage 'walk' is held: round 2 ended after 500 episodes with success rate 0.25", True),
        ("the breaker of the curriculum opened after 5 failures in a row", True),
        ("somebody asked for stage 'run', STRATEGY_DRIVEN: refused, the breaker is open", False),
        ("somebody asked for stage 'run', STRATEGY_DRIVEN: granted", False),
        ("stage 'walk' was left for 'run' after 200 episodes, success rate 0.75", False),
    ]
