"""Gymnasium spaces of one growing host, and the configuration made from `gymnasium.make`'s keywords."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from gymnasium import spaces
from pydantic import ValidationError

from esper_simic.actions import head_sizes
from esper_simic.config import EnvironmentConfig, explained
from esper_simic.errors import ConfigError
from esper_simic.graphs import ObservationSpec
from esper_simic.growing_host.hosts import HOSTS
from esper_simic.growing_host.observation import observation_spec
from esper_simic.growing_host.slots import NO_BLUEPRINT

FEATURE_BOUND: Final = 16.0
"""No feature can exceed it: the largest are `symlog(x) / 7`, below 12.7 for any float32."""


def observation_space(spec: ObservationSpec) -> spaces.Dict:
    """A `Dict` of `Box`es with the shapes and dtypes of `ObservationSpec.shapes`."""
    bounds = {
        "host_mask": (0, 1),
        "slot_mask": (0, 1),
        "action_mask": (0, 1),
        "slot_host": (0, spec.host_nodes - 1),
        "slot_blueprint": (0, NO_BLUEPRINT),
    }
    boxes: dict[str, spaces.Space[Any]] = {}
    for key, (shape, dtype) in spec.shapes().items():
        low, high = bounds.get(key, (-FEATURE_BOUND, FEATURE_BOUND))
        boxes[key] = spaces.Box(low, high, shape, dtype=np.dtype(dtype).type)
    return spaces.Dict(boxes)


def observation_spec_of(config: EnvironmentConfig) -> ObservationSpec:
    """Shapes of the observations that an environment of this configuration gives.

    They do not depend on the task, so whoever folds a journal (a learner, a replay) needs none of its data.
    """
    return observation_spec(HOSTS[config.host].blocks, len(config.slots))


def action_space(slots: int, lanes: int | None = None) -> spaces.MultiDiscrete:
    """One choice per head, in the order of `actions.HEADS`; with `lanes` one such row per lane.

    `batch_space` would make a `Box` of the rows, which cannot be sampled with a mask.
    """
    sizes = np.array(head_sizes(slots))
    return spaces.MultiDiscrete(sizes if lanes is None else np.tile(sizes, (lanes, 1)))


def resolve_config(config: EnvironmentConfig | None, settings: dict[str, Any]) -> EnvironmentConfig:
    """The configuration to obey: the one given, or one made of keywords such as `task="digits"`.

    Raises:
        ConfigError: Both were given, a keyword is unknown, or a value is out of range.
    """
    if config is not None:
        if settings:
            raise ConfigError(
                f"give either a config or keywords, not both: {', '.join(settings)}", "environment"
            )
        return config
    try:
        return EnvironmentConfig(**settings)
    except ValidationError as error:
        raise explained(error, ("environment",)) from None
