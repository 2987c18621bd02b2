"""Gymnasium spaces as what policies know: vectors of numbers, and actions of choices or of real numbers.

| observation space | features |
|---|---|
| `Box`, any shape | its numbers, flattened |
| `Discrete(n)` | n, one of them 1 |
| `MultiDiscrete` | of each component as of a `Discrete`, one behind the other |
| `MultiBinary` | its bits, flattened |
| `Dict` of `observation`, one of these, and `action_mask` | the observation's; the mask stands beside the vector |

An `action_mask` is a `MultiBinary` or a `Box` with one entry for each choice of the action's heads, head after head: 1
where it is legal, else 0.

| action space | action of a policy |
|---|---|
| `Discrete(n)` | `Choices`, one head of n |
| `MultiDiscrete` | `Choices`, one head a component |
| `MultiBinary` | `Choices`, one head of 2 a bit |
| `Box` of floats | `Continuous`, one dimension a number |

A policy's real number a becomes `low + (clip(a, -1, 1) + 1) / 2 * (high - low)` where both ends are finite, and
`clip(a, low, high)` where one or none is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from esper_simic.errors import ConfigError
from esper_simic.specs import ActionSpec, Choices, Continuous

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FEATURES_MAX: Final = 65_536
"""Most features of an observation: what a record in the journal can reasonably hold of each step."""

CHOICES_MAX: Final = 65_536
"""Most choices of all heads together."""

OBSERVATION: Final = "observation"
ACTION_MASK: Final = "action_mask"


class ObservationForm:
    """How observations of a space become vectors.

    Args:
        space: Of one environment.
        name: Of the environment, for what is said of it.

    Attributes:
        features: Numbers of an observation without its mask.
        mask_size: Entries of its mask; 0 where there is none.

    Raises:
        ConfigError: No vector is made of such a space, or one beyond `FEATURES_MAX`.
    """

    def __init__(self, space: spaces.Space[Any], name: str) -> None:
        self._encode: Callable[[Any], Floats]
        self.features: int
        self.mask_size = 0
        match space:
            case spaces.Dict() if set(space) == {OBSERVATION, ACTION_MASK}:
                inner = ObservationForm(space[OBSERVATION], name)
                self.features, self.mask_size = inner.features, int(np.prod(space[ACTION_MASK].shape or ()))
                self._encode = _beside_mask(inner)
            case spaces.Box():
                self.features = int(np.prod(space.shape))
                self._encode = _wide_numbers if space.dtype == np.float64 else _numbers
            case spaces.MultiBinary():
                self.features, self._encode = int(np.prod(space.shape)), _numbers
            case spaces.Discrete():
                self.features = int(space.n)
                self._encode = _one_hot(np.array([space.n]), np.array([space.start]))
            case spaces.MultiDiscrete():
                self.features = int(space.nvec.sum())
                self._encode = _one_hot(space.nvec.reshape(-1), space.start.reshape(-1))
            case _:
                raise ConfigError(
                    f"{name} is observed as {space}, of which no vector is made; register an id that wraps it in "
                    f"gymnasium.wrappers.FlattenObservation, so that its space is a Box",
                    "environment.id",
                )
        if not 1 <= self.features <= FEATURES_MAX:
            raise ConfigError(
                f"{name} is observed as {space}, which makes {self.features} features; from 1 to {FEATURES_MAX} can "
                f"be taken: register an id that wraps it in an observation wrapper which makes it smaller",
                "environment.id",
            )

    def vectors(self, observations: Any) -> Floats:
        """Observations of E environments, `[E, …]`, as `[E, features + mask_size]`, in memory of their own.

        Numbers too large for float32 become infinite.
        """
        return self._encode(observations)

    def named(self, vectors: Floats) -> dict[str, Array]:
        """What `vectors` made, in the form of `VectorSpec`: `vector`, and `action_mask` where there is one."""
        if not self.mask_size:
            return {"vector": vectors}
        return {
            "vector": vectors[:, : self.features],
            ACTION_MASK: vectors[:, self.features :].astype(np.int8),
        }


class ActionForm:
    """How a policy's actions become those of a space.

    Args:
        space: Of one environment.
        name: Of the environment, for what is said of it.

    Attributes:
        spec: What an action of the policy is.

    Raises:
        ConfigError: No policy acts in such a space.
    """

    def __init__(self, space: spaces.Space[Any], name: str) -> None:
        self.spec: ActionSpec
        match space:
            case spaces.Discrete():
                self.spec = Choices(("action",), (int(space.n),))
                self._decode = _one_choice(space)
            case spaces.MultiDiscrete():
                self.spec = _many_choices(space.nvec.reshape(-1).tolist())
                self._decode = _reshaped(space, space.start)
            case spaces.MultiBinary():
                self.spec = _many_choices([2] * int(np.prod(space.shape)))
                self._decode = _reshaped(space, np.zeros(space.shape, dtype=np.int64))
            case spaces.Box() if np.issubdtype(space.dtype, np.floating) and space.low.size > 0:
                self.spec = Continuous(
                    tuple(space.low.reshape(-1).tolist()), tuple(space.high.reshape(-1).tolist())
                )
                self._decode = _scaled(space)
            case _:
                raise ConfigError(
                    f"{name} takes actions of {space}; a policy acts in Discrete, MultiDiscrete, MultiBinary and Box "
                    f"spaces (of floats): register an id that wraps it in gymnasium.wrappers.TransformAction",
                    "environment.id",
                )
        if isinstance(self.spec, Choices) and not 1 <= sum(self.spec.sizes) <= CHOICES_MAX:
            raise ConfigError(
                f"{name} takes actions of {space}, which are {sum(self.spec.sizes)} choices; from 1 to {CHOICES_MAX} "
                f"can be offered",
                "environment.id",
            )

    def native(self, actions: Array) -> Array:
        """Actions of E lanes, `[E, …]` as `spec` says, as a batch of the space."""
        return self._decode(actions)


def _numbers(observations: Array) -> Floats:
    return observations.reshape(len(observations), -1).astype(np.float32)


def _wide_numbers(observations: Array) -> Floats:
    # What overflows is found, and said of which environment, where the vectors are used.
    with np.errstate(over="ignore"):
        return _numbers(observations)


def _beside_mask(inner: ObservationForm) -> Callable[[Any], Floats]:
    def encode(observations: Any) -> Floats:
        mask = np.asarray(observations[ACTION_MASK], dtype=np.float32)
        return np.concatenate((inner.vectors(observations[OBSERVATION]), mask.reshape(len(mask), -1)), axis=1)

    return encode


def _one_hot(sizes: Array, start: Array) -> Callable[[Array], Floats]:
    width = int(sizes.sum())
    # Position of value v of component i: sizes before it, plus v, minus what its values start with.
    offsets = (np.cumsum(sizes) - sizes - start).astype(np.int64)

    def encode(observations: Array) -> Floats:
        lanes = len(observations)
        hot = np.zeros((lanes, width), dtype=np.float32)
        hot[np.arange(lanes)[:, None], observations.reshape(lanes, -1) + offsets] = 1
        return hot

    return encode


def _many_choices(sizes: list[int]) -> Choices:
    return Choices(tuple(f"action_{index}" for index in range(len(sizes))), tuple(sizes))


def _one_choice(space: spaces.Discrete) -> Callable[[Array], Array]:
    start, dtype = int(space.start), space.dtype

    def decode(actions: Array) -> Array:
        return (actions[:, 0] + start).astype(dtype)

    return decode


def _reshaped(space: spaces.Space[Any], start: Array) -> Callable[[Array], Array]:
    shape, dtype = start.shape, space.dtype

    def decode(actions: Array) -> Array:
        return (actions.reshape(-1, *shape) + start).astype(dtype)

    return decode


def _scaled(space: spaces.Box) -> Callable[[Array], Array]:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        width = high - low
    # A box as wide as float32 itself (some environments write "unbounded" so) has no scale to map to.
    between = np.isfinite(width) & (width < np.finfo(np.float32).max)
    base, span = np.where(between, low, 0), np.where(between, width, 0)

    def decode(actions: Array) -> Array:
        numbers = actions.reshape(-1, *space.shape).astype(np.float64)
        mapped = base + (np.clip(numbers, -1, 1) + 1) / 2 * span
        # The ends themselves, rounded to the space's type, may lie beyond it by a last bit.
        return np.clip(np.where(between, mapped, numbers), low, high).astype(space.dtype)

    return decode
