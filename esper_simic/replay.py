"""The graph experience buffer: what the learner keeps to learn from, first in, first out.

Experiences lie in preallocated arrays `[capacity, …]`, one row an experience, so that a batch is one indexed read and
the memory is known before the run starts. Every experience has a serial number, counted from 0 over the whole run;
the buffer holds the newest `capacity` of them. Those not yet consumed are *fresh*; a batch takes its oldest fresh ones
first and fills up from all it holds.

The buffer is part of the learner's fold: its contents are a function of the journal, its choices of the journal and
the random stream that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper_simic.errors import BudgetExceeded, ContractError, InvariantViolation
from esper_simic.specs import ExperienceSpec
from esper_simic.trajectory import Trajectory, frame_layout

Serials = npt.NDArray[np.int64]


class Held(NamedTuple):
    """One unroll of which the buffer holds something: the data, the version that acted, the record it stands in."""

    trajectory: Trajectory
    version: int
    position: int


@dataclass(frozen=True, slots=True)
class ReplaySample:
    """A batch of B experiences.

    Attributes:
        serials: `[B]` int64, serial numbers; the fresh ones come first.
        fresh: How many of the oldest fresh ones it uses up; those of them that are barred it does without.
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

    def __init__(self, capacity: int, spec: ExperienceSpec, length: int, state_size: int) -> None:
        self.capacity = capacity
        self._lane_axis = {frame.name: frame.lane_axis for frame in frame_layout(spec, length, 1, state_size)}
        self._rows: dict[str, Tensor] = {}
        for frame in frame_layout(spec, length, 1, state_size):
            shape = frame.shape[: frame.lane_axis] + frame.shape[frame.lane_axis + 1 :]
            dtype = torch.from_numpy(np.empty(0, dtype=frame.dtype)).dtype
            self._rows[frame.name] = torch.zeros((capacity, *shape), dtype=dtype)
        self._versions = np.zeros(capacity, dtype=np.int64)
        self._positions = np.zeros(capacity, dtype=np.int64)
        self._first_serials = np.zeros(capacity, dtype=np.int64)
        self._inserted = 0
        self._consumed = 0
        self._barred: set[int] = set()

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
    def _oldest(self) -> int:
        """Serial number of the oldest experience held."""
        return max(0, self._inserted - self.capacity)

    @property
    def barred(self) -> list[int]:
        """Serial numbers of experiences that are held and never drawn again, ascending."""
        return sorted(self._barred)

    def bar(self, serials: Iterable[int]) -> None:
        """Never draw these again: an update came to grief over them.

        A batch is filled up from all that is held, so fresh ones that were no batch's turn yet may be among them. When
        theirs comes they are consumed, and others are drawn in their place; at the head of what is fresh they are
        consumed at once, so that the oldest fresh experience can always be drawn.
        """
        self._barred.update(serial for serial in map(int, serials) if serial >= self._oldest)
        self._pass_barred()

    def _pass_barred(self) -> None:
        while self._consumed < self._inserted and self._consumed in self._barred:
            self._consumed += 1

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
        self._first_serials[slots] = serials.start
        self._inserted += lanes
        if self._barred:
            self._barred = {serial for serial in self._barred if serial >= self._oldest}
        return serials

    def consume_all(self) -> None:
        """Take every fresh experience for consumed: they stay in the buffer and can be drawn from it."""
        self._consumed = self._inserted

    def addresses(self) -> dict[str, Any]:
        """Where what is held stands: `positions` of the records, oldest first, and the first lane's serial number.

        The oldest record's first lanes may have been overwritten already; it counts as held as long as one is left.
        """
        if not len(self):
            return {"first_serial": self._inserted, "positions": []}
        slots = np.arange(self._inserted - len(self), self._inserted, dtype=np.int64) % self.capacity
        return {
            "first_serial": int(self._first_serials[slots[0]]),
            "positions": [int(position) for position in dict.fromkeys(self._positions[slots].tolist())],
        }

    def restore(
        self,
        first_serial: int,
        inserted: int,
        consumed: int,
        held: Iterable[Held],
        barred: Iterable[int] = (),
    ) -> None:
        """Fill the buffer as it was when it gave its `addresses`.

        Args:
            first_serial: As in the addresses.
            inserted: Experiences ever inserted.
            consumed: Serial number of the oldest fresh experience.
            held: The unrolls at those positions, oldest first; read one after the other.
            barred: As `barred` gave them.

        Raises:
            ContractError: They are not the experiences that a buffer of this capacity held then.
        """
        oldest = max(0, inserted - self.capacity)
        self._inserted = first_serial
        for unroll in held:
            self.consume_all()
            self.insert(*unroll)
            if self._inserted <= oldest:
                raise ContractError(
                    f"a buffer of capacity {self.capacity} held nothing of record {unroll.position}"
                )
        if self._inserted != inserted or first_serial > oldest:
            raise ContractError(
                f"the buffer was filled with the experiences from {first_serial} up to {self._inserted}, but with a "
                f"capacity of {self.capacity} it held those from {oldest} up to {inserted}"
            )
        self._consumed = consumed
        self.bar(barred)

    def sample(self, batch_size: int, fresh: int, *, rng: np.random.Generator) -> ReplaySample:
        """Consume the `fresh` oldest fresh experiences and fill the batch as `choose` says.

        Raises:
            InvariantViolation: Fewer fresh experiences than asked for.
        """
        sample = self.read(self.choose(batch_size, fresh, rng=rng), fresh)
        self.consume(fresh)
        return sample

    def consume(self, count: int) -> None:
        """Take the oldest fresh experiences for consumed; they stay in the buffer and can be drawn from it."""
        self._consumed += count
        self._pass_barred()

    def choose(self, batch_size: int, fresh: int, *, rng: np.random.Generator) -> Serials:
        """The serial numbers `[B]` of a batch, without consuming anything: the `fresh` oldest fresh experiences first.

        The others are drawn uniformly without replacement among experiences held and not in the batch already; while
        there are too few of them, with replacement among all held. Those that are barred are neither.

        Raises:
            InvariantViolation: Fewer fresh experiences than asked for.
        """
        if self.fresh < fresh or batch_size < fresh:
            raise InvariantViolation(f"asked for {fresh} fresh of {batch_size}, only {self.fresh} are fresh")
        chosen = np.arange(self._consumed, self._consumed + fresh, dtype=np.int64)
        if self._barred:
            return self._choose_among_sound(batch_size, chosen, rng)
        replayed = batch_size - fresh
        oldest = self._oldest
        others = len(self) - fresh
        if others >= replayed:
            drawn = oldest + rng.choice(others, size=replayed, replace=False, shuffle=True)
            # Serials below the fresh block stay; those from it on move past it.
            drawn = np.where(drawn >= self._consumed, drawn + fresh, drawn)
        else:
            drawn = oldest + rng.integers(len(self), size=replayed)
        return np.concatenate([chosen, drawn.astype(np.int64)])

    def _choose_among_sound(self, batch_size: int, chosen: Serials, rng: np.random.Generator) -> Serials:
        """As `choose`, without those that are barred, neither among those `chosen` nor among the others."""
        held = np.arange(self._oldest, self._inserted, dtype=np.int64)
        sound = held[~np.isin(held, np.array(self.barred, dtype=np.int64))]
        if not len(sound):
            raise InvariantViolation(f"all {len(held)} experiences are barred; none of them is fresh")
        first = sound[np.isin(sound, chosen)]
        others, count = sound[~np.isin(sound, chosen)], batch_size - len(first)
        drawn = (
            rng.choice(others, size=count, replace=False, shuffle=True)
            if len(others) >= count
            else sound[rng.integers(len(sound), size=count)]
        )
        return np.concatenate([first, drawn])

    def draw(self, count: int, *, rng: np.random.Generator) -> Serials:
        """The serial numbers of so many different experiences held, drawn uniformly among those that are not barred.

        Raises:
            InvariantViolation: There are not so many.
        """
        held = np.arange(self._oldest, self._inserted, dtype=np.int64)
        sound = held[~np.isin(held, np.array(self.barred, dtype=np.int64))]
        if len(sound) < count:
            raise InvariantViolation(f"asked for {count} experiences, there are {len(sound)}")
        return rng.choice(sound, size=count, replace=False)

    def read(self, serials: Serials, fresh: int) -> ReplaySample:
        """The experiences of these serial numbers, of which the first `fresh` are fresh."""
        return ReplaySample(serials, fresh, self._versions[serials % self.capacity], self.gather(serials))

    def gather(self, serials: Serials) -> Trajectory:
        """The experiences of these serial numbers as one trajectory `[T, B]`, in their order."""
        rows = torch.from_numpy(serials % self.capacity)
        named = {
            name: held[rows].movedim(0, self._lane_axis[name]).contiguous()
            for name, held in self._rows.items()
        }
        return Trajectory.from_tensors(named)
