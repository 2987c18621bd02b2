"""The running deviation of discounted returns against a slow literal computation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.reward_scale import RewardScale

GAMMA = 0.9
ALL = torch.ones(3, dtype=torch.bool)
NONE = ~ALL


def literal(rewards: np.ndarray, ended: np.ndarray) -> list[float]:
    followed = []
    for lane in range(rewards.shape[1]):
        value = 0.0
        for reward, end in zip(rewards[:, lane], ended[:, lane], strict=True):
            value = float(reward) + GAMMA * value
            followed.append(value)
            if end:
                value = 0.0
    return followed


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_any_cut_into_unrolls_gives_the_deviation_of_all_returns(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    rewards = rng.normal(1, 3, (total, 3)).astype(np.float32)
    ended = rng.random((total, 3)) < 0.2
    scale = RewardScale(GAMMA)
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        begins = torch.from_numpy(ended[start - 1]) if start else ALL
        scale.update(0, begins, torch.from_numpy(rewards[piece]), torch.from_numpy(ended[piece]))
        start += length
    assert scale.deviation == pytest.approx(np.std(literal(rewards, ended)), rel=1e-9)


def test_actors_are_followed_apart_and_a_lane_that_begins_an_episode_starts_over() -> None:
    ones, never = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    scale = RewardScale(GAMMA)
    scale.update(0, ALL, ones, never)
    scale.update(1, ALL, ones, never)
    scale.update(0, NONE, ones, never)
    scale.update(0, torch.tensor([True, False, True]), ones, never)
    afresh, onward, further = [1, 1.9], [2.71, 3.439], [4.0951, 4.68559]
    followed = [*afresh * 3, *afresh * 3, *onward * 3, *afresh * 2, *further]
    assert scale.deviation == pytest.approx(np.std(followed))


def test_a_new_life_begins_its_episodes_anew_whatever_its_predecessor_left() -> None:
    """Killed in the middle of an episode: what it had gathered does not leak into the next life's."""
    ones, never = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    scale = RewardScale(GAMMA)
    scale.update(0, ALL, ones, never)
    scale.update(0, ALL, ones, never)
    assert scale.deviation == pytest.approx(np.std([1, 1.9, 1, 1.9]))


def test_nothing_seen_scales_by_one_and_clips() -> None:
    assert RewardScale(GAMMA).scale(torch.tensor([3.0, -30.0]), 10.0).tolist() == [3.0, -10.0]


def test_constant_returns_do_not_divide_by_zero() -> None:
    scale = RewardScale(GAMMA)
    scale.update(0, ALL, torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool))
    assert torch.isfinite(scale.scale(torch.ones(1), 10.0)).all()


def test_state_goes_on_exactly() -> None:
    rng = np.random.default_rng(0)
    pieces = [
        (
            torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)),
            torch.from_numpy(rng.random((4, 3)) < 0.3),
        )
        for _ in range(4)
    ]
    whole, resumed = RewardScale(GAMMA), RewardScale(GAMMA)
    for index, (rewards, ended) in enumerate(pieces):
        whole.update(index % 2, NONE if index > 1 else ALL, rewards, ended)
        if index == 2:
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    resumed.update(1, NONE, *pieces[3])
    assert resumed.state_dict() == whole.state_dict()
