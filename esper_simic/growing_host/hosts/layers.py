"""What a host is made of: a stem, blocks and a head, each a description that computes for many hosts at once.

A layer owns no number. It says which pieces of the host's flat row are its own (`pieces`) and gets them cut out, each
`[R, size]`, with R rows of hosts, together with features `[R, channels, height, width, samples]`. Training and
validation differ: a block trains with the statistics of its batch and measures with running ones, folded into its
weights once a pass (`prepare`), after which its rows may be picked in any order and number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from esper_simic.growing_host.blueprints import Piece

Pieces = tuple[Tensor, ...]
"""Cut-out pieces of flat rows, `[R, size]` each."""


class Shape(NamedTuple):
    """Shape of one sample's features."""

    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        """Height times width."""
        return self.height * self.width

    @property
    def size(self) -> int:
        """Numbers a sample."""
        return self.channels * self.positions


@dataclass(frozen=True, slots=True)
class Statistics:
    """Running statistics of a block, `[R, C]` each; C = 0 for a block that keeps none."""

    mean: Tensor
    variance: Tensor


class Stem(Protocol):
    """Turns raw samples into the features that reach the first block."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its part of the flat row."""
        ...

    @property
    def output(self) -> Shape:
        """Shape of its features."""
        ...

    def forward(self, pieces: Pieces, inputs: Tensor) -> Tensor:
        """Samples `[R or 1, F, B]` to features `[R or 1, C, H, W, B]`; one row where every host sees the same."""
        ...


class Block(Protocol):
    """A step of the trunk; slots lie behind it, before and behind its pool."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its part of the flat row."""
        ...

    @property
    def output(self) -> Shape:
        """Shape of its features before the pool."""
        ...

    @property
    def pool(self) -> tuple[int, int] | None:
        """Window of the max-pool behind it, if there is one."""
        ...

    @property
    def statistics(self) -> int:
        """Channels of its running statistics; 0 if it keeps none."""
        ...

    def forward_train(self, pieces: Pieces, x: Tensor, statistics: Statistics) -> Tensor:
        """Features `[R, ...]` of a training batch; moves the running statistics."""
        ...

    def prepare(self, pieces: Pieces, statistics: Statistics) -> Pieces:
        """What measuring needs, rows first, so that rows can be picked."""
        ...

    def forward_measure(self, prepared: Pieces, x: Tensor) -> Tensor:
        """Features of R picked rows from `[R or 1, ...]`."""
        ...


class Head(Protocol):
    """Turns the last features into logits."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its part of the flat row."""
        ...

    def forward(self, pieces: Pieces, stem: Pieces, x: Tensor) -> Tensor:
        """Logits `[R, classes, n]` with n samples, or positions times samples where every position is labelled."""
        ...
