"""The parameters of many hosts and their seeds, their optimiser and their batch statistics.

Row e of `parameters` is everything that is trained in lane e: the host's flat row, then one segment per slot, as long
as the largest blueprint that fits there. `momentum` has the same form. Creating or removing a seed writes its
segment of both in one call, so a seed never meets another seed's momentum; a seed that is fossilised is not touched
and keeps its own.

One step of the optimiser for all lanes (SGD with momentum m, rates eta of host and seeds, gradients g clipped apart
for the host and for each seed):

    v <- m v + g min(1, limit / |g|),    theta <- theta - eta v

A gradient that is not finite is not applied (its share is 0); it is reported as exploding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.hosts import PIECES_PER_BLOCK, HostSpec


@dataclass(frozen=True, slots=True)
class HostPieces:
    """Views of the hosts' flat rows: per block weight `[E, O, I]`, scale and shift `[E, O]`; classifier."""

    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    classifier_weight: Tensor
    classifier_bias: Tensor


def split_host(spec: HostSpec, rows: Tensor) -> HostPieces:
    """Cut flat host rows `[E, parameter_count]` into their pieces (one node in the gradient's graph)."""
    pieces = torch.split(rows, list(spec.pieces), dim=1)
    blocks = len(spec.blocks)
    weights = tuple(
        pieces[PIECES_PER_BLOCK * index].reshape(-1, block.channels_out, block.channels_in)
        for index, block in enumerate(spec.blocks)
    )
    classifier = pieces[PIECES_PER_BLOCK * blocks].reshape(rows.shape[0], spec.classes, -1)
    return HostPieces(
        weights,
        pieces[1 : PIECES_PER_BLOCK * blocks : PIECES_PER_BLOCK],
        pieces[2 : PIECES_PER_BLOCK * blocks : PIECES_PER_BLOCK],
        classifier,
        pieces[-1],
    )


class ParameterBank:
    """Owner of all trained numbers of E lanes.

    Args:
        lanes: Number of hosts, E.
        spec: The host.
        slot_blocks: Index of the block behind which each slot sits.
        config: Learning rates, momentum, clipping, blueprints.
        dtype: Precision of everything that is trained.
        device: Where it lies.
    """

    def __init__(
        self,
        lanes: int,
        spec: HostSpec,
        slot_blocks: tuple[int, ...],
        config: EnvironmentConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.slot_channels = tuple(spec.blocks[index].channels_out for index in slot_blocks)
        widths = [
            max(blueprint(name).parameter_count(channels) for name in config.blueprints)
            for channels in self.slot_channels
        ]
        self.slot_offsets = tuple(
            int(offset) for offset in spec.parameter_count + np.cumsum([0, *widths[:-1]])
        )
        self._slot_widths = tuple(widths)
        size = spec.parameter_count + sum(widths)
        self._dtype = dtype
        self.parameters = torch.zeros(lanes, size, dtype=dtype, device=device)
        self.momentum = torch.zeros_like(self.parameters)
        self.gradients = torch.zeros_like(self.parameters)
        self.running_means = [
            torch.zeros(lanes, block.channels_out, dtype=dtype, device=device) for block in spec.blocks
        ]
        self.running_variances = [torch.ones_like(mean) for mean in self.running_means]
        self.layers = len(spec.blocks) + 1
        self._segments = [*spec.layer_parameter_counts, *widths]
        unit = [0] * spec.parameter_count + [
            1 + slot for slot, width in enumerate(widths) for _ in range(width)
        ]
        self._unit = torch.tensor(unit, device=device)
        rates = torch.tensor([config.host_lr] + [config.seed_lr] * len(widths), dtype=dtype, device=device)
        self._rates = rates[self._unit]
        self._decay = config.momentum
        self._norm_limit = config.max_grad_norm

    def reset_lane(self, lane: int, host_row: NDArray[np.float64]) -> None:
        """Give a lane a fresh host and no seeds: parameters, momentum and batch statistics start anew.

        Args:
            lane: Row of the bank.
            host_row: `[spec.parameter_count]`.
        """
        self.parameters[lane] = 0
        self.momentum[lane] = 0
        self.parameters[lane, : self.spec.parameter_count] = torch.as_tensor(host_row, dtype=self._dtype)
        for mean, variance in zip(self.running_means, self.running_variances, strict=True):
            mean[lane] = 0
            variance[lane] = 1

    def create_seed(self, lane: int, slot: int, seed_row: NDArray[np.float64]) -> None:
        """Put a fresh seed and its empty optimiser state into a slot."""
        if len(seed_row) > self._slot_widths[slot]:
            raise InvariantViolation(
                f"a seed of {len(seed_row)} parameters in slot {slot}, which holds {self._slot_widths[slot]}"
            )
        self.remove_seed(lane, slot)
        start = self.slot_offsets[slot]
        self.parameters[lane, start : start + len(seed_row)] = torch.as_tensor(seed_row, dtype=self._dtype)

    def remove_seed(self, lane: int, slot: int) -> None:
        """Clear a slot's parameters and optimiser state."""
        start = self.slot_offsets[slot]
        self.parameters[lane, start : start + self._slot_widths[slot]] = 0
        self.momentum[lane, start : start + self._slot_widths[slot]] = 0

    def squared_norms(self, values: Tensor) -> Tensor:
        """Squared norm of each host layer and each slot: `[E, P]` gives `[E, layers + S]`."""
        # Sums of slices, not a product with indicators: there one NaN would reach every segment of its lane.
        squares = torch.split(values * values, self._segments, dim=1)
        return torch.stack([part.sum(1) for part in squares], dim=1)

    def step(self) -> Tensor:
        """One step of the optimiser along `gradients`.

        Returns:
            `[E, layers + S]` squared norms of the gradients before clipping.
        """
        squares = self.squared_norms(self.gradients)
        host = squares[:, : self.layers].sum(1, keepdim=True)
        norms = torch.cat((host, squares[:, self.layers :]), dim=1).sqrt_()
        share = torch.clamp(self._norm_limit / (norms + 1e-6), max=1.0)
        share = torch.where(torch.isfinite(norms), share, 0.0)
        clipped = torch.nan_to_num_(self.gradients * share[:, self._unit], nan=0.0, posinf=0.0, neginf=0.0)
        self.momentum.mul_(self._decay).add_(clipped)
        self.parameters.sub_(self.momentum * self._rates)
        return squares
