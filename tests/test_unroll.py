"""Unrolls of a policy in growing hosts: what they hold, and that the lanes' seeds and actions are the whole truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from esper_simic import seeding
from esper_simic.actions import HEADS
from esper_simic.config import EnvironmentConfig, TrainerConfig
from esper_simic.events import EpisodeFinished
from esper_simic.graphs import OBSERVATION_KEYS
from esper_simic.growing_host.vector import GrowingHostVectorEnv, staggered_cuts
from esper_simic.policies.graph_policy import GraphPolicy, observations_from_numpy
from esper_simic.trajectory import Trajectory, decode, encode, frame_layout
from esper_simic.unroll import ActionChance, UnrollCarry, begin, unroll

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
    for t in range(2):
        tensors = observations_from_numpy(observation)
        chance = torch.zeros(LANES, len(HEADS), dtype=torch.float64)
        state = policy.act(tensors, seen.episode_start[t], state, chance).state
        observation, _, _, _, infos = again.step(seen.actions[t].numpy())
    last = observations_from_numpy(infos["final_obs"])
    value = policy.act(last, torch.zeros(LANES, dtype=torch.bool), state, chance).values[0]
    assert torch.equal(seen.truncation_values[1, 0], value)
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
    chance = ActionChance([5, 6], [0, 3])
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
