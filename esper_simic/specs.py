"""What one experience is made of: the arrays of an observation, and an action.

Trajectories, buffers and journals know nothing of an environment but its `ExperienceSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from esper_simic.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """An action made of one choice per head: `[heads]` int64, the choice of head h in [0, sizes[h]).

    A Gymnasium `Discrete` is one head, a `MultiDiscrete` one a component.
    """

    heads: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.sizes) or not self.heads or min(self.sizes) < 1:
            raise ValueError(f"each head needs a name and at least one choice: {self.heads}, {self.sizes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one action."""
        return (len(self.heads),)

    @property
    def dtype(self) -> str:
        """Of one action."""
        return "int64"

    @property
    def chance(self) -> int:
        """Uniform numbers that one action takes."""
        return len(self.heads)


@dataclass(frozen=True, slots=True)
class Continuous:
    """An action of real numbers, `[dimensions]` float32, as the policy draws them: unbounded, around 0.

    The environment's side brings them into [low, high] (`worlds`); what the policy drew is what is kept.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(f"each dimension needs a low and a high end: {self.low}, {self.high}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one action."""
        return (len(self.low),)

    @property
    def dtype(self) -> str:
        """Of one action."""
        return "float32"

    @property
    def chance(self) -> int:
        """Uniform numbers that one action takes."""
        return len(self.low)

    @property
    def is_bounded(self) -> bool:
        """Whether every dimension has two finite ends."""
        return all(math.isfinite(end) for end in (*self.low, *self.high))


ActionSpec = Choices | Continuous


class ExperienceSpec(Protocol):
    """Shapes of observations and actions; `ObservationSpec` of graphs and `VectorSpec` are such."""

    @property
    def action(self) -> ActionSpec:
        """What an action is."""

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of each array of an observation by key, in the order in which they travel."""

    def bounds(self) -> Mapping[str, Array]:
        """Exclusive upper bounds of arrays of indices and flags by key, each to be broadcast over its array."""

    def present(self, observations: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Which rows of arrays of numbers stand for something, by key: 1 there, 0 for padding.

        Args:
            observations: Each with any leading dimensions.

        Returns:
            In the array's dtype, of its shape without the last dimension; nothing for arrays without padding.
        """

    def check(self, observations: Mapping[str, Tensor]) -> None:
        """Refuse what passes shapes and bounds and still is no observation, such as a mask without a legal choice.

        Args:
            observations: Each with any leading dimensions.

        Raises:
            ContractError: Naming it.
        """


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """Observations that are one vector of numbers, and a mask where some choices may be illegal.

    | key | shape | dtype | meaning |
    |---|---|---|---|
    | `vector` | `[features]` | float32 | |
    | `action_mask` | `[sum(action.sizes)]` | int8 | where `masked`: 1 for each legal choice, head after head |

    Attributes:
        features: Length of the vector.
        action: What an action is.
        masked: Whether there is a mask; the action is `Choices` then.
    """

    features: int
    action: ActionSpec
    masked: bool = False

    def __post_init__(self) -> None:
        if self.masked and not isinstance(self.action, Choices):
            raise ValueError(f"only choices can be masked, not {self.action}")

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `ExperienceSpec`."""
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"vector": ((self.features,), "float32")}
        if self.masked and isinstance(self.action, Choices):
            shapes["action_mask"] = ((sum(self.action.sizes),), "int8")
        return shapes

    def bounds(self) -> Mapping[str, Array]:
        """See `ExperienceSpec`: there are no indices, and a mask is made of flags."""
        return {"action_mask": np.array(2)} if self.masked else {}

    def present(self, observations: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `ExperienceSpec`: there is no padding."""
        return {}

    def check(self, observations: Mapping[str, Tensor]) -> None:
        """See `ExperienceSpec`: every vector of finite numbers is an observation; a mask leaves each head a choice."""
        if self.masked and isinstance(self.action, Choices):
            mask, start = observations["action_mask"].bool(), 0
            for head, size in zip(self.action.heads, self.action.sizes, strict=True):
                if not bool(mask[..., start : start + size].any(dim=-1).all()):
                    raise ContractError(f"an action mask leaves no legal choice of {head}")
                start += size


def action_bounds(action: ActionSpec) -> Array | None:
    """Exclusive upper bounds of an action's choices, `[heads]`; None for numbers."""
    return np.array(action.sizes) if isinstance(action, Choices) else None


Shapes = Mapping[str, tuple[tuple[int, ...], str]]


def check_shapes(shapes: Shapes, observations: Mapping[str, Tensor], lead: tuple[int, ...]) -> None:
    """Refuse observations that are not `[*lead, …]`; tensors of other sizes might only be broadcast in silence.

    Args:
        shapes: As `ExperienceSpec.shapes` gives them.
        observations: To be checked; further keys do not matter.
        lead: Their leading dimensions.

    Raises:
        ValueError: A key is missing or has another shape; the message names it.
    """
    for key, (shape, _) in shapes.items():
        if key not in observations:
            raise ValueError(f"observations lack {key}")
        if observations[key].shape != (*lead, *shape):
            found = list(observations[key].shape)
            raise ValueError(f"observations.{key} must be {[*lead, *shape]}, it is {found}")
