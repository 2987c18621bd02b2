"""The episode that is shown is one that happened: chosen among what the journal holds, read back to its last reward."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import ContractError
from esper_simic.events import EpisodeFinished, ExperienceAdmitted
from esper_simic.growing_host.lifelines import Layer, Lifeline
from esper_simic.lifecycle import SeedStage
from supervisor.journal import Record, read
from supervisor.report.choice import Choice, chain_to, choose
from supervisor.report.episode import decoded, read_episode, seed_parameters
from supervisor.report.past import LearnerPast, UnrollAt

KEPT = Path(__file__).parents[1] / "replay" / "run" / "journal" / "learner-0"
T, HOST = 5, "rescue"


def ended(
    lane: int = 0, length: int = 12, accuracy: float = 40.0, *, truncated: bool = False
) -> EpisodeFinished:
    return EpisodeFinished(
        lane=lane,
        number=0,
        episode_return=1.0,
        length=length,
        accuracy=accuracy,
        parameters_added=0,
        fossils=0,
        truncated=truncated,
    )


def unroll(sequence: int, *episodes: EpisodeFinished, position: int = -1, incarnation: int = 1) -> UnrollAt:
    at = sequence if position < 0 else position
    return UnrollAt(at, incarnation, sequence, T, 4, episodes)


# Choosing


def test_the_newest_whole_episode_is_chosen_and_of_those_beside_it_the_most_accurate() -> None:
    rows = {
        0: [unroll(1), unroll(2), unroll(3, ended(0, accuracy=99.0), position=30)],
        1: [
            unroll(1),
            unroll(2),
            unroll(3),
            unroll(4, ended(1, accuracy=20.0), ended(2, accuracy=30.0), position=40),
        ],
    }
    found = choose(rows)
    assert found is not None
    assert (found.actor, found.lane) == (1, 2)
    assert found.episode == ended(2, accuracy=30.0)


def test_an_episode_cut_short_is_not_chosen() -> None:
    found = choose({0: [unroll(1), unroll(2), unroll(3, ended(truncated=True))]})
    assert found is not None
    assert found.episode is None, "only one under way is left"


def test_an_episode_with_a_gap_in_it_is_not_chosen() -> None:
    eleven = ended(length=11)

    def chosen(*row: UnrollAt) -> EpisodeFinished | None:
        choice = choose({0: row})
        assert choice is not None
        return choice.episode

    assert chosen(unroll(4), unroll(5), unroll(6, eleven)) == eleven
    assert chosen(unroll(3), unroll(5), unroll(6, eleven)) is None
    other_life = unroll(4, incarnation=1), unroll(5, incarnation=2), unroll(6, eleven, incarnation=2)
    assert chosen(*other_life) is None


def test_a_life_begins_with_fresh_episodes() -> None:
    """Eight epochs may have ended with any step of the second unroll, but nothing was before the first."""
    found = choose({0: [unroll(1), unroll(2, ended(length=8))]})
    assert found is not None
    assert found.episode is not None


def test_no_more_unrolls_are_read_than_an_episode_can_need() -> None:
    found = choose({0: [unroll(n) for n in range(1, 40)] + [unroll(40, ended(length=12))]})
    assert found is not None
    assert [one.sequence for one in found.unrolls] == [37, 38, 39, 40]


def test_of_nothing_nothing_is_chosen() -> None:
    assert choose({}) is None
    assert choose({0: []}) is None


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=12))
def test_a_chain_is_one_life_without_a_gap(steps: list[tuple[int, int]]) -> None:
    row = [unroll(sequence, incarnation=life) for life, sequence in steps]
    for index in range(len(row)):
        chain = chain_to(row, index)
        assert chain[-1] is row[index]
        for before, after in itertools.pairwise(chain):
            assert (before.incarnation, before.sequence + 1) == (after.incarnation, after.sequence)
        first = index + 1 - len(chain)
        if first > 0:
            before, after = row[first - 1], row[first]
            assert (before.incarnation, before.sequence + 1) != (after.incarnation, after.sequence)


# Reading a journal that actors and a learner wrote


@pytest.fixture(scope="module")
def past() -> LearnerPast:
    past = LearnerPast()
    for record in read(KEPT):
        past.take(record)
    past.close()
    return past


def every_choice(past: LearnerPast) -> list[Choice]:
    """Whatever could have been chosen at any time in that run."""
    found = []
    for actor, row in past.unrolls.items():
        for index in range(1, len(row) + 1):
            choice = choose({actor: list(row)[:index]})
            if choice is not None and choice.episode is not None and choice not in found:
                found.append(choice)
    return found


def test_every_episode_is_read_back_to_its_return_and_its_length(past: LearnerPast) -> None:
    choices = every_choice(past)
    assert len(choices) >= 4
    grew = 0
    for choice in choices:
        seen = read_episode(KEPT, choice, HOST)
        episode = choice.episode
        assert episode is not None
        assert len(seen.lifeline.stage) == len(seen.rewards) == episode.length
        assert float(seen.rewards.sum()) == pytest.approx(episode.episode_return, abs=1e-5)
        assert len(seen.lifeline.layers) == 4
        assert seen.lifeline.slot_layer == (0, 1, 2)
        assert (seen.lifeline.stage[0] == 1).all(), "it begins with empty slots"
        grew += bool(seen.lifeline.spans())
    assert grew, "something grew in one of them"


def test_an_episode_under_way_is_read_up_to_the_newest_state(past: LearnerPast) -> None:
    row = list(past.unrolls[0])
    for index in range(1, len(row) + 1):
        chain = chain_to(row, index - 1)
        seen = read_episode(KEPT, Choice(0, 0, chain, None), HOST)
        ending = any(episode.lane == 0 for episode in chain[-1].episodes)
        epochs = len(seen.lifeline.stage)
        assert epochs >= 1
        assert epochs == len(seen.rewards) + 1 or ending


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"length": 7}, "does not begin where its length says"),
        ({"length": 500}, "does not begin where its length says"),
    ],
)
def test_what_does_not_fit_the_journal_is_refused(
    past: LearnerPast, changes: dict[str, int], why: str
) -> None:
    choice = every_choice(past)[-1]
    assert choice.episode is not None
    altered = Choice(
        choice.actor,
        choice.lane,
        choice.unrolls,
        msgspec.structs.replace(choice.episode, **changes),
        choice.ending,
    )
    with pytest.raises(ContractError, match=why):
        read_episode(KEPT, altered, HOST)
    with pytest.raises(ContractError, match="does not end the episode"):
        read_episode(KEPT, Choice(choice.actor, choice.lane, choice.unrolls, choice.episode, ending=9), HOST)


def test_unrolls_that_are_gone_are_missed(past: LearnerPast) -> None:
    choice = every_choice(past)[-1]
    gone = Choice(choice.actor, choice.lane, (*choice.unrolls, unroll(9, position=10_000)), choice.episode)
    with pytest.raises(ContractError, match="does not hold the unrolls"):
        read_episode(KEPT, gone, HOST)


@pytest.mark.parametrize("frames", [(), (memoryview(b""),) * 15, (memoryview(b"x" * 8),) * 15])
def test_frames_of_another_kind_are_refused(frames: tuple[memoryview, ...]) -> None:
    event = ExperienceAdmitted(
        actor=0,
        incarnation=1,
        sequence=1,
        policy_version=0,
        length=T,
        lanes=4,
        episode_numbers=[0] * 4,
        episodes=[],
    )
    with pytest.raises(ContractError):
        decoded(Record(3, 0, "ExperienceAdmitted", msgspec.msgpack.encode(event), frames))


def test_a_frame_more_as_lockstep_has_it_changes_nothing() -> None:
    record = next(one for one in read(KEPT) if one.kind == "ExperienceAdmitted")
    more = Record(
        record.position,
        record.time_ns,
        record.kind,
        record.header_bytes,
        (*record.frames, memoryview(b"state")),
    )
    for name, tensor in decoded(record).tensors().items():
        np.testing.assert_array_equal(tensor.numpy(), decoded(more).tensors()[name].numpy())


def planted(*names: str, compositions: tuple[int, ...]) -> Lifeline:
    """Seeds behind layers of 8 and 16 channels, in turn."""
    slots = len(names)
    return Lifeline(
        layers=(Layer(8, 10, False), Layer(16, 10, False)),
        slot_layer=tuple(slot % 2 for slot in range(slots)),
        stage=np.full((1, slots), SeedStage.TRAINING, dtype=np.int8),
        blueprint=np.array([names]),
        alpha=np.zeros((1, slots)),
        composition=np.array(compositions),
        accuracy=np.zeros(1),
    )


def test_seeds_parameters_are_their_blueprints_and_their_gates() -> None:
    lifeline = planted("norm", "attention", "", "stranger", "norm", compositions=(0, 0, 0, 0, 2))
    gate = 8 * 8 + 2 * 8 + 1
    assert seed_parameters(lifeline, "rescue") == (17, 144, 0, None, 17 + gate)


def test_what_is_not_known_here_is_shown_without_its_parameters() -> None:
    lifeline = planted("norm", "lora", compositions=(0, 0))
    assert seed_parameters(lifeline, "stranger") == (None, None)
    assert seed_parameters(lifeline, "rescue") == (17, None), "no image takes it"


def test_parameters_add_up_to_what_the_journal_says_was_added(past: LearnerPast) -> None:
    """Of episodes in which nothing changed with the last epoch."""
    agreed = 0
    for choice in every_choice(past):
        seen = read_episode(KEPT, choice, HOST)
        blended = np.isin(
            seen.lifeline.stage[-1], [SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED]
        )
        counted = sum(p or 0 for p, is_in in zip(seen.seed_parameters, blended, strict=True) if is_in)
        assert choice.episode is not None
        agreed += counted == choice.episode.parameters_added
    assert agreed >= len(every_choice(past)) / 2
