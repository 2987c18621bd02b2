"""Blueprints: the kinds of seed that can be grafted behind a block with C channels.

Each keeps the shape of its input. A blueprint's parameters lie in one flat row per seed; `forward` gets the rows of all
seeds of that blueprint in one slot, `[n, P]`, and computes them as one.

| blueprint | what it computes | parameters |
|---|---|---|
| `norm` | `x + s (GroupNorm(x) - x)`, `s` a learned scalar that starts at 0 | `2C + 1` |
| `attention` | `x * sigmoid(W2 relu(W1 pool(x)) + b)`, squeeze-and-excitation, `h = max(1, C // 4)` | `2Ch + C` |
| `depthwise` | 3x3 per channel, then 1x1, GroupNorm, ReLU | `9C + C^2 + 2C` |
| `conv_light` | 3x3, GroupNorm, ReLU | `9C^2 + 2C` |
| `conv_heavy` | twice 3x3, GroupNorm, ReLU | `18C^2 + 4C` |

Sources: Wu & He 2018 (group normalisation); Hu, Shen & Sun 2018 (squeeze-and-excitation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_simic.errors import ConfigError
from esper_simic.growing_host.functional import (
    convolution_3x3,
    group_norm,
    patches,
    pointwise_convolution,
)

CHANNELS_PER_GROUP: Final = 16
"""Wanted width of a normalisation group; narrower features form one group."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a seed's flat row: its length, and how it starts."""

    size: int
    fan_in: int = 0
    start: Literal["uniform", "ones", "zeros"] = "uniform"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A kind of seed.

    Args:
        name: Name in `actions.BLUEPRINTS`.
        pieces: Channels to the pieces of the flat row, in order.
        compute: Pieces `[n, size]` each and features `[n, C, H, W, B]` to features of the same shape.
    """

    name: str
    pieces: Callable[[int], tuple[Piece, ...]]
    compute: Callable[[tuple[Tensor, ...], Tensor], Tensor]

    def parameter_count(self, channels: int) -> int:
        """Parameters of one seed behind `channels` channels."""
        return sum(piece.size for piece in self.pieces(channels))

    def initial_parameters(self, channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """A fresh flat row: weights uniform within `1 / sqrt(fan in)`; scales 1; shifts, biases and `s` 0."""
        row: list[NDArray[np.float64]] = []
        for piece in self.pieces(channels):
            if piece.start == "uniform":
                bound = 1 / math.sqrt(piece.fan_in)
                row.append(rng.uniform(-bound, bound, piece.size))
            else:
                row.append(np.full(piece.size, 1.0 if piece.start == "ones" else 0.0))
        return np.concatenate(row)

    def forward(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Features of n seeds.

        Args:
            parameters: `[n, parameter_count(C)]`.
            x: `[n, C, H, W, B]`.

        Returns:
            `[n, C, H, W, B]`.
        """
        sizes = [piece.size for piece in self.pieces(x.shape[1])]
        return self.compute(torch.split(parameters, sizes, dim=1), x)


def normalisation_groups(channels: int) -> int:
    """Groups of about `CHANNELS_PER_GROUP` channels: the largest such number that divides the channels."""
    return math.gcd(channels, max(1, channels // CHANNELS_PER_GROUP))


def _affine(channels: int) -> tuple[Piece, Piece]:
    return Piece(channels, start="ones"), Piece(channels, start="zeros")


def _norm(pieces: tuple[Tensor, ...], x: Tensor) -> Tensor:
    scale, shift, strength = pieces
    normed = group_norm(x, scale, shift, normalisation_groups(x.shape[1]))
    return x + strength.view(-1, 1, 1, 1, 1) * (normed - x)


def _attention(pieces: tuple[Tensor, ...], x: Tensor) -> Tensor:
    squeeze, excite, bias = pieces
    rows, channels = x.shape[:2]
    pooled = x.mean((2, 3))
    hidden = torch.relu(torch.bmm(squeeze.reshape(rows, -1, channels), pooled))
    gate = torch.sigmoid(torch.bmm(excite.reshape(rows, channels, -1), hidden) + bias.unsqueeze(2))
    return x * gate.view(rows, channels, 1, 1, -1)


def _depthwise(pieces: tuple[Tensor, ...], x: Tensor) -> Tensor:
    spatial, mixing, scale, shift = pieces
    rows, channels = x.shape[:2]
    columns = patches(x).view(rows * channels, 9, -1)
    filtered = torch.bmm(spatial.reshape(rows * channels, 1, 9), columns).view(x.shape)
    mixed = pointwise_convolution(filtered, mixing.reshape(rows, channels, channels))
    return group_norm(mixed, scale, shift, normalisation_groups(channels), rectify=True)


def _convolutions(pieces: tuple[Tensor, ...], x: Tensor) -> Tensor:
    rows, channels = x.shape[:2]
    for kernel, scale, shift in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        filtered = convolution_3x3(x, kernel.reshape(rows, channels, channels * 9))
        x = group_norm(filtered, scale, shift, normalisation_groups(channels), rectify=True)
    return x


def _norm_pieces(channels: int) -> tuple[Piece, ...]:
    return (*_affine(channels), Piece(1, start="zeros"))


def _attention_pieces(channels: int) -> tuple[Piece, ...]:
    hidden = max(1, channels // 4)
    squeeze, excite = Piece(hidden * channels, channels), Piece(hidden * channels, hidden)
    return squeeze, excite, Piece(channels, start="zeros")


def _depthwise_pieces(channels: int) -> tuple[Piece, ...]:
    return Piece(9 * channels, 9), Piece(channels * channels, channels), *_affine(channels)


def _light_pieces(channels: int) -> tuple[Piece, ...]:
    return Piece(9 * channels * channels, 9 * channels), *_affine(channels)


def _heavy_pieces(channels: int) -> tuple[Piece, ...]:
    return _light_pieces(channels) * 2


CATALOGUE: Final[dict[str, Blueprint]] = {
    blueprint.name: blueprint
    for blueprint in (
        Blueprint("norm", _norm_pieces, _norm),
        Blueprint("attention", _attention_pieces, _attention),
        Blueprint("depthwise", _depthwise_pieces, _depthwise),
        Blueprint("conv_light", _light_pieces, _convolutions),
        Blueprint("conv_heavy", _heavy_pieces, _convolutions),
    )
}
"""Name to blueprint."""


def blueprint(name: str) -> Blueprint:
    """The blueprint of this name.

    Raises:
        ConfigError: There is none; an unknown blueprint never becomes an empty one.
    """
    found = CATALOGUE.get(name)
    if found is None:
        raise ConfigError(
            f"unknown blueprint {name!r}; known: {', '.join(CATALOGUE)}", "environment.blueprints"
        )
    return found
