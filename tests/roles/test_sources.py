"""Records of other runs as a source of experience: what comes when, for whom, and what does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from esper_simic.config import Config
from esper_simic.errors import ConfigError
from esper_simic.events import ExperienceAdmitted
from esper_simic.policies.build import build_policy
from esper_simic.policies.policy import Policy
from esper_simic.trajectory import Trajectory, encode
from esper_simic.worlds.world import world_of
from supervisor.journal import Record, read
from supervisor.journal.format import segment_paths
from supervisor.protocol import Progress, Ready, Welcome
from supervisor.roles import channel
from supervisor.roles import records as records_module
from supervisor.roles.actor import SURVEYING
from supervisor.roles.records import Records
from supervisor.roles.sources import Playing, Recorded, records_of, source_of
from tests.roles.bench import LANES, Bench, T, bench, make_config
from tests.roles.pair import Pair, control_line
from tests.roles.test_gym_worlds import CART_POLE, MEMORY, WORLDS, acted

STATE = 5
"""The frame of the recurrent state among those of an unroll, counted from the end."""


class Source(NamedTuple):
    """A run that was recorded."""

    directory: Path
    records: list[Record]


def recorded_by(directory: Path, *assignments: str, unrolls: int = 7) -> Source:
    with acted(directory, *assignments, unrolls=unrolls):
        pass
    journal = directory / "journal" / "learner-0"
    return Source(directory, [record for record in read(journal) if record.kind == "ExperienceAdmitted"])


@pytest.fixture(scope="module")
def cart_pole(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return recorded_by(tmp_path_factory.mktemp("cart") / "run", *CART_POLE)


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of a policy with memory, two lives of one actor, in lockstep."""
    directory = tmp_path_factory.mktemp("recall") / "run"
    with (
        bench(directory, *MEMORY, "supervisor.lockstep=true") as held,
        control_line() as control,
    ):
        pair = Pair(held, control)
        children = [pair.begin(index=index) for index in (0, 1)]
        pair.wait(lambda: held.loop.learner.ledger.unrolls(1) >= 4, pair.step_turn)
        for index, child in enumerate(children):
            pair.stop(child, index=index)
    journal = directory / "journal" / "learner-0"
    return Source(directory, [record for record in read(journal) if record.kind == "ExperienceAdmitted"])


def learning_from(*sources: Source, more: tuple[str, ...] = CART_POLE) -> Config:
    named = ", ".join(str(source.directory) for source in sources)
    return make_config(
        *more,
        "simic_trainer.algorithm=BC",
        "environment.behaviour=recorded",
        f"environment.records=[{named}]",
    )


def policy_of(config: Config) -> Policy:
    world = world_of(config.environment, config.simic_trainer.gamma)
    return build_policy(world.spec, config.simic_trainer, np.random.default_rng(4))


def opened(config: Config, run_dir: Path) -> tuple[Records, Policy]:
    policy = policy_of(config)
    records = records_of(config, policy, run_dir)
    assert records is not None
    return records, policy


def without_state(frames: list[bytes]) -> list[bytes]:
    return [frame for index, frame in enumerate(frames) if index != len(frames) - 1 - STATE]


def is_of(trajectory: Trajectory, record: Record, count: int) -> bool:
    """Whether these are the steps of a record, whatever is remembered before them."""
    theirs = [bytes(frame) for frame in record.frames[:count]]
    return without_state(encode(trajectory)) == without_state(theirs)


# -- the order ---------------------------------------------------------------------------------------------------------


def test_each_actor_gets_every_nth_unroll_again_and_again(tmp_path: Path, cart_pole: Source) -> None:
    config = learning_from(cart_pole)
    total = len(cart_pole.records)
    for actor in (0, 1):
        records, policy = opened(config, tmp_path)
        source = Recorded(records, policy, actor, 2, made=0)
        for turn in range(2 * total):
            made = source.make(0)
            expected = cart_pole.records[(2 * turn + actor) % total]
            event = expected.header_as(ExperienceAdmitted)
            assert encode(made.trajectory) == [bytes(frame) for frame in expected.frames], (actor, turn)
            assert (made.episode_numbers, made.episodes) == (event.episode_numbers, event.episodes)
            assert made.stage == 0
            assert made.state_after.shape == (LANES, 0)


def test_a_new_life_goes_on_where_the_journal_says_that_the_old_one_stood(
    tmp_path: Path, cart_pole: Source
) -> None:
    config = learning_from(cart_pole)
    records, policy = opened(config, tmp_path)
    straight = Recorded(records, policy, 1, 3, made=0)
    whole = [encode(straight.make(0).trajectory) for _ in range(9)]
    for made in (1, 4, 8):
        again, _ = opened(config, tmp_path)
        welcome = Welcome(learner=1, answers=1, first_episodes=[0] * LANES, unrolls=made)
        config_of_three = config.model_copy(
            update={"supervisor": config.supervisor.model_copy(update={"num_actors": 3})}
        )
        later = source_of(config_of_three, policy, 1, tmp_path, welcome, again)
        assert later.catch_up(lambda: pytest.fail("nothing is done again"))
        assert encode(later.make(0).trajectory) == whole[made]


def test_several_runs_follow_each_other(tmp_path: Path, cart_pole: Source) -> None:
    other = recorded_by(tmp_path / "other", *CART_POLE, "simic_trainer.seed=3", unrolls=5)
    records, _ = opened(learning_from(cart_pole, other), tmp_path / "run")
    expected = [*cart_pole.records, *other.records]
    assert len(records) == len(expected)
    assert cart_pole.records[0].frames != other.records[0].frames
    for number in [*range(len(expected)), 0, len(expected) - 1]:
        taken = records.take(number)
        assert encode(taken.trajectory) == [bytes(frame) for frame in expected[number].frames]
    with pytest.raises(IndexError):
        records.take(len(expected))


def test_rising_numbers_cost_one_pass(
    tmp_path: Path, cart_pole: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, policy = opened(learning_from(cart_pole), tmp_path)
    begun: list[int] = []

    def counted(directory: Path, start: int = 0) -> Iterator[Record]:
        begun.append(start)
        return read(directory, start)

    monkeypatch.setattr(records_module, "read", counted)
    source = Recorded(records, policy, 0, 1, made=0)
    for _ in range(2 * len(records)):
        source.make(0)
    assert begun == [cart_pole.records[0].position] * 2


def test_a_run_that_learned_from_records_can_be_learned_from(tmp_path: Path, cart_pole: Source) -> None:
    """And in a real actor's hands the unrolls arrive as they were, said to be recorded."""
    config = learning_from(cart_pole)
    with bench(tmp_path / "second", *_assignments(config)) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.until(4)
        pair.wait(lambda: held.loop.learner.ledger.unrolls(0) >= 6, pair.step_turn)
        pair.stop(child)
        events = [record.header_as(ExperienceAdmitted) for record in held.records("ExperienceAdmitted")]
        assert {event.behaviour for event in events} == {"recorded"}
        assert held.loop.learner.score is None
        assert held.loop.learner.steps_done > 0
        total = len(cart_pole.records)
        for turn, record in enumerate(held.records("ExperienceAdmitted")):
            expected = cart_pole.records[2 * turn % total]
            assert [bytes(frame) for frame in record.frames] == [bytes(frame) for frame in expected.frames]
    records, _ = opened(learning_from(Source(tmp_path / "second", [])), tmp_path / "third")
    assert len(records) == len(events)


def _assignments(config: Config) -> tuple[str, ...]:
    named = ", ".join(config.environment.records)
    return (
        *CART_POLE,
        "simic_trainer.algorithm=BC",
        "environment.behaviour=recorded",
        f"environment.records=[{named}]",
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_policy_with_memory_watches_the_unroll_before(tmp_path: Path, recall: Source) -> None:
    """Whatever network recorded it: here one of another width."""
    config = learning_from(recall, more=(*MEMORY, "simic_trainer.hidden_size=24"))
    records, policy = opened(config, tmp_path)
    assert policy.state_size > 0
    source = Recorded(records, policy, 0, 1, made=0)
    remembered = 0
    before: dict[int, Trajectory] = {}
    for record in recall.records:
        made = source.make(0).trajectory
        assert is_of(made, record, len(encode(made)))
        actor = record.header["actor"]
        earlier = before.get(actor)
        if earlier is None:
            assert not made.initial_state.any(), "nothing was there to be watched"
        else:
            with torch.no_grad():
                state = policy.evaluate(
                    {key: rows[:T] for key, rows in earlier.observations.items()},
                    earlier.episode_start[:T],
                    policy.initial_state(LANES),
                    earlier.actions,
                ).state
            assert torch.equal(made.initial_state, state)
            remembered += bool(state.any())
        before[actor] = made
    assert remembered > 2


def test_what_is_remembered_is_the_same_in_a_later_life(tmp_path: Path, recall: Source) -> None:
    config = learning_from(recall, more=MEMORY)
    records, policy = opened(config, tmp_path)
    straight = Recorded(records, policy, 1, 3, made=0)
    whole = [encode(straight.make(0).trajectory) for _ in range(6)]
    for made in range(6):
        again, _ = opened(config, tmp_path)
        assert encode(Recorded(again, policy, 1, 3, made=made).make(0).trajectory) == whole[made]


def _has_unrolls(held: Bench, unrolls: int) -> bool:
    return held.loop.learner.ledger.unrolls(0) >= unrolls


def test_an_unroll_that_does_not_follow_the_one_before_begins_without_memory(
    tmp_path: Path, recall: Source
) -> None:
    """Two lives of an asynchronous actor: the second begins new episodes."""
    directory = tmp_path / "lives"
    with bench(directory, *MEMORY) as held, control_line() as control:
        pair = Pair(held, control)
        for life in (1, 2):
            child = pair.begin(life)
            unrolls = held.loop.learner.ledger.unrolls(0) + 2
            pair.wait(partial(_has_unrolls, held, unrolls), pair.step_turn)
            pair.stop(child, life)
    journal = directory / "journal" / "learner-0"
    events = [
        record.header_as(ExperienceAdmitted)
        for record in read(journal)
        if record.kind == "ExperienceAdmitted"
    ]
    records, policy = opened(learning_from(Source(directory, []), more=MEMORY), tmp_path / "run")
    source = Recorded(records, policy, 0, 1, made=0)
    for event in events:
        assert bool(source.make(0).trajectory.initial_state.any()) == (event.sequence > 1), event


def test_a_survey_is_work_that_is_told_before_the_actor_is_ready(
    tmp_path: Path, cart_pole: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive takes longer to look through than a child may take to be ready in silence."""
    monkeypatch.setattr(channel, "PROGRESS_INTERVAL_S", 0.0)
    config = learning_from(cart_pole)
    with bench(tmp_path / "second", *_assignments(config)) as held, control_line() as control:
        pair = Pair(held, control)
        child = pair.begin()
        pair.wait(lambda: bool(control.said(Ready)), pair.turn)
        pair.stop(child)
        before = control.heard[: control.heard.index(control.said(Ready)[0])]
    there = sum(1 for _ in read(cart_pole.directory / "journal" / "learner-0"))
    assert there > len(cart_pole.records)
    assert [(said.phase, said.work) for said in before if isinstance(said, Progress)] == [
        (SURVEYING, work) for work in range(1, there + 1)
    ]
    assert len(before) == there
    assert {said.phase for said in control.said(Progress)[there:]} == {""}


# -- what does not serve -----------------------------------------------------------------------------------------------


def refusal(config: Config, run_dir: Path) -> str:
    with pytest.raises(ConfigError, match=r"environment\.records") as caught:
        records_of(config, policy_of(config), run_dir)
    return str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path / 'gone'} is not there" in refusal(
        learning_from(Source(tmp_path / "gone", [])), tmp_path / "run"
    )


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = refusal(learning_from(Source(tmp_path / "empty", [])), tmp_path / "run")
    assert "holds no run with a learner's journal" in words


def test_the_run_itself(tmp_path: Path, cart_pole: Source) -> None:
    assert "is this run itself" in refusal(learning_from(cart_pole), cart_pole.directory)


def test_a_journal_without_experience(tmp_path: Path) -> None:
    with bench(tmp_path / "fresh", *CART_POLE):
        pass
    words = refusal(learning_from(Source(tmp_path / "fresh", [])), tmp_path / "run")
    assert "holds no experience" in words
    assert "name a run that trained" in words


def test_a_journal_that_is_none_of_a_learner(tmp_path: Path) -> None:
    (tmp_path / "odd" / "journal" / "learner-0").mkdir(parents=True)
    assert "does not begin with RunStarted" in refusal(
        learning_from(Source(tmp_path / "odd", [])), tmp_path / "run"
    )


def test_records_of_another_environment(tmp_path: Path, recall: Source) -> None:
    words = refusal(learning_from(recall), tmp_path)
    assert "was recorded in esper_simic/Recall-v0, and environment.id is CartPole-v1" in words
    assert "set environment.id=esper_simic/Recall-v0" in words


def test_records_of_other_shapes(tmp_path: Path, cart_pole: Source) -> None:
    for key, value in (("simic_trainer.unroll_length", 7), ("environment.environments_per_actor", 8)):
        words = refusal(learning_from(cart_pole, more=(*CART_POLE, f"{key}={value}")), tmp_path)
        wanted = T if key.endswith("length") else LANES
        assert f"was recorded with {key} {wanted}, here it is {value}; set {key}={wanted}" in words


def test_records_of_hosts_with_other_slots(tmp_path: Path) -> None:
    small = (
        "environment.max_epochs=6",
        "environment.training_epochs_min=2",
        "environment.train_batches=1",
        "environment.train_batch_size=4",
        "environment.validation_samples=20",
    )
    source = recorded_by(tmp_path / "hosts", *small, unrolls=4)
    words = refusal(learning_from(source, more=(*small, "environment.slots=[r0c0]")), tmp_path / "run")
    assert "was recorded with other observations or actions" in words
    assert "take the environment section of that run" in words
    records, _ = opened(learning_from(source, more=small), tmp_path / "run")
    assert len(records) == len(source.records)


def test_damage_is_told_with_its_place(tmp_path: Path) -> None:
    source = recorded_by(tmp_path / "spoilt", *CART_POLE)
    (segment,) = segment_paths(source.directory / "journal" / "learner-0")
    spoilt = bytearray(segment.read_bytes())
    middle = len(spoilt) // 2
    spoilt[middle : middle + 8] = bytes(8 * [0xAA])
    records, _ = opened(learning_from(source), tmp_path / "run")
    segment.write_bytes(spoilt)
    words = refusal(learning_from(source), tmp_path / "run")
    assert segment.name in words
    with pytest.raises(ConfigError, match=segment.name):
        for number in range(len(records)):
            records.take(number)


def test_records_that_went_away_are_told(tmp_path: Path) -> None:
    source = recorded_by(tmp_path / "short", *CART_POLE)
    records, _ = opened(learning_from(source), tmp_path / "run")
    (segment,) = segment_paths(source.directory / "journal" / "learner-0")
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size // 2])
    with pytest.raises(ConfigError, match="the journal ends before record"):
        records.take(len(records) - 1)


def test_a_run_in_which_somebody_acts_needs_no_records(tmp_path: Path) -> None:
    config = make_config(*WORLDS["choices"])
    policy = policy_of(config)
    assert records_of(config, policy, tmp_path) is None
    welcome = Welcome(learner=1, answers=1, first_episodes=[0] * LANES)
    assert isinstance(source_of(config, policy, 0, tmp_path, welcome, None), Playing)
