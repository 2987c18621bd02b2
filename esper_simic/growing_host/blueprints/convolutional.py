"""Blueprints for pictures and series.

A kernel is 3x3 on an image and 1x3 on a series (k = 9 or 3 taps); a 1x1 kernel is a linear map of the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from esper_simic.config_environment import Kind
from esper_simic.growing_host.blueprints.form import Form, Piece, residual
from esper_simic.growing_host.convolutions import convolve
from esper_simic.growing_host.functional import group_norm, patches, pointwise_convolution

CHANNELS_PER_GROUP: Final = 16
"""Wanted width of a normalisation group; narrower features form one group."""

BOTTLENECK_CHANNELS_MIN: Final = 8
"""Least width of a bottleneck; a quarter of the channels where that is more."""

KERNELS: Final[dict[Kind, tuple[int, int]]] = {"image": (3, 3), "series": (1, 3)}
"""Height and width of a spatial kernel."""

Pieces = tuple[Piece, ...]


def normalisation_groups(channels: int) -> int:
    """Groups of about `CHANNELS_PER_GROUP` channels: the largest such number that divides the channels."""
    return math.gcd(channels, max(1, channels // CHANNELS_PER_GROUP))


def _normed(x: Tensor, scale: Tensor, shift: Tensor, *, rectify: bool = False) -> Tensor:
    return group_norm(x, scale, shift, normalisation_groups(x.shape[1]), rectify=rectify)


def _affine(channels: int, *, last: bool = True) -> Pieces:
    return Piece(channels, start="ones", last=last), Piece(channels, start="zeros", last=last)


def norm() -> Form:
    """`x + s (GroupNorm(x) - x)`."""

    def pieces(channels: int) -> Pieces:
        return (*_affine(channels, last=False), Piece(1, start="zeros", last=True))

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        scale, shift, strength = parts
        return strength.view(-1, 1, 1, 1, 1) * (_normed(x, scale, shift) - x)

    return residual(pieces, correction)


def attention() -> Form:
    """Squeeze-and-excitation: features `x sigmoid(u)`, correction `x (2 sigmoid(u) - 1) = x tanh(u / 2)`."""

    def pieces(channels: int) -> Pieces:
        hidden = max(1, channels // 4)
        return (
            Piece(hidden * channels, channels),
            Piece(hidden * channels, hidden, last=True),
            Piece(channels, start="zeros", last=True),
        )

    def logit(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        squeeze, excite, bias = parts
        rows, channels = x.shape[:2]
        pooled = x.mean((2, 3))
        hidden = torch.relu(torch.bmm(squeeze.reshape(rows, -1, channels), pooled))
        excited = torch.bmm(excite.reshape(rows, channels, -1), hidden) + bias.unsqueeze(2)
        return excited.view(rows, channels, 1, 1, -1)

    return Form(
        pieces,
        lambda parts, x: x * torch.sigmoid(logit(parts, x)),
        lambda parts, x: x * torch.tanh(logit(parts, x) / 2),
    )


def _rectified(pieces: Callable[[int], Pieces], compute: Callable[..., Tensor]) -> Form:
    """A form that ends in a normalisation, with a ReLU behind it in features only."""
    return Form(
        pieces,
        lambda parts, x: compute(parts, x, rectify=True),
        lambda parts, x: compute(parts, x, rectify=False),
    )


def convolutions(kind: Kind, count: int) -> Form:
    """`count` times spatial convolution, GroupNorm, ReLU."""
    kernel = KERNELS[kind]
    taps = kernel[0] * kernel[1]

    def pieces(channels: int) -> Pieces:
        fan_in = taps * channels
        return tuple(
            piece
            for index in range(count)
            for piece in (Piece(fan_in * channels, fan_in), *_affine(channels, last=index == count - 1))
        )

    def compute(parts: tuple[Tensor, ...], x: Tensor, *, rectify: bool) -> Tensor:
        for start in range(0, len(parts), 3):
            weight, scale, shift = parts[start : start + 3]
            inner = start + 3 < len(parts)
            x = _normed(convolve(x, weight, kernel), scale, shift, rectify=rectify or inner)
        return x

    return _rectified(pieces, compute)


def small() -> Form:
    """1x1 convolution, GroupNorm, ReLU."""

    def pieces(channels: int) -> Pieces:
        return Piece(channels * channels, channels), *_affine(channels)

    def compute(parts: tuple[Tensor, ...], x: Tensor, *, rectify: bool) -> Tensor:
        weight, scale, shift = parts
        return _normed(convolve(x, weight, (1, 1)), scale, shift, rectify=rectify)

    return _rectified(pieces, compute)


def depthwise(kind: Kind) -> Form:
    """Spatial kernel per channel, 1x1 convolution, GroupNorm, ReLU."""
    kernel = KERNELS[kind]
    taps = kernel[0] * kernel[1]

    def pieces(channels: int) -> Pieces:
        return Piece(taps * channels, taps), Piece(channels * channels, channels), *_affine(channels)

    def compute(parts: tuple[Tensor, ...], x: Tensor, *, rectify: bool) -> Tensor:
        spatial, mixing, scale, shift = parts
        rows, channels = x.shape[:2]
        columns = patches(x, kernel).view(rows * channels, taps, -1)
        filtered = torch.bmm(spatial.reshape(rows * channels, 1, taps), columns).view(x.shape)
        mixed = pointwise_convolution(filtered, mixing.reshape(rows, channels, channels))
        return _normed(mixed, scale, shift, rectify=rectify)

    return _rectified(pieces, compute)


def bottleneck(kind: Kind) -> Form:
    """`x + GroupNorm(U relu(K relu(D x)))`: 1x1 down to h channels, a spatial kernel there, 1x1 up again."""
    kernel = KERNELS[kind]
    taps = kernel[0] * kernel[1]

    def pieces(channels: int) -> Pieces:
        hidden = max(BOTTLENECK_CHANNELS_MIN, channels // 4)
        return (
            Piece(hidden * channels, channels),
            Piece(taps * hidden * hidden, taps * hidden),
            Piece(channels * hidden, hidden),
            *_affine(channels),
        )

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        down, spatial, up, scale, shift = parts
        hidden = torch.relu(convolve(x, down, (1, 1)))
        hidden = torch.relu(convolve(hidden, spatial, kernel))
        return _normed(convolve(hidden, up, (1, 1)), scale, shift)

    return residual(pieces, correction)
