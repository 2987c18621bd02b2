"""What actors send and the learner learns from: unrolls of many lanes, `[T, B]`.

One *experience* is one unroll of one environment lane, `[T, 1]`, with the recurrent state at its start; an actor sends
the unrolls of all its lanes as one `Trajectory`. Observations and episode starts have T + 1 rows: the last one is
where the bootstrap value is taken.

On the wire and in the journal a trajectory is a list of raw little-endian arrays in the order of `frame_layout`; the
bytes that came off the wire are the bytes that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic.errors import ContractError
from esper_simic.specs import ExperienceSpec, action_bounds

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Unrolls of B lanes over T steps.

    Attributes:
        observations: Each `[T + 1, B, …]`, with keys, their order and dtypes as in `ExperienceSpec.shapes`.
        episode_start: `[T + 1, B]` bool; true where the observation begins an episode, so that the recurrent state
            is cleared before it.
        initial_state: `[B, state]` float32, the recurrent state before the first observation.
        actions: `[T, B, heads]` int64 or `[T, B, dimensions]` float32, as the spec's action is.
        behaviour_log_probs: `[T, B]` float32, of the policy that acted, over the causally relevant heads.
        rewards: `[T, B]` float32, as the environment gave them.
        ended: `[T, B]` bool; the episode ended with this step, by its horizon or from outside.
        truncation_values: `[T, B]` float32; where an episode was cut from outside, the value that the acting policy
            gave its last observation (in units of the scaled reward), else 0.
    """

    observations: Mapping[str, Tensor]
    episode_start: Tensor
    initial_state: Tensor
    actions: Tensor
    behaviour_log_probs: Tensor
    rewards: Tensor
    ended: Tensor
    truncation_values: Tensor

    @property
    def length(self) -> int:
        """T."""
        return int(self.actions.shape[0])

    @property
    def lanes(self) -> int:
        """B."""
        return int(self.actions.shape[1])

    def of_lanes(self, lanes: Tensor) -> Trajectory:
        """Some lanes of it `[b]` int64, in that order, with all their steps."""
        return Trajectory(
            observations={key: tensor[:, lanes] for key, tensor in self.observations.items()},
            episode_start=self.episode_start[:, lanes],
            initial_state=self.initial_state[lanes],
            actions=self.actions[:, lanes],
            behaviour_log_probs=self.behaviour_log_probs[:, lanes],
            rewards=self.rewards[:, lanes],
            ended=self.ended[:, lanes],
            truncation_values=self.truncation_values[:, lanes],
        )

    def beginning_with(self, state: Tensor) -> Trajectory:
        """The same with another recurrent state `[B, state]` before the first observation."""
        return replace(self, initial_state=state)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, observations under `observations.<key>`, in the order of `frame_layout`."""
        named = {f"{_OBSERVATIONS}{key}": tensor for key, tensor in self.observations.items()}
        named |= {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return named

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> Trajectory:
        """The inverse of `tensors`."""
        return Trajectory(
            observations={
                name.removeprefix(_OBSERVATIONS): tensor
                for name, tensor in named.items()
                if name.startswith(_OBSERVATIONS)
            },
            **{name: named[name] for name in _PLAIN_FIELDS},
        )


_OBSERVATIONS = "observations."

_PLAIN_FIELDS = (
    "episode_start",
    "initial_state",
    "actions",
    "behaviour_log_probs",
    "rewards",
    "ended",
    "truncation_values",
)


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Name, shape and dtype of one raw frame; `lane_axis` is the axis along which lanes lie."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    lane_axis: int

    @property
    def bytes(self) -> int:
        """Size of the frame."""
        return math.prod(self.shape) * self.dtype.itemsize


_LITTLE_ENDIAN = {"int64": "<i8", "float32": "<f4"}


def frame_layout(spec: ExperienceSpec, length: int, lanes: int, state_size: int) -> tuple[FrameSpec, ...]:
    """The frames of a trajectory of `length` steps and `lanes` lanes, in wire order."""
    observations = tuple(
        FrameSpec(f"{_OBSERVATIONS}{key}", (length + 1, lanes, *shape), np.dtype(dtype).newbyteorder("<"), 1)
        for key, (shape, dtype) in spec.shapes().items()
    )
    plain: tuple[tuple[str, tuple[int, ...], str, int], ...] = (
        ("episode_start", (length + 1, lanes), "?", 1),
        ("initial_state", (lanes, state_size), "<f4", 0),
        ("actions", (length, lanes, *spec.action.shape), _LITTLE_ENDIAN[spec.action.dtype], 1),
        ("behaviour_log_probs", (length, lanes), "<f4", 1),
        ("rewards", (length, lanes), "<f4", 1),
        ("ended", (length, lanes), "?", 1),
        ("truncation_values", (length, lanes), "<f4", 1),
    )
    return observations + tuple(
        FrameSpec(name, shape, np.dtype(kind), axis) for name, shape, kind, axis in plain
    )


def encode(trajectory: Trajectory) -> list[bytes]:
    """Raw frames of a trajectory, in the order of `frame_layout`."""
    return [np.ascontiguousarray(tensor.numpy()).tobytes() for tensor in trajectory.tensors().values()]


def decode(
    frames: Sequence[Buffer], spec: ExperienceSpec, length: int, lanes: int, state_size: int
) -> Trajectory:
    """Read a trajectory from raw frames into memory of its own.

    Args:
        frames: As `encode` made them.
        spec: Shapes of one observation, as the receiver expects them.
        length: T, at least 1.
        lanes: B, at least 1.
        state_size: Width of the recurrent state.

    Raises:
        ContractError: Another number of frames, a frame of another size, a number that is not finite, or an index
            or flag outside its range.
    """
    layout = frame_layout(spec, length, lanes, state_size)
    if len(frames) != len(layout):
        raise ContractError(f"a trajectory has {len(layout)} frames, this one has {len(frames)}")
    bounds = _exclusive_bounds(spec)
    named: dict[str, Tensor] = {}
    for frame, expected in zip(frames, layout, strict=True):
        size = memoryview(frame).nbytes
        if size != expected.bytes:
            raise ContractError(
                f"frame {expected.name} must have {expected.bytes} bytes for shape {expected.shape}, it has {size}"
            )
        _check_values(np.frombuffer(frame, dtype=expected.dtype), expected, bounds)
        array = np.frombuffer(frame, dtype=expected.dtype).reshape(expected.shape)
        named[expected.name] = torch.from_numpy(array.copy())
    trajectory = Trajectory.from_tensors(named)
    spec.check(trajectory.observations)
    return trajectory


def _exclusive_bounds(spec: ExperienceSpec) -> dict[str, Array]:
    bounds = {f"{_OBSERVATIONS}{key}": bound for key, bound in spec.bounds().items()}
    actions = action_bounds(spec.action)
    return bounds if actions is None else bounds | {"actions": actions}


def _check_values(values: Array, expected: FrameSpec, bounds: Mapping[str, Array]) -> None:
    if expected.dtype.kind == "f" and not np.isfinite(values).all():
        raise ContractError(f"frame {expected.name} contains a number that is not finite")
    if expected.dtype.kind == "b" and (values.view(np.uint8) > 1).any():
        raise ContractError(f"frame {expected.name} contains a flag that is neither 0 nor 1")
    if expected.name in bounds:
        bound = bounds[expected.name]
        rows = values.reshape(-1, bound.size)
        if (rows < 0).any() or (rows >= bound).any():
            raise ContractError(f"frame {expected.name} contains an index outside [0, {bound.tolist()})")
