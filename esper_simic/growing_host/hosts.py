"""Hosts: the networks that are grown, as shapes and a layout of flat parameters.

A host is a chain of blocks (1x1 convolution without bias, batch normalisation, ReLU, 2x2 max-pool), then a global
average pool and a linear classifier. All parameters of one host lie in one flat row, in the order of `HostSpec.pieces`,
so that a step of the optimiser is a row-wise operation for any number of hosts. Slot `r0ci` sits behind block i,
before its pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.errors import ConfigError
from esper_simic.growing_host.tasks import Task

PIECES_PER_BLOCK: Final = 3


@dataclass(frozen=True, slots=True)
class Block:
    """One block; `side` is the height and width of its output before the pool."""

    channels_in: int
    channels_out: int
    side: int

    @property
    def parameter_count(self) -> int:
        """Weight, scale and shift."""
        return self.channels_out * (self.channels_in + 2)


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host for one task.

    Args:
        name: Name in `HOST_CHANNELS`.
        blocks: In data-flow order.
        classes: Outputs of the classifier.
    """

    name: str
    blocks: tuple[Block, ...]
    classes: int

    @property
    def pieces(self) -> tuple[int, ...]:
        """Sizes of the flat row's pieces: weight, scale, shift of each block; weight and bias of the classifier."""
        sizes: list[int] = []
        for block in self.blocks:
            sizes += [block.channels_out * block.channels_in, block.channels_out, block.channels_out]
        width = self.blocks[-1].channels_out
        return (*sizes, self.classes * width, self.classes)

    @property
    def layer_parameter_counts(self) -> tuple[int, ...]:
        """Parameters of each block, then of the classifier."""
        classifier = self.classes * (self.blocks[-1].channels_out + 1)
        return (*(block.parameter_count for block in self.blocks), classifier)

    @property
    def parameter_count(self) -> int:
        """Parameters of the host without seeds."""
        return sum(self.pieces)

    def initial_parameters(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A fresh flat row: weights uniform within `1 / sqrt(fan in)`, scales 1, shifts 0.

        Returns:
            `[parameter_count]` float64.
        """
        row: list[NDArray[np.float64]] = []
        for block in self.blocks:
            bound = 1 / math.sqrt(block.channels_in)
            row.append(rng.uniform(-bound, bound, block.channels_out * block.channels_in))
            row += [np.ones(block.channels_out), np.zeros(block.channels_out)]
        bound = 1 / math.sqrt(self.blocks[-1].channels_out)
        row.append(rng.uniform(-bound, bound, self.classes * (self.blocks[-1].channels_out + 1)))
        return np.concatenate(row)


HOST_CHANNELS: Final[dict[str, tuple[int, ...]]] = {"rescue": (1, 2, 4)}
"""Name to channels of the blocks. `rescue` is far too small for its task: seeds must rescue it."""


def build_host(name: str, task: Task) -> HostSpec:
    """The host of this name, shaped for a task.

    Raises:
        ConfigError: No host has this name, or the task's images are too small for its pools.
    """
    channels = HOST_CHANNELS.get(name)
    if channels is None:
        raise ConfigError(f"unknown host {name!r}; known: {', '.join(HOST_CHANNELS)}", "environment.host")
    shrink = 2 ** len(channels)
    if task.side % shrink:
        raise ConfigError(
            f"host {name!r} halves images {len(channels)} times and needs a side that {shrink} divides; "
            f"task {task.name!r} has {task.side}",
            "environment.host",
        )
    widths = (task.channels, *channels)
    blocks = tuple(
        Block(widths[index], widths[index + 1], task.side >> index) for index in range(len(channels))
    )
    return HostSpec(name, blocks, task.classes)
