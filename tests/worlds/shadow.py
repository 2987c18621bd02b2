"""The slow truth beside lanes: one plain environment an episode, made by Gymnasium, flattened by Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import flatten

from esper_simic import seeding
from esper_simic.specs import Choices


def random_actions(action, lanes: int, rng: np.random.Generator) -> np.ndarray:
    """Actions a policy might give: choices, or numbers beyond the ends of what an environment takes."""
    if isinstance(action, Choices):
        return rng.integers(np.array(action.sizes), size=(lanes, len(action.sizes)))
    return rng.normal(0, 1.2, size=(lanes, *action.shape)).astype(np.float32)


class Shadow:
    """One lane, step by step."""

    def __init__(self, name: str, kwargs: dict[str, Any], lane_seed: int, first_episode: int) -> None:
        self.env = gymnasium.make(name, **kwargs)
        self.lane_seed, self.episode = lane_seed, first_episode
        self.length, self.total = 0, 0.0

    def reset(self) -> np.ndarray:
        seed = seeding.derive(self.lane_seed, self.episode) // 2**32
        observed, _ = self.env.reset(seed=seed)
        self.episode += 1
        self.length, self.total = 0, 0.0
        return self.flat(observed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        observed, reward, terminated, truncated, _ = self.env.step(self.native(action))
        self.length += 1
        self.total += float(reward)
        return self.flat(observed), float(reward), bool(terminated), bool(truncated)

    def flat(self, observed: Any) -> np.ndarray:
        return np.asarray(flatten(self.env.observation_space, observed)).astype(np.float32)

    def native(self, action: np.ndarray) -> Any:
        space = self.env.action_space
        if isinstance(space, gymnasium.spaces.Discrete):
            return int(action[0]) + int(space.start)
        if isinstance(space, gymnasium.spaces.Box):
            share = (np.clip(action.astype(np.float64), -1, 1) + 1) / 2
            return (space.low + share * (space.high.astype(np.float64) - space.low)).astype(space.dtype)
        return action.astype(space.dtype)
