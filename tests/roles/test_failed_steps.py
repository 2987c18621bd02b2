"""Updates that fail, in the learner's loop: journaled, folded back, and survived."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from esper_simic.errors import InvariantViolation
from esper_simic.events import LearnerRecovered, LearnerStepped, StepFailed
from esper_simic.learner import Learner
from esper_simic.safety_facts import BatchShrunk, GoodStateRestored, TrainingHalted
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated
from supervisor.roles.fold import LearnerFold, event_of
from tests.roles.bench import LANES, Actor, Bench, bench, credits_in, episode
from tests.roles.scribe import contents, is_same_state

EVERY = "simic_trainer.digest_every_steps=1"
FRAIL = ("simic_trainer.training_breaker_failure_threshold=1", "simic_trainer.halt_after_openings=2")
WIDE = (
    "simic_trainer.batch_size=16",
    "experience_buffer.capacity=64",
    "supervisor.unrolls_in_flight=4",
)

Failure = Callable[[], Exception]


def not_finite() -> Exception:
    return FloatingPointError("loss inf, gradient norm nan")


def no_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def break_updates(learner: Learner, failure: Failure, *, after: int = 0, times: int = 1) -> None:
    """Some updates of this life move everything and then fail."""
    update, made = learner.engine._update, 0

    def broken(batch: Batch, terms: Terms) -> Updated:
        nonlocal made
        made += 1
        updated = update(batch, terms)
        if after < made <= after + times:
            raise failure()
        return updated

    learner.engine._update = broken


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path / "run", EVERY) as made:
        yield made


def fill(held: Bench, actors: list[Actor], unrolls: int) -> None:
    """Each actor sends unrolls, with every update that may be made and all answers heard in between."""
    for _ in range(unrolls):
        for actor in actors:
            held.send(actor, episodes=[episode(cut=False)])
        held.step_all()
        held.make_durable()


def folded(held: Bench, *, quarantined: tuple[int, ...] = ()) -> LearnerFold:
    """The journal, folded from its start by one in whose life nothing failed."""
    fold = LearnerFold(
        held.config, held.journal.directory, held.directory / "checkpoints", quarantined=quarantined
    )
    for record in held.records():
        moved = fold.take(record)
        if isinstance(moved.event, LearnerStepped | StepFailed) and moved.report is not None:
            if not quarantined:
                assert moved.report.digest == moved.event.digest
                assert moved.state_digest == moved.event.state_digest
                assert moved.report.facts == tuple(moved.event.facts)
            assert moved.report.step == moved.event.step
    return fold


@pytest.mark.parametrize("failure", [not_finite, no_memory])
def test_a_failed_update_is_journaled_with_what_followed(held: Bench, failure: Failure) -> None:
    break_updates(held.loop.learner, failure, after=1)
    actors = [held.actor(0), held.actor(1)]
    fill(held, actors, 4)
    (record,) = held.records("StepFailed")
    event = record.header_as(StepFailed)
    is_memory = failure is no_memory
    assert (event.step, event.out_of_memory) == (2, is_memory)
    assert event.reason.startswith("out of memory: CUDA" if is_memory else "not finite: loss inf")
    assert GoodStateRestored(reason="out_of_memory" if is_memory else "not_finite") in event.facts
    assert (BatchShrunk(factor=0.5) in event.facts) == is_memory
    assert event.inputs.operations_since > 0
    assert event.state_digest is not None
    steps = [r.header_as(LearnerStepped).step for r in held.records("LearnerStepped")]
    assert steps == [1, *range(3, held.loop.learner.steps_done + 1)], "the training goes on"
    assert len(steps) > 2
    counters = held.loop.counters()
    assert (counters["facts.StepFailed"], counters["facts.GoodStateRestored"]) == (1.0, 1.0)
    assert held.loop.metrics["total"] != 0


@pytest.mark.parametrize("failure", [not_finite, no_memory])
def test_the_journal_gives_the_state_that_the_failure_gave(held: Bench, failure: Failure) -> None:
    break_updates(held.loop.learner, failure, after=1, times=2)
    fill(held, [held.actor(0), held.actor(1)], 5)
    assert len(held.records("StepFailed")) == 2
    learner, fold = held.loop.learner, folded(held)
    assert is_same_state(fold.learner.state(), learner.state())
    assert contents(fold.learner) == contents(learner)
    assert fold.learner.safety == learner.safety
    assert fold.learner.weights() == learner.weights()


@pytest.mark.parametrize("failure", [not_finite, no_memory])
@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_failed_update_survives_the_learners_death(
    held: Bench, failure: Failure, with_checkpoint: bool
) -> None:
    break_updates(held.loop.learner, failure, after=1)
    actors = [held.actor(0), held.actor(1)]
    fill(held, actors, 3)
    assert held.records("StepFailed")
    if with_checkpoint:
        held.checkpointer.save(held.loop.learner)
        fill(held, actors, 1)
    before = held.loop.learner.state().copy()
    safety, buffer = held.loop.learner.safety, contents(held.loop.learner)
    held.make_durable()
    held.kill()
    recovery = held.live(2)
    learner = held.loop.learner
    assert recovery.is_exact
    assert is_same_state(learner.state(), before)
    assert contents(learner) == buffer
    assert learner.safety == safety
    (record,) = held.records("LearnerRecovered")
    assert (record.header_as(LearnerRecovered).checkpoint != "") == with_checkpoint


def test_a_failure_that_never_got_to_the_disk_may_not_come_again(held: Bench) -> None:
    break_updates(held.loop.learner, not_finite)
    actors = [held.actor(0), held.actor(1)]
    for _ in range(2):
        for actor in actors:
            held.send(actor)
        held.journal.sync()
    assert held.loop.may_step
    held.loop.step()
    assert held.loop.learner.buffer.barred
    held.kill()
    held.live(2)
    assert (held.loop.learner.steps_done, held.loop.learner.buffer.barred) == (0, [])
    held.step_all()
    assert not held.records("StepFailed")
    assert len(held.records("LearnerStepped")) == 1


def test_the_credits_of_a_batch_that_failed_come_back(held: Bench) -> None:
    break_updates(held.loop.learner, not_finite)
    actors = [held.actor(0), held.actor(1)]
    given = sum(credits_in(actor) for actor in actors)
    assert given == 4
    for _ in range(2):
        for actor in actors:
            held.send(actor)
    consumed = held.loop.learner.buffer.consumed
    assert held.step_all() == 1
    held.make_durable()
    assert held.records("StepFailed")
    whole = held.loop.learner.buffer.consumed // LANES
    assert whole > consumed // LANES
    assert sum(credits_in(actor) for actor in actors) == whole, "those that filled the buffer, too"


def test_actors_get_the_weights_to_which_the_training_went_back(held: Bench) -> None:
    break_updates(held.loop.learner, not_finite)
    actors = [held.actor(0), held.actor(1)]
    beginning = held.loop.learner.weights()
    fill(held, actors, 2)
    assert held.loop._published == (1, beginning)
    fill(held, actors, 2)
    assert held.loop._published[0] > 1
    assert held.loop._published[1] != beginning


def test_a_halted_training_makes_no_update_after_any_time(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *FRAIL) as held:
        break_updates(held.loop.learner, not_finite, times=9)
        actors = [held.actor(0), held.actor(1)]
        fill(held, actors, 2)
        assert (held.loop.learner.steps_done, held.loop.may_step) == (1, False), "its breaker is open"
        for actor in actors:
            held.send(actor)
        assert held.loop.learner.can_step()
        assert not held.loop.may_step
        held.clock.advance(60.0)
        assert held.step_all() == 1
        facts = held.records("StepFailed")[-1].header_as(StepFailed).facts
        assert TrainingHalted(reason="training_breaker_opened") in facts
        held.clock.advance(1e6)
        assert not held.loop.may_step
        before = held.loop.learner.state().digest
        held.make_durable()
        held.kill()
        assert held.live(2).is_exact
        assert held.loop.learner.state().digest == before
        assert not held.loop.may_step


def test_an_update_after_no_memory_takes_half_the_batch(tmp_path: Path) -> None:
    with bench(tmp_path / "run", EVERY, *WIDE) as held:
        break_updates(held.loop.learner, no_memory)
        actors = [held.actor(0), held.actor(1)]
        fill(held, actors, 4)
        sizes = [r.header_as(LearnerStepped).metrics["batch_size"] for r in held.records("LearnerStepped")]
        assert len(held.records("StepFailed")) == 1
        assert set(sizes) == {8.0}
        fold = folded(held)
        assert is_same_state(fold.learner.state(), held.loop.learner.state())


def test_a_quarantined_failure_is_passed_over(held: Bench) -> None:
    break_updates(held.loop.learner, not_finite, after=1)
    fill(held, [held.actor(0), held.actor(1)], 3)
    (failed,) = held.records("StepFailed")
    fold = folded(held, quarantined=(failed.position,))
    learner = held.loop.learner
    assert fold.learner.steps_done == learner.steps_done
    assert fold.learner.buffer.barred == [] != learner.buffer.barred
    assert fold.learner.ledger.unconsumed() == learner.ledger.unconsumed()


def test_a_failed_update_that_lacks_what_was_quarantined_is_counted(held: Bench) -> None:
    break_updates(held.loop.learner, not_finite)
    fill(held, [held.actor(0), held.actor(1)], 2)
    assert [record.kind for record in held.records()].count("StepFailed") == 1
    quarantined = tuple(record.position for record in held.records("ExperienceAdmitted")[:3])
    fold = folded(held, quarantined=quarantined)
    assert fold.learner.steps_done == held.loop.learner.steps_done == 1
    assert fold.learner.buffer.fresh == 0


def test_an_update_that_fails_where_it_was_made_once_breaks_an_invariant(held: Bench) -> None:
    fill(held, [held.actor(0), held.actor(1)], 2)
    fold = LearnerFold(held.config, held.journal.directory, held.directory / "checkpoints")
    break_updates(fold.learner, no_memory)
    records = held.records()
    stepped = next(index for index, record in enumerate(records) if record.kind == "LearnerStepped")
    for record in records[:stepped]:
        fold.take(record)
    with pytest.raises(InvariantViolation, match="update 1 was made once, and fails here: out of memory"):
        fold.take(records[stepped])


def test_a_record_of_a_failure_is_read_as_it_was_written(held: Bench) -> None:
    break_updates(held.loop.learner, no_memory)
    fill(held, [held.actor(0), held.actor(1)], 2)
    event = held.records("StepFailed")[0].header_as(StepFailed)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=StepFailed) == event
    assert event.digest == event.state_digest or event.digest != ""


# -- in lockstep -------------------------------------------------------------------------------------------------------

LOCKSTEP = ("supervisor.lockstep=true", EVERY, "simic_trainer.training_breaker_failure_threshold=1")


def play(held: Bench, rounds: int) -> None:
    """Both actors send what the round asks of them; their unrolls are a function of its number alone."""
    for actor in held.actors:
        held.settle(actor)
    for _ in range(rounds):
        for actor in held.actors:
            number = actor.sequence + 1
            held.send(
                actor, frames=held.frames(1000 * actor.index + number), episode_numbers=[number] * LANES
            )
        held.step_all()
        held.loop.open_round()
        held.make_durable()


def lockstep_run(directory: Path, failing: int | None, rounds: int = 6) -> tuple[list[str], list[float]]:
    """Digests and times of every update of a run in which one fails."""
    with bench(directory, *LOCKSTEP) as held:
        held.clock.advance(float(len(directory.name)) * 1000)
        if failing is not None:
            break_updates(held.loop.learner, not_finite, after=failing)
        for index in range(2):
            held.actor(index)
        play(held, rounds)
        digests, times = [], []
        for record in held.records():
            if record.kind in ("LearnerStepped", "StepFailed"):
                event = event_of(record)
                assert isinstance(event, StepFailed | LearnerStepped)
                assert event.inputs is not None
                digests.append(str(event.state_digest))
                times.append(event.inputs.at_s)
        fold = folded(held)
        assert is_same_state(fold.learner.state(), held.loop.learner.state())
        return digests, times


def test_in_lockstep_a_failure_is_a_function_of_the_run_and_waits_for_no_clock(tmp_path: Path) -> None:
    sound, times = lockstep_run(tmp_path / "sound", None)
    assert times == [float(step) for step in range(1, len(times) + 1)]
    assert len(times) >= 5
    one, first = lockstep_run(tmp_path / "one", 2)
    two, second = lockstep_run(tmp_path / "another run", 2)
    assert (one, first) == (two, second), "whatever the clocks say"
    assert (one[:2], first[:3]) == (sound[:2], [1.0, 2.0, 3.0])
    assert first[3] == 64.0, "the wait of its breaker is over at once"
    assert len(first) == len(times), "no round waited for it"
    assert one[2] != sound[2]
    shutil.rmtree(tmp_path / "one")
