"""The scale of rewards: the running deviation of the discounted return.

Every lane's discounted return `G_t = r_t + gamma * G_{t-1}` (from 0 at an episode's start) is followed as its
experience arrives; rewards are divided by the standard deviation of all G seen so far, without taking off a mean, and
clipped. Part of the learner's fold.

Source: Engstrom et al., Implementation Matters in Deep Policy Gradients (2020), section 3, reward scaling.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

DEVIATION_MIN: Final = 1e-4


class RewardScale:
    """Running deviation of discounted returns over all actors' lanes."""

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        self._returns: dict[int, Array] = {}
        self._count = 0
        self._mean = 0.0
        self._sum_squares = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the discounted returns; 1 before the second one."""
        if self._count < 2:
            return 1.0
        return max(float(np.sqrt(self._sum_squares / self._count)), DEVIATION_MIN)

    def update(self, actor: int, begins: Tensor, rewards: Tensor, ended: Tensor) -> None:
        """Follow one unroll.

        Args:
            actor: Index of the actor; its lanes' returns go on from its last unroll.
            begins: `[B]` bool; lanes that begin an episode with the unroll's first step, whatever was before.
            rewards: `[T, B]`.
            ended: `[T, B]` bool.
        """
        lanes = rewards.shape[1]
        before = self._returns.get(actor, np.zeros(lanes, dtype=np.float64))
        current = np.where(begins.numpy(), 0.0, before)
        values = rewards.numpy().astype(np.float64)
        ends = ended.numpy()
        followed = np.empty_like(values)
        for step, (row, end) in enumerate(zip(values, ends, strict=True)):
            current = row + self._gamma * current
            followed[step] = current
            current = np.where(end, 0.0, current)
        self._returns[actor] = current
        self._merge(followed)

    def scale(self, rewards: Tensor, clip: float) -> Tensor:
        """`clamp(rewards / deviation, -clip, clip)`."""
        return torch.clamp(rewards / self.deviation, -clip, clip)

    def _merge(self, values: Array) -> None:
        """Chan, Golub and LeVeque (1979): merge the moments of a batch into the running ones."""
        count, mean = values.size, float(values.mean())
        sum_squares = float(((values - mean) ** 2).sum())
        total = self._count + count
        delta = mean - self._mean
        self._sum_squares += sum_squares + delta * delta * self._count * count / total
        self._mean += delta * count / total
        self._count = total

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs; numbers and lists only."""
        return {
            "count": self._count,
            "mean": self._mean,
            "sum_squares": self._sum_squares,
            "returns": {str(actor): returns.tolist() for actor, returns in sorted(self._returns.items())},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._count, self._mean = state["count"], state["mean"]
        self._sum_squares = state["sum_squares"]
        self._returns = {
            int(actor): np.array(returns, dtype=np.float64) for actor, returns in state["returns"].items()
        }
