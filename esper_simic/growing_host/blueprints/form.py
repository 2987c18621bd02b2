"""What a blueprint is: for each kind of features, a layout of a flat row and a computation that keeps the shape.

A seed computes in one of two ways. Its *features* are blended with the host's. Its *correction* is what it would add to
its input if it were residual; a MULTIPLY seed modulates its host by it (`compositions`). Blueprints that are residual
anyway have `features = x + correction`. Of the others, the correction of a convolutional seed leaves out the last ReLU,
because a modulation needs both signs and because a seed whose last layer starts at zero could never leave zero behind
a ReLU; that of squeeze-and-excitation doubles the gate, so that it is neutral where its logit is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.config_environment import Kind
from esper_simic.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a flat row: its length, and how it starts.

    Args:
        size: Numbers in it.
        fan_in: Inputs that meet in one output; bounds a uniform start.
        start: `uniform` within `1 / sqrt(fan_in)`, `ones`, or `zeros`.
        last: Whether it belongs to a seed's last layer, which starts at zero in a seed that starts as the identity.
    """

    size: int
    fan_in: int = 0
    start: Literal["uniform", "ones", "zeros"] = "uniform"
    last: bool = False


def initial_row(
    pieces: Iterable[Piece], rng: np.random.Generator, *, starts_at_zero: bool = False
) -> NDArray[np.float64]:
    """A fresh flat row.

    Args:
        pieces: Its layout.
        rng: Draws the uniform pieces, in order; those of a last layer at zero too, so that the others do not differ.
        starts_at_zero: Whether the last layer is zero.
    """
    row: list[NDArray[np.float64]] = [np.zeros(0)]
    for piece in pieces:
        if piece.start == "uniform":
            bound = 1 / math.sqrt(piece.fan_in)
            values = rng.uniform(-bound, bound, piece.size)
        else:
            values = np.full(piece.size, 1.0 if piece.start == "ones" else 0.0)
        row.append(np.zeros(piece.size) if piece.last and starts_at_zero else values)
    return np.concatenate(row)


Compute = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Pieces `[n, size]` each and features `[n, C, H, W, B]` to features of the same shape."""


@dataclass(frozen=True, slots=True)
class Form:
    """A blueprint for one kind of features.

    Args:
        pieces: Channels to the pieces of the flat row, in order.
        features: What is blended with the host's features.
        correction: What modulates the host's features; 0 everywhere while the last layer is zero.
    """

    pieces: Callable[[int], tuple[Piece, ...]]
    features: Compute
    correction: Compute


def residual(pieces: Callable[[int], tuple[Piece, ...]], correction: Compute) -> Form:
    """A form whose features are its input plus its correction."""
    return Form(pieces, lambda parts, x: x + correction(parts, x), correction)


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """A kind of seed.

    Args:
        name: Name in `actions.BLUEPRINTS`.
        forms: How it is laid out and computed for each kind of features that it takes.
    """

    name: str
    forms: Mapping[Kind, Form]

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of features that it takes."""
        return frozenset(self.forms)

    def form(self, kind: Kind) -> Form:
        """Its form for a kind of features.

        Raises:
            ConfigError: It has none.
        """
        found = self.forms.get(kind)
        if found is None:
            raise ConfigError(
                f"blueprint {self.name!r} takes features of kind {' or '.join(sorted(self.forms))}, not {kind!r}",
                "environment.blueprints",
            )
        return found

    def pieces(self, channels: int, kind: Kind = "image") -> tuple[Piece, ...]:
        """The pieces of one seed's flat row behind `channels` channels."""
        return self.form(kind).pieces(channels)

    def parameter_count(self, channels: int, kind: Kind = "image") -> int:
        """Parameters of one seed behind `channels` channels."""
        return sum(piece.size for piece in self.pieces(channels, kind))

    def initial_parameters(
        self,
        channels: int,
        rng: np.random.Generator,
        kind: Kind = "image",
        *,
        starts_at_zero: bool = False,
    ) -> NDArray[np.float64]:
        """A fresh flat row `[parameter_count]`; see `initial_row`. With a last layer at zero its correction is 0."""
        return initial_row(self.pieces(channels, kind), rng, starts_at_zero=starts_at_zero)

    def forward(self, parameters: Tensor, x: Tensor, kind: Kind = "image") -> Tensor:
        """Features of n seeds.

        Args:
            parameters: `[n, parameter_count(C, kind)]`.
            x: `[n, C, H, W, B]`.
            kind: What the features are.

        Returns:
            `[n, C, H, W, B]`.
        """
        return self.form(kind).features(self._split(parameters, x, kind), x)

    def correction(self, parameters: Tensor, x: Tensor, kind: Kind = "image") -> Tensor:
        """Corrections of n seeds; arguments and result as `forward`."""
        return self.form(kind).correction(self._split(parameters, x, kind), x)

    def _split(self, parameters: Tensor, x: Tensor, kind: Kind) -> tuple[Tensor, ...]:
        return torch.split(parameters, [piece.size for piece in self.pieces(x.shape[1], kind)], dim=1)
