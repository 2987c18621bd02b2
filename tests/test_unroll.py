"""Unrolls of a policy in growing hosts: what they hold, and that the lanes' seeds and actions are the whole truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.config import EnvironmentConfig, TrainerConfig
from esper_simic.errors import InvariantViolation
from esper_simic.events import EpisodeFinished
from esper_simic.graphs import OBSERVATION_KEYS
from esper_simic.growing_host.vector import GrowingHostVectorEnv, staggered_cuts
from esper_simic.policies.graph_policy import GraphPolicy, observations_from_numpy
from esper_simic.trajectory import Trajectory, decode, encode, frame_layout
from esper_simic.unroll import ActionChance, UnrollCarry, begin, resimulate, unroll

LANES, LENGTH, HORIZON = 3, 7, 6
SEEDS, FIRST = (11, 12, 13), (0, 4, 9)
CONFIG = EnvironmentConfig(
    max_epochs=HORIZON, training_epochs_min=2, train_batches=1, train_batch_size=4, validation_samples=20
)


def start(
    first: Sequence[int] = FIRST, seeds: Sequence[int] = SEEDS
) -> tuple[GrowingHostVectorEnv, GraphPolicy, UnrollCarry]:
    environment = GrowingHostVectorEnv(len(seeds), CONFIG, gamma=0.99, lane_seeds=seeds, first_episodes=first)
    trainer = TrainerConfig(hidden_size=16)
    policy = GraphPolicy(environment.spec_observation, trainer, np.random.default_rng(0))
    observation, _ = environment.reset(seed=list(seeds))
    return environment, policy, begin(policy, observation, seeds, np.array(first))


@pytest.fixture(scope="module")
def whole() -> tuple[Trajectory, list[EpisodeFinished]]:
    """Two unrolls' worth of steps in one."""
    environment, policy, carry = start()
    return unroll(policy, environment, carry, 2 * LENGTH)


def test_a_trajectory_has_the_frames_that_travel(whole: tuple[Trajectory, list[EpisodeFinished]]) -> None:
    environment, policy, _ = start()
    named = whole[0].tensors()
    layout = frame_layout(environment.spec_observation, 2 * LENGTH, LANES, policy.state_size)
    assert [frame.name for frame in layout] == list(named)
    for frame in layout:
        assert tuple(named[frame.name].shape) == frame.shape, frame.name
        assert named[frame.name].numpy().dtype == frame.dtype, frame.name
    frames = encode(whole[0])
    back = decode(frames, environment.spec_observation, 2 * LENGTH, LANES, policy.state_size)
    assert encode(back) == frames


def test_actions_alone_re_simulate_the_rewards(whole: tuple[Trajectory, list[EpisodeFinished]]) -> None:
    seen = whole[0]
    environment, _, carry = start()
    observation = carry.observation
    assert seen.rewards.any()
    for t in range(2 * LENGTH):
        for key in OBSERVATION_KEYS:
            assert np.array_equal(observation[key], seen.observations[key][t].numpy()), key
        observation, reward, terminated, truncated, infos = environment.step(seen.actions[t].numpy())
        assert np.array_equal(reward.astype(np.float32), seen.rewards[t].numpy())
        assert np.array_equal(terminated | truncated, seen.ended[t].numpy())
        assert infos["action_succeeded"].all()
    for key in OBSERVATION_KEYS:
        assert np.array_equal(observation[key], seen.observations[key][-1].numpy()), key


def test_two_unrolls_are_one_of_twice_the_length(whole: tuple[Trajectory, list[EpisodeFinished]]) -> None:
    environment, policy, carry = start()
    parts, finished = [], []
    for _ in range(2):
        part, ended = unroll(policy, environment, carry, LENGTH)
        parts.append(part)
        finished.extend(ended)
    one, two = parts
    for name in ("actions", "behaviour_log_probs", "rewards", "ended", "truncation_values"):
        joined = torch.cat([getattr(one, name), getattr(two, name)])
        assert torch.equal(joined, getattr(whole[0], name)), name
    for key in OBSERVATION_KEYS:
        joined = torch.cat([one.observations[key][:-1], two.observations[key]])
        assert torch.equal(joined, whole[0].observations[key]), key
        assert torch.equal(one.observations[key][-1], two.observations[key][0]), key
    assert torch.equal(torch.cat([one.episode_start[:-1], two.episode_start]), whole[0].episode_start)
    assert torch.equal(one.initial_state, torch.zeros_like(one.initial_state))
    assert two.initial_state.any()
    assert finished == whole[1]


def test_evaluating_repeats_what_acting_said(whole: tuple[Trajectory, list[EpisodeFinished]]) -> None:
    _, policy, _ = start()
    seen = whole[0]
    with torch.no_grad():
        found = policy.evaluate(
            {key: tensor[:-1] for key, tensor in seen.observations.items()},
            seen.episode_start[:-1],
            seen.initial_state,
            seen.actions,
        )
    assert torch.allclose(found.log_probs, seen.behaviour_log_probs, rtol=0, atol=1e-5)


def literal_episodes() -> list[tuple[int, int, int, bool]]:
    """Step of the end, lane, episode number and whether it was cut, of all episodes within the unroll."""
    ends = []
    for lane, cut in enumerate(staggered_cuts(LANES, HORIZON).tolist()):
        end, number = cut, FIRST[lane]
        ends.append((end, lane, number, cut < HORIZON))
        while end + HORIZON <= 2 * LENGTH:
            end, number = end + HORIZON, number + 1
            ends.append((end, lane, number, False))
    return sorted(ends)


def test_every_episode_is_told_once_when_it_ends(whole: tuple[Trajectory, list[EpisodeFinished]]) -> None:
    seen, finished = whole
    expected = literal_episodes()
    assert [(e.lane, e.number, e.truncated) for e in finished] == [entry[1:] for entry in expected]
    begins = dict.fromkeys(range(LANES), 0)
    for (end, lane, _, _), episode in zip(expected, finished, strict=True):
        assert episode.length == end - begins[lane]
        rewards = seen.rewards[begins[lane] : end, lane].double()
        assert episode.episode_return == pytest.approx(float(rewards.sum()), abs=1e-5)
        assert episode.accuracy is not None
        assert 0 <= episode.accuracy <= 100
        begins[lane] = end
    ended = torch.zeros(2 * LENGTH, LANES, dtype=torch.bool)
    for end, lane, _, _ in expected:
        ended[end - 1, lane] = True
    assert torch.equal(seen.ended, ended)
    assert torch.equal(seen.episode_start, torch.cat([torch.ones(1, LANES, dtype=torch.bool), ended]))


def test_only_cut_episodes_have_a_value_beyond_their_end(
    whole: tuple[Trajectory, list[EpisodeFinished]],
) -> None:
    cut = torch.zeros(2 * LENGTH, LANES, dtype=torch.bool)
    for end, lane, _, truncated in literal_episodes():
        cut[end - 1, lane] = truncated
    assert cut.sum() == 2
    assert torch.equal(whole[0].truncation_values != 0, cut)


def test_the_value_of_a_cut_episode_is_that_of_its_last_observation() -> None:
    environment, policy, carry = start()
    state, observation = carry.state, carry.observation
    seen, _ = unroll(policy, environment, carry, 2)  # lane 0 is cut after its second epoch
    again, _, _ = start()
    chance = torch.zeros(LANES, len(HEADS), dtype=torch.float64)
    infos: dict[str, Any] = {}
    for t in range(2):
        tensors = observations_from_numpy(observation)
        state = policy.act(tensors, seen.episode_start[t], state, chance).state
        observation, _, _, _, infos = again.step(seen.actions[t].numpy())
    last = observations_from_numpy(infos["final_obs"])
    value = policy.act(last, torch.zeros(LANES, dtype=torch.bool), state, chance).values[0]
    # Only the lanes that are cut are asked for a value; a smaller batch may round otherwise.
    assert float(seen.truncation_values[1, 0]) == pytest.approx(float(value), rel=1e-5)
    assert torch.equal(carry.state, state)


def test_a_lane_does_not_depend_on_its_neighbours() -> None:
    environment, policy, carry = start()
    together, _ = unroll(policy, environment, carry, LENGTH)
    # Lane 2 alone: the last lane of any number of lanes is never cut short.
    environment, policy, carry = start(FIRST[2:], SEEDS[2:])
    alone, _ = unroll(policy, environment, carry, LENGTH)
    assert torch.equal(together.actions[:, 2:], alone.actions)
    assert torch.allclose(together.behaviour_log_probs[:, 2:], alone.behaviour_log_probs, rtol=0, atol=1e-4)


def test_an_episode_is_the_same_whatever_was_before_it(
    whole: tuple[Trajectory, list[EpisodeFinished]],
) -> None:
    begins = 2  # lane 0 is cut after two epochs; its next episode is the whole one numbered FIRST + 1
    environment, policy, carry = start([FIRST[0] + 1], SEEDS[:1])
    alone, _ = unroll(policy, environment, carry, HORIZON)
    assert torch.equal(whole[0].actions[begins : begins + HORIZON, 0], alone.actions[:, 0])
    expected = whole[0].rewards[begins : begins + HORIZON, 0]
    assert torch.allclose(alone.rewards[:, 0], expected, rtol=0, atol=1e-4)


def test_chance_is_the_stream_of_lane_and_episode() -> None:
    chance = ActionChance([5, 6], [0, 3], len(HEADS))
    first = [chance.draw(), chance.draw()]
    for lane, (seed, episode) in enumerate([(5, 0), (6, 3)]):
        stream = seeding.generator(seed, episode, "action")
        for drawn in first:
            assert np.array_equal(drawn[lane], stream.random(len(HEADS)))
    chance.begin(1, 4)
    drawn = chance.draw()
    assert np.array_equal(drawn[1], seeding.generator(6, 4, "action").random(len(HEADS)))
    assert not np.array_equal(drawn[0], first[0][0])
    assert ((drawn >= 0) & (drawn < 1)).all()


# Re-simulation

ROUNDS = 4


class Made(NamedTuple):
    """An unroll as it is journaled, and what was told about it."""

    frames: list[bytes]
    state: bytes
    episode_numbers: list[int]
    finished: list[EpisodeFinished]


def act(
    rounds: range, environment: GrowingHostVectorEnv, policy: GraphPolicy, carry: UnrollCarry
) -> Iterator[Made]:
    """Make the unrolls of some rounds, each with the weights of its round."""
    for number in rounds:
        policy.load_state_dict(weights_of(policy, number))
        numbers = carry.episode_numbers.tolist()
        seen, finished = unroll(policy, environment, carry, LENGTH)
        yield Made(encode(seen), carry.state.numpy().tobytes(), numbers, finished)


def weights_of(policy: GraphPolicy, number: int) -> dict[str, Tensor]:
    """Weights that differ from round to round enough to choose otherwise."""
    generator = np.random.default_rng(number)
    fresh = GraphPolicy(policy.spec, TrainerConfig(hidden_size=16), generator).state_dict()
    return {
        name: tensor + torch.from_numpy(0.2 * generator.standard_normal(tensor.shape)).to(tensor.dtype)
        if "normaliser" not in name and tensor.is_floating_point()
        else tensor
        for name, tensor in fresh.items()
    }


def begin_run(seed: int) -> tuple[GrowingHostVectorEnv, GraphPolicy, UnrollCarry]:
    return start((0,) * LANES, [seeding.derive(seed, "actor", 0, lane) for lane in range(LANES)])


def recorded(made: Sequence[Made], policy: GraphPolicy) -> Iterator[tuple[Trajectory, Tensor]]:
    """Read unrolls back from their bytes, as a new life does."""
    for one in made:
        trajectory = decode(one.frames, policy.spec, LENGTH, LANES, policy.state_size)
        state = np.frombuffer(one.state, dtype="<f4").reshape(LANES, policy.state_size).copy()
        yield trajectory, torch.from_numpy(state)


@pytest.fixture(scope="module", params=[0, 1, 2])
def uninterrupted(request: pytest.FixtureRequest) -> tuple[int, list[Made]]:
    """A seed, and the unrolls of a life that nothing ends."""
    seed: int = request.param
    made = list(act(range(ROUNDS), *begin_run(seed)))
    # Otherwise the laws below would speak of little.
    assert {tuple(one.episode_numbers) for one in made} > {(0,) * LANES}, "lanes are in different episodes"
    assert all(episode.number > 0 for episode in made[-1].finished)
    assert len({one.state for one in made}) == ROUNDS
    return seed, made


def test_a_new_life_goes_on_as_if_the_old_one_had_not_ended(uninterrupted: tuple[int, list[Made]]) -> None:
    seed, made = uninterrupted
    for lived in range(ROUNDS + 1):
        environment, policy, carry = begin_run(seed)
        done = list(resimulate(environment, carry, recorded(made[:lived], policy)))
        assert done == list(range(1, lived + 1))
        assert list(act(range(lived, ROUNDS), environment, policy, carry)) == made[lived:], lived


def test_a_life_after_many_short_ones_goes_on_all_the_same(uninterrupted: tuple[int, list[Made]]) -> None:
    seed, made = uninterrupted
    journal: list[Made] = []
    for number in range(ROUNDS):  # each life makes one unroll
        environment, policy, carry = begin_run(seed)
        for _ in resimulate(environment, carry, recorded(journal, policy)):
            pass
        journal.extend(act(range(number, number + 1), environment, policy, carry))
    assert journal == made


def test_re_simulation_ends_with_the_carry_of_the_dead_life() -> None:
    environment, policy, dead = begin_run(0)
    made = list(act(range(2), environment, policy, dead))
    environment, policy, carry = begin_run(0)
    for _ in resimulate(environment, carry, recorded(made, policy)):
        pass
    for key in OBSERVATION_KEYS:
        assert carry.observation[key].dtype == dead.observation[key].dtype
        assert carry.observation[key].tobytes() == dead.observation[key].tobytes(), key
    assert carry.state.numpy().tobytes() == dead.state.numpy().tobytes()
    assert carry.episode_start.tolist() == dead.episode_start.tolist()
    assert carry.episode_numbers.tolist() == dead.episode_numbers.tolist()
    assert carry.chance.draw().tolist() == dead.chance.draw().tolist()


def test_re_simulation_reads_one_unroll_at_a_time() -> None:
    """However long a run was, a new life holds one of its unrolls in memory."""
    environment, policy, carry = begin_run(0)
    made = list(act(range(3), environment, policy, carry))
    environment, policy, carry = begin_run(0)
    given: list[int] = []

    def counted() -> Iterator[tuple[Trajectory, Tensor]]:
        for number, one in enumerate(recorded(made, policy), start=1):
            given.append(number)
            yield one

    for number in resimulate(environment, carry, counted()):
        assert given[-1] == number


@pytest.fixture(scope="module")
def two() -> list[tuple[Trajectory, Tensor]]:
    """Two unrolls as they are read back."""
    environment, policy, carry = begin_run(0)
    return list(recorded(list(act(range(2), environment, policy, carry)), policy))


def changed(tensor: Tensor) -> Tensor:
    """Another last value, smallest possible change."""
    flat = tensor.clone().flatten()
    if tensor.dtype == torch.bool:
        flat[-1] = ~flat[-1]
    elif tensor.is_floating_point():
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    else:
        flat[-1] += 1
    return flat.reshape(tensor.shape)


def fail(unrolls: Sequence[tuple[Trajectory, Tensor]], seed: int = 0) -> str:
    environment, _, carry = begin_run(seed)
    with pytest.raises(InvariantViolation) as caught:
        for _ in resimulate(environment, carry, unrolls):
            pass
    return str(caught.value).split(";")[0]


@pytest.mark.parametrize("key", ["initial_state", "episode_start", "rewards", "ended"])
def test_whatever_is_another_than_recorded_is_named(two: list[tuple[Trajectory, Tensor]], key: str) -> None:
    trajectory, state = two[1]
    damaged = Trajectory.from_tensors({**trajectory.tensors(), key: changed(getattr(trajectory, key))})
    step = {"initial_state": 0, "episode_start": LENGTH}.get(key, LENGTH - 1)
    assert (
        fail([two[0], (damaged, state)])
        == f"re-simulated unroll 2, step {step}: {key} is another than recorded"
    )


@pytest.mark.parametrize("key", OBSERVATION_KEYS)
def test_an_observation_that_is_another_is_named(two: list[tuple[Trajectory, Tensor]], key: str) -> None:
    trajectory, state = two[0]
    observations = dict(trajectory.observations)
    observations[key] = changed(observations[key])
    found = fail([(replace(trajectory, observations=observations), state)])
    assert found == f"re-simulated unroll 1, step {LENGTH}: observations.{key} is another than recorded"


def test_a_zero_of_another_sign_is_another_number(two: list[tuple[Trajectory, Tensor]]) -> None:
    trajectory, state = two[0]
    rewards = trajectory.rewards.clone()
    t, lane = (rewards == 0).nonzero()[0].tolist()
    rewards[t, lane] = -rewards[t, lane]
    assert f"step {t}: rewards" in fail([(replace(trajectory, rewards=rewards), state)])


def test_unrolls_out_of_order_of_another_seed_or_with_another_state_are_found(
    two: list[tuple[Trajectory, Tensor]],
) -> None:
    assert "unroll 1, step 0: initial_state" in fail([two[1]])
    assert "unroll 2, step 0: initial_state" in fail([two[0], two[0]])
    assert "unroll 2, step 0: initial_state" in fail([(two[0][0], changed(two[0][1])), two[1]])
    assert "unroll 1, step " in fail(two, seed=1)
    other = replace(two[0][0], actions=two[1][0].actions)
    assert "unroll 1, step " in fail([(other, two[0][1])])
