"""The parameters of many hosts and their seeds, their momentum and their running statistics.

Row e of `parameters` is everything that is trained in lane e: the host's flat row, then one segment per slot, as long
as the largest blueprint that fits there and the pieces of a gate behind it. `momentum` has the same form. Creating or
removing a seed writes its segment of both in one call, so a seed never meets another seed's momentum; a seed that is
fossilised is not touched and keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.compositions import seed_parameter_count
from esper_simic.growing_host.hosts import HostSpec, SlotPlace, Statistics


@dataclass(frozen=True, slots=True)
class LaneCopy:
    """Everything a bank holds of n lanes, in main memory: rows of each of its tensors."""

    parameters: Tensor
    momentum: Tensor
    statistics: tuple[Statistics, ...]


class ParameterBank:
    """Owner of all trained numbers of E lanes.

    Args:
        lanes: Number of hosts, E.
        spec: The host.
        slots: Names of the slots that may be grown into.
        config: Which blueprints may be grown, which bounds the slots' segments.
        dtype: Precision of everything that is trained.
        device: Where it lies.

    Raises:
        ConfigError: The host has no such slot.
    """

    def __init__(
        self,
        lanes: int,
        spec: HostSpec,
        slots: tuple[str, ...],
        config: EnvironmentConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.places = spec.places(slots)
        self.slot_channels = tuple(place.shape.channels for place in self.places)
        self.slot_widths = tuple(_segment_width(spec, place, config) for place in self.places)
        ends = np.cumsum([spec.parameter_count, *self.slot_widths])
        self.slot_offsets = tuple(int(offset) for offset in ends[:-1])
        self.parameters = torch.zeros(lanes, int(ends[-1]), dtype=dtype, device=device)
        self.momentum = torch.zeros_like(self.parameters)
        self.statistics = tuple(
            Statistics(
                torch.zeros(lanes, block.statistics, dtype=dtype, device=device),
                torch.ones(lanes, block.statistics, dtype=dtype, device=device),
            )
            for block in spec.blocks
        )
        self.layers = len(spec.blocks) + 1

    @property
    def lanes(self) -> int:
        """Number of hosts."""
        return len(self.parameters)

    def reset_lane(self, lane: int, host_row: NDArray[np.float64]) -> None:
        """Give a lane a fresh host and no seeds: parameters, momentum and running statistics start anew.

        Args:
            lane: Row of the bank.
            host_row: `[spec.parameter_count]`.
        """
        self.parameters[lane] = 0
        self.momentum[lane] = 0
        self._write(lane, 0, host_row)
        for statistics in self.statistics:
            statistics.mean[lane] = 0
            statistics.variance[lane] = 1

    def create_seed(self, lane: int, slot: int, seed_row: NDArray[np.float64]) -> None:
        """Put a fresh seed and its empty optimiser state into a slot."""
        self._check_fits(slot, len(seed_row))
        self.remove_seed(lane, slot)
        self._write(lane, self.slot_offsets[slot], seed_row)

    def append_gate(self, lane: int, slot: int, offset: int, gate_row: NDArray[np.float64]) -> None:
        """Put a fresh gate and its empty optimiser state behind a seed that is there.

        Args:
            lane: Row of the bank.
            slot: Slot of the seed.
            offset: Parameters of the seed without a gate.
            gate_row: `[G]`.
        """
        self._check_fits(slot, offset + len(gate_row))
        start = self.slot_offsets[slot] + offset
        self._write(lane, start, gate_row)
        self.momentum[lane, start : start + len(gate_row)] = 0

    def remove_seed(self, lane: int, slot: int) -> None:
        """Clear a slot's parameters and optimiser state."""
        start = self.slot_offsets[slot]
        self.parameters[lane, start : start + self.slot_widths[slot]] = 0
        self.momentum[lane, start : start + self.slot_widths[slot]] = 0

    def snapshot(self, lanes: NDArray[np.int64]) -> LaneCopy:
        """Copy everything of some lanes."""
        chosen = self._chosen(lanes)

        def copied(values: Tensor) -> Tensor:
            return values.index_select(0, chosen).cpu()

        return LaneCopy(
            copied(self.parameters),
            copied(self.momentum),
            tuple(Statistics(copied(each.mean), copied(each.variance)) for each in self.statistics),
        )

    def restore(self, lanes: NDArray[np.int64], copy: LaneCopy) -> None:
        """Put copied lanes back, in the order in which they are named: lane `lanes[i]` gets row i."""
        chosen = self._chosen(lanes)
        if len(copy.parameters) != len(chosen) or copy.parameters.shape[1:] != self.parameters.shape[1:]:
            raise InvariantViolation(
                f"a copy of {list(copy.parameters.shape)} parameters for {len(chosen)} lanes of "
                f"{self.parameters.shape[1]}"
            )
        pairs = [(self.parameters, copy.parameters), (self.momentum, copy.momentum)]
        for mine, theirs in zip(self.statistics, copy.statistics, strict=True):
            pairs += [(mine.mean, theirs.mean), (mine.variance, theirs.variance)]
        for target, source in pairs:
            target.index_copy_(0, chosen, source.to(target))

    def clear_momentum(self, lanes: NDArray[np.int64]) -> None:
        """Forget the optimiser state of host and seeds of some lanes."""
        self.momentum.index_fill_(0, self._chosen(lanes), 0)

    def weight_norms(self) -> NDArray[np.float64]:
        """Norm of each host layer's parameters, `[E, layers]`."""
        squares = layer_squares(self.spec, self.parameters[:, : self.spec.parameter_count])
        return np.asarray(squares.double().sqrt().cpu().numpy())

    def _chosen(self, lanes: NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(lanes, dtype=torch.int64, device=self.parameters.device)

    def _write(self, lane: int, start: int, row: NDArray[np.float64]) -> None:
        self.parameters[lane, start : start + len(row)] = torch.as_tensor(row, dtype=self.parameters.dtype)

    def _check_fits(self, slot: int, size: int) -> None:
        if size > self.slot_widths[slot]:
            raise InvariantViolation(
                f"a seed of {size} parameters in slot {self.places[slot].name}, which holds "
                f"{self.slot_widths[slot]}"
            )


def layer_squares(spec: HostSpec, rows: Tensor) -> Tensor:
    """Squared norm of each host layer of flat host rows: `[R, parameter_count]` gives `[R, layers]`."""
    # Sums of slices, not a product with indicators: there one NaN would reach every layer of its lane.
    squares = torch.split(rows * rows, list(spec.layer_parameter_counts), dim=1)
    return torch.stack([part.sum(1) for part in squares], dim=1)


def _segment_width(spec: HostSpec, place: SlotPlace, config: EnvironmentConfig) -> int:
    """Parameters of the largest seed, with a gate, that a slot may hold; 0 where no blueprint fits the host."""
    channels = place.shape.channels
    fitting = [blueprint(name) for name in config.blueprints]
    counts = [
        seed_parameter_count(each, Composition.GATE, channels, spec.kind)
        for each in fitting
        if spec.kind in each.kinds
    ]
    return max(counts, default=0)
