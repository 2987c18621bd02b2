"""A small world that misbehaves on demand, as a package would bring it: `tests.prove.unruly:Unruly-v0`.

Three numbers are seen; the action should be the sign of the first. Every lane counts its steps over all of its
episodes, and at the steps that its keywords name the last number that is seen, or the reward, is another. So what an
update meets, and when, is a function of the configuration: a gradient that explodes, a loss that overflows, one that
rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete

Array = npt.NDArray[Any]

EPISODE_STEPS = 6


class Unruly(gymnasium.Env[Array, np.int64]):
    """One lane.

    Args:
        shocks: What is seen instead of a small number, by the step (as text) at which it is.
        broken_from: Step from which on nothing else is seen than `broken_by`.
        broken_by: That.
        swell: First and last step between which the numbers grow, and how many times as large they become.
        pays: What is paid instead of 0 or 1, as text too, by the step that it is for.
    """

    def __init__(
        self,
        shocks: Mapping[str, float] | None = None,
        broken_from: int | None = None,
        broken_by: float = 0.0,
        swell: tuple[int, int, float] | None = None,
        pays: Mapping[str, str] | None = None,
    ) -> None:
        self.observation_space = Box(-np.inf, np.inf, (3,), dtype=np.float32)
        self.action_space = Discrete(2)
        self._shocks = {int(step): float(value) for step, value in (shocks or {}).items()}
        self._pays = {int(step): float(value) for step, value in (pays or {}).items()}
        self._broken_from, self._broken_by, self._swell = broken_from, float(broken_by), swell
        self._steps = self._in_episode = 0
        self._seen = np.zeros(3, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self._in_episode = 0
        return self._look(), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        paid = float(action == int(self._seen[0] > 0))
        self._steps += 1
        self._in_episode += 1
        paid = self._pays.get(self._steps, paid)
        return self._look(), paid, self._in_episode == EPISODE_STEPS, False, {}

    def _look(self) -> Array:
        self._seen = (self.np_random.normal(size=3) * self._scale()).astype(np.float32)
        if self._broken_from is not None and self._steps >= self._broken_from:
            self._seen[2] = self._broken_by
        elif self._steps in self._shocks:
            self._seen[2] = self._shocks[self._steps]
        return self._seen.copy()

    def _scale(self) -> float:
        if self._swell is None:
            return 1.0
        first, last, most = self._swell
        if not first <= self._steps < last:
            return 1.0
        return 1.0 + (most - 1.0) * (self._steps - first) / (last - first)


gymnasium.register("Unruly-v0", entry_point="tests.prove.unruly:Unruly")
