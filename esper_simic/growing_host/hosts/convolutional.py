"""Hosts of convolutions: images, series (height 1) and, with one position and 1x1 kernels, vectors.

A block is a convolution without bias, batch normalisation, ReLU and, where the host pools there, a max-pool with
stride 2: 2x2 for images, 1x2 for series. On a single position a 1x1 convolution is a dense layer, so the same block
makes the perceptron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from esper_simic.growing_host.batch_normalisation import batch_norm_rectify
from esper_simic.growing_host.blueprints import Piece
from esper_simic.growing_host.convolutions import convolve
from esper_simic.growing_host.functional import EPSILON
from esper_simic.growing_host.hosts.layers import Pieces, Shape, Statistics


@dataclass(frozen=True, slots=True)
class PlainStem:
    """Samples as they are; no parameters."""

    output: Shape

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """None."""
        return ()

    def forward(self, pieces: Pieces, inputs: Tensor) -> Tensor:
        """`[R, C * H * W, B]` to `[R, C, H, W, B]`."""
        return inputs.view(len(inputs), *self.output, -1)


@dataclass(frozen=True, slots=True)
class ConvolutionBlock:
    """Convolution, batch normalisation, ReLU; `output` is before the pool."""

    channels_in: int
    output: Shape
    kernel: tuple[int, int]
    pool: tuple[int, int] | None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Kernels, scale, shift."""
        fan_in = self.channels_in * self.kernel[0] * self.kernel[1]
        channels = self.output.channels
        return (
            Piece(channels * fan_in, fan_in),
            Piece(channels, start="ones"),
            Piece(channels, start="zeros"),
        )

    @property
    def statistics(self) -> int:
        """One mean and variance a channel."""
        return self.output.channels

    def forward_train(self, pieces: Pieces, x: Tensor, statistics: Statistics) -> Tensor:
        """Normalise with the batch's own statistics."""
        kernels, scale, shift = pieces
        convolved = convolve(x, kernels, self.kernel)
        return batch_norm_rectify(convolved, scale, shift, statistics.mean, statistics.variance)

    def prepare(self, pieces: Pieces, statistics: Statistics) -> Pieces:
        """Convolution and normalisation as one affine map: kernels `[R, O, I * kh * kw]` and bias `[R, O, 1]`."""
        kernels, scale, shift = pieces
        slope = scale * torch.rsqrt(statistics.variance + EPSILON)
        bias = shift - statistics.mean * slope
        shaped = kernels.reshape(*scale.shape, -1)
        return shaped * slope.unsqueeze(2), bias.unsqueeze(2)

    def forward_measure(self, prepared: Pieces, x: Tensor) -> Tensor:
        """The folded map and ReLU."""
        kernels, bias = prepared
        rows, outputs = bias.shape[:2]
        # Where every host sees the same samples, they are one host with the channels of all of them.
        folded = kernels.reshape(len(x), -1)
        out = torch.relu_(convolve(x, folded, self.kernel).view(rows, outputs, -1).add_(bias))
        return out.view(rows, outputs, *x.shape[2:])


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """Mean over positions, then a linear map with bias."""

    channels: int
    classes: int

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Weight and bias."""
        return Piece(self.classes * self.channels, self.channels), Piece(self.classes, self.channels)

    def forward(self, pieces: Pieces, stem: Pieces, x: Tensor) -> Tensor:
        """`[R, C, H, W, B]` to `[R, classes, B]`."""
        weight, bias = pieces
        pooled = x.mean((2, 3))
        return torch.baddbmm(bias.unsqueeze(2), weight.reshape(len(weight), self.classes, -1), pooled)


def max_pool(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Max-pool whose stride is its window: `[R, C, H, W, B]` gives `[R, C, H / h, W / w, B]`.

    The samples are seen as the channels of channels-last memory, where torch's pool is fastest.
    """
    rows, channels, height, width, samples = x.shape
    maps = x.reshape(rows * channels, height, width, samples).permute(0, 3, 1, 2)
    pooled = torch_functional.max_pool2d(maps, window).permute(0, 2, 3, 1)
    return pooled.reshape(rows, channels, height // window[0], width // window[1], samples)
