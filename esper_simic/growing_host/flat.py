"""The flat observation: one vector per host, for policies that read no graph (MLP, LSTM) and for comparison.

It holds the same numbers as the graph observation, in another form: the 23 global features, then the 31 features of
each slot, in the order of the configuration; host layers are left out. Three slots make 116. The blueprint of each
slot is an index beside it; a policy embeds it (`BLUEPRINT_EMBEDDING_SIZE` numbers a slot, `BLUEPRINT_ROWS` rows, the
last for an empty slot), which makes 12 more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from esper_simic.errors import ContractError
from esper_simic.growing_host.observation import GLOBAL_FEATURES, SLOT_FEATURES
from esper_simic.growing_host.slots import NO_BLUEPRINT

BLUEPRINT_EMBEDDING_SIZE: Final = 4
BLUEPRINT_ROWS: Final = NO_BLUEPRINT + 1

KEPT: Final = ("slot_blueprint", "action_mask")
"""Entries of the graph observation that the flat one keeps as they are."""


def flat_size(slots: int) -> int:
    """Numbers in the vector of a host with so many slots."""
    return GLOBAL_FEATURES + SLOT_FEATURES * slots


def flatten(observation: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The flat form of a graph observation.

    Args:
        observation: `globals` `[..., 23]`, `slot_nodes` `[..., S, 31]`, `slot_blueprint` `[..., S]`, `action_mask`.

    Returns:
        `features` `[..., 23 + 31 S]` float32, `slot_blueprint` and `action_mask` as they were.
    """
    whole, slots = observation["globals"], observation["slot_nodes"]
    features = np.concatenate((whole, slots.reshape(*slots.shape[:-2], -1)), axis=-1)
    return {"features": features, **{key: observation[key] for key in KEPT}}


def flat_space(space: spaces.Space[Any]) -> spaces.Dict:
    """The space of flat observations of an environment with this single observation space.

    Raises:
        ContractError: It is not a growing host's.
    """
    whole = space.get("globals") if isinstance(space, spaces.Dict) else None
    slots = space.get("slot_nodes") if isinstance(space, spaces.Dict) else None
    if (
        not isinstance(space, spaces.Dict)
        or not isinstance(whole, spaces.Box)
        or not isinstance(slots, spaces.Box)
    ):
        raise ContractError(f"a flat observation is made of a growing host's, not of {space}")
    features = spaces.Box(
        low=np.concatenate((whole.low, slots.low.reshape(-1))),
        high=np.concatenate((whole.high, slots.high.reshape(-1))),
        dtype=np.float32,
    )
    return spaces.Dict({"features": features, **{key: space[key] for key in KEPT}})


class FlatObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """One growing host whose observations are flat."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = flat_space(env.observation_space)

    def observation(self, observation: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """See `flatten`."""
        return flatten(observation)


class FlatVectorObservation(VectorWrapper[Any, Any, Any]):
    """Many growing hosts whose observations are flat; the final observations in `infos` are too."""

    def __init__(self, env: gymnasium.vector.VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_observation_space = flat_space(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
        """Begin a fresh episode in every lane."""
        observed, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # it takes lists too
        return flatten(observed), infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[np.generic]], Any, Any, Any, dict[str, Any]]:
        """One host epoch in every lane."""
        observed, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos = infos | {"final_obs": flatten(infos["final_obs"])}
        return flatten(observed), rewards, terminated, truncated, infos
