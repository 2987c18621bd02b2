"""A whole host, as a description: its layers, the layout of its flat row, and the places where slots can be."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.errors import ConfigError
from esper_simic.growing_host.blueprints import Kind, Piece, initial_row
from esper_simic.growing_host.hosts.layers import Block, Head, Pieces, Shape, Stem


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where a slot is: behind which block, before or behind its pool, and the features it meets there."""

    name: str
    block: int
    behind_pool: bool
    shape: Shape


@dataclass(frozen=True, slots=True)
class HostPieces:
    """Flat rows cut into the pieces of each layer."""

    stem: Pieces
    blocks: tuple[Pieces, ...]
    head: Pieces


@dataclass(frozen=True)
class HostSpec:
    """A host for one task.

    Args:
        name: Name in `hosts.HOSTS`.
        kind: What its features are; decides which blueprints fit.
        stem: Where samples come in.
        blocks: In data-flow order.
        head: Where logits come out.
        classes: Labels, or the size of the vocabulary.
    """

    name: str
    kind: Kind
    stem: Stem
    blocks: tuple[Block, ...]
    head: Head
    classes: int

    @cached_property
    def _pieces(self) -> tuple[tuple[Piece, ...], ...]:
        return (self.stem.pieces, *(block.pieces for block in self.blocks), self.head.pieces)

    @cached_property
    def pieces(self) -> tuple[int, ...]:
        """Sizes of the flat row's pieces: the stem's, each block's, the head's."""
        return tuple(piece.size for layer in self._pieces for piece in layer)

    @cached_property
    def layer_parameter_counts(self) -> tuple[int, ...]:
        """Parameters of each block, then of the head; the stem counts with the first block."""
        stem, first, *others = (sum(piece.size for piece in layer) for layer in self._pieces)
        return (stem + first, *others)

    @cached_property
    def parameter_count(self) -> int:
        """Parameters of the host without seeds."""
        return sum(self.pieces)

    @property
    def layer_outputs(self) -> tuple[int, ...]:
        """Channels behind each block, then the classes."""
        return (*(block.output.channels for block in self.blocks), self.classes)

    @property
    def layer_positions(self) -> tuple[int, ...]:
        """Positions at which each block computes, then 1."""
        return (*(block.output.positions for block in self.blocks), 1)

    @property
    def features_max(self) -> int:
        """Numbers a sample has where it has most of them, the logits among them."""
        logits = self.classes * (self.stem.output.positions if self.kind == "tokens" else 1)
        return max(self.stem.output.size, *(block.output.size for block in self.blocks), logits)

    @property
    def seeds_adapt_host(self) -> bool:
        """Whether a blended seed's input sends gradients back: in transformers seed and host adapt to each other."""
        return self.kind == "tokens"

    @cached_property
    def slot_places(self) -> tuple[SlotPlace, ...]:
        """Every place a slot can be, in data-flow order: `r0c{i}` behind block i, `r1c{i}` behind its pool."""
        places: list[SlotPlace] = []
        for index, block in enumerate(self.blocks):
            places.append(SlotPlace(f"r0c{index}", index, False, block.output))
            if block.pool is not None:
                channels, height, width = block.output
                pooled = Shape(channels, height // block.pool[0], width // block.pool[1])
                places.append(SlotPlace(f"r1c{index}", index, True, pooled))
        return tuple(places)

    def places(self, names: tuple[str, ...]) -> tuple[SlotPlace, ...]:
        """The places of these slots, in the order given.

        Raises:
            ConfigError: The host has no such place.
        """
        known = {place.name: place for place in self.slot_places}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"host {self.name!r} has no slot {name!r}{hint}; it has {', '.join(known)}",
                    "environment.slots",
                )
        return tuple(known[name] for name in names)

    def split(self, rows: Tensor) -> HostPieces:
        """Cut flat rows `[R, parameter_count]` into pieces (one node in the gradient's graph)."""
        cut = iter(torch.split(rows, list(self.pieces), dim=1))
        stem = tuple(next(cut) for _ in self.stem.pieces)
        blocks = tuple(tuple(next(cut) for _ in block.pieces) for block in self.blocks)
        return HostPieces(stem, blocks, tuple(cut))

    def initial_parameters(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A fresh flat row: weights uniform within `1 / sqrt(fan in)`, scales 1, shifts 0.

        Returns:
            `[parameter_count]` float64.
        """
        return initial_row((piece for layer in self._pieces for piece in layer), rng)
