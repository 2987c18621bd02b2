"""The graph experience buffer: what the learner keeps to learn from, first in, first out.

Experiences lie in preallocated arrays `[capacity, …]`, one row an experience, so that a batch is one indexed read and
the memory is known before the run starts. Every experience has a serial number, counted from 0 over the whole run;
the buffer holds the newest `capacity` of them. Those not yet consumed are *fresh*; a batch takes its oldest fresh ones
first and fills up from all it holds.

The buffer is part of the learner's fold: its contents are a function of the journal, its choices of the journal and
the random stream that it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic.errors import BudgetExceeded, InvariantViolation
from esper_simic.graphs import ObservationSpec
from esper_simic.trajectory import Trajectory, frame_layout

Serials = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReplaySample:
    """A batch of B experiences.

    Attributes:
        serials: `[B]` int64, serial numbers; the fresh ones come first.
        fresh: How many are fresh.
        versions: `[B]` int64, versions of the policies that acted.
        trajectory: The data, `[T, B]`.
    """

    serials: Serials
    fresh: int
    versions: Serials
    trajectory: Trajectory


class GraphExperienceBuffer:
    """A first-in-first-out store of experiences of equal length.

    Args:
        capacity: Experiences kept; when full, the oldest *consumed* one makes room.
        spec: Shapes of one observation.
        length: T of every experience.
        state_size: Width of the recurrent state.
    """

    def __init__(self, capacity: int, spec: ObservationSpec, length: int, state_size: int) -> None:
        self.capacity = capacity
        self._lane_axis = {frame.name: frame.lane_axis for frame in frame_layout(spec, length, 1, state_size)}
        self._rows: dict[str, Tensor] = {}
        for frame in frame_layout(spec, length, 1, state_size):
            shape = frame.shape[: frame.lane_axis] + frame.shape[frame.lane_axis + 1 :]
            dtype = torch.from_numpy(np.empty(0, dtype=frame.dtype)).dtype
            self._rows[frame.name] = torch.zeros((capacity, *shape), dtype=dtype)
        self._versions = np.zeros(capacity, dtype=np.int64)
        self._positions = np.zeros(capacity, dtype=np.int64)
        self._inserted = 0
        self._consumed = 0

    def __len__(self) -> int:
        return min(self._inserted, self.capacity)

    @property
    def inserted(self) -> int:
        """Experiences ever inserted; the next one gets this serial number."""
        return self._inserted

    @property
    def consumed(self) -> int:
        """Serial number of the oldest fresh experience."""
        return self._consumed

    @property
    def fresh(self) -> int:
        """Experiences inserted and not yet consumed."""
        return self._inserted - self._consumed

    @property
    def bytes(self) -> int:
        """Memory of the preallocated arrays."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def insert(self, trajectory: Trajectory, version: int, position: int) -> range:
        """Take every lane of a trajectory as one experience.

        Args:
            trajectory: `[T, B]`; copied.
            version: Version of the policy that acted.
            position: Journal position of the record that holds the trajectory.

        Returns:
            The serial numbers given, in lane order.

        Raises:
            BudgetExceeded: Fresh experiences would be overwritten; the credits allow more than the capacity holds.
        """
        lanes = trajectory.lanes
        if self.fresh + lanes > self.capacity:
            raise BudgetExceeded(
                f"{lanes} experiences do not fit beside {self.fresh} fresh ones: capacity {self.capacity}; raise "
                f"experience_buffer.capacity or lower supervisor.unrolls_in_flight"
            )
        serials = range(self._inserted, self._inserted + lanes)
        rows = torch.arange(serials.start, serials.stop) % self.capacity
        for name, tensor in trajectory.tensors().items():
            self._rows[name][rows] = tensor.movedim(self._lane_axis[name], 0)
        slots = rows.numpy()
        self._versions[slots] = version
        self._positions[slots] = position
        self._inserted += lanes
        return serials

    def consume_all(self) -> None:
        """Take every fresh experience for consumed: they stay in the buffer and can be drawn from it."""
        self._consumed = self._inserted

    def positions(self) -> Serials:
        """Journal positions `[len]` of the experiences held, oldest first."""
        serials = np.arange(self._inserted - len(self), self._inserted, dtype=np.int64)
        held: Serials = self._positions[serials % self.capacity]
        return held

    def sample(self, batch_size: int, fresh: int, *, rng: np.random.Generator) -> ReplaySample:
        """Consume the `fresh` oldest fresh experiences and fill the batch from the rest that is held.

        The others are drawn uniformly without replacement among experiences held and not in the batch already; while
        there are too few of them, with replacement among all held.

        Raises:
            InvariantViolation: Fewer fresh experiences than asked for.
        """
        if self.fresh < fresh or batch_size < fresh:
            raise InvariantViolation(f"asked for {fresh} fresh of {batch_size}, only {self.fresh} are fresh")
        chosen = np.arange(self._consumed, self._consumed + fresh, dtype=np.int64)
        oldest = self._inserted - len(self)
        replayed = batch_size - fresh
        others = len(self) - fresh
        if others >= replayed:
            drawn = oldest + rng.choice(others, size=replayed, replace=False, shuffle=True)
            # Serials below the fresh block stay; those from it on move past it.
            drawn = np.where(drawn >= self._consumed, drawn + fresh, drawn)
        else:
            drawn = oldest + rng.integers(len(self), size=replayed)
        serials = np.concatenate([chosen, drawn.astype(np.int64)])
        self._consumed += fresh
        return ReplaySample(serials, fresh, self._versions[serials % self.capacity], self.gather(serials))

    def gather(self, serials: Serials) -> Trajectory:
        """The experiences of these serial numbers as one trajectory `[T, B]`, in their order."""
        rows = torch.from_numpy(serials % self.capacity)
        named = {
            name: held[rows].movedim(0, self._lane_axis[name]).contiguous()
            for name, held in self._rows.items()
        }
        return Trajectory.from_tensors(named)
