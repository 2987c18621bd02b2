"""The running deviation of discounted returns against a slow literal computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.reward_scale import RewardScale

GAMMA = 0.9


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
        scale.update(0, 1, torch.from_numpy(rewards[piece]), torch.from_numpy(ended[piece]))
        start += length
    assert scale.deviation == pytest.approx(np.std(literal(rewards, ended)), rel=1e-9)


def test_actors_are_followed_apart_and_a_new_incarnation_starts_over() -> None:
    ones, never = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    scale = RewardScale(GAMMA)
    scale.update(0, 1, ones, never)
    scale.update(1, 1, ones, never)
    scale.update(0, 1, ones, never)
    scale.update(0, 2, ones, never)
    followed = [1, 1.9, 1, 1.9, 2.71, 3.439, 1, 1.9]
    assert scale.deviation == pytest.approx(np.std(followed))


def test_nothing_seen_scales_by_one_and_clips() -> None:
    assert RewardScale(GAMMA).scale(torch.tensor([3.0, -30.0]), 10.0).tolist() == [3.0, -10.0]


def test_constant_returns_do_not_divide_by_zero() -> None:
    scale = RewardScale(GAMMA)
    scale.update(0, 1, torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool))
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
        whole.update(index % 2, 1, rewards, ended)
        if index == 2:
            resumed.load_state_dict(whole.state_dict())
    resumed.update(1, 1, *pieces[3])
    assert resumed.state_dict() == whole.state_dict()
