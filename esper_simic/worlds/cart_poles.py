"""Gymnasium's CartPole, all lanes one computation, with episodes that begin when and as they are told to.

`CartPoleVectorEnv` resets an ended lane in the next step, and swallows that step's action. Here whoever steps begins an
ended lane's next episode himself (`reset(options={"reset_mask": …})`), each with its own seed. Everything that this
needs is in three public arrays of the class: `state` `[4, E]`, `steps` `[E]` and `prev_done` `[E]`. An episode begins
in the very state in which the plain `CartPoleEnv`, reset with that seed, begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

Array = npt.NDArray[Any]

START_BOUND: Final = 0.05
"""Every number of a first state lies within it, as in `CartPoleEnv.reset`."""


class CartPoles(CartPoleVectorEnv):
    """E poles without autoreset; see the module. Whoever steps one that has ended gets what the parent gives."""

    metadata: dict[str, Any] = {  # noqa: RUF012 - as Gymnasium declares it
        **CartPoleVectorEnv.metadata,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    state: Array  # type: ignore[assignment]  # the parent's is None before its first reset
    steps: Array
    prev_done: Array

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every lane, or in those of `options["reset_mask"]`.

        Args:
            seed: Lane i gets `seed + i`, or the i-th of a sequence; lanes without one draw from a stream of all.
            options: `reset_mask` `[E]` bool.
        """
        mask = (options or {}).get("reset_mask")
        if mask is None:
            super().reset(seed=seed if isinstance(seed, int) else None)
            mask = np.ones(self.num_envs, dtype=bool)
        seeds = [seed + lane for lane in range(self.num_envs)] if isinstance(seed, int) else seed
        for lane in np.flatnonzero(mask).tolist():
            own = None if seeds is None else seeds[lane]
            stream = self.np_random if own is None else seeding.np_random(own)[0]
            self.state[:, lane] = stream.uniform(-START_BOUND, START_BOUND, size=4)
        self.steps[mask] = 0
        self.prev_done[mask] = False  # or the parent would begin them anew in the next step
        return self.state.T.astype(np.float32), {}
