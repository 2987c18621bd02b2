"""Blueprints for texts and feature vectors: the same map at every position, and causal attention over positions.

All are residual. None mixes positions but attention, and that looks back only: what a position computes never depends
on one that follows it.
"""

from __future__ import annotations

from typing import Final

import torch.nn.functional as torch_functional
from torch import Tensor

from esper_simic.growing_host.blueprints.form import Form, Piece, residual
from esper_simic.growing_host.functional import causal_attention, layer_norm, linear, pointwise_convolution

HEADS_MAX: Final = 6
"""Heads of an attention seed, where the channels allow as many."""

HEAD_CHANNELS_MIN: Final = 8
"""Least channels of a head."""

WINDOW: Final = 16
"""Positions that local attention sees: its own and those just before it."""

Pieces = tuple[Piece, ...]


def attention_heads(channels: int) -> int:
    """The largest divisor of the channels up to `HEADS_MAX` that leaves each head `HEAD_CHANNELS_MIN`; at least 1."""
    bound = min(HEADS_MAX, channels // HEAD_CHANNELS_MIN)
    return max((heads for heads in range(1, bound + 1) if channels % heads == 0), default=1)


def _linear(inputs: int, outputs: int, *, last: bool = False) -> Pieces:
    return Piece(inputs * outputs, inputs, last=last), Piece(outputs, start="zeros", last=last)


def norm() -> Form:
    """`x + s (LayerNorm(x) - x)`, over the channels of each position."""

    def pieces(channels: int) -> Pieces:
        affine = Piece(channels, start="ones"), Piece(channels, start="zeros")
        return *affine, Piece(1, start="zeros", last=True)

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        scale, shift, strength = parts
        return strength.view(-1, 1, 1, 1, 1) * (layer_norm(x, scale, shift) - x)

    return residual(pieces, correction)


def low_rank(rank: int) -> Form:
    """`x + B A x` with A `[rank, C]` and B `[C, rank]`, which starts at 0 always."""

    def pieces(channels: int) -> Pieces:
        size = rank * channels
        return Piece(size, channels), Piece(size, start="zeros", last=True)

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        down, up = parts
        rows, channels = x.shape[:2]
        inner = pointwise_convolution(x, down.reshape(rows, rank, channels))
        return pointwise_convolution(inner, up.reshape(rows, channels, rank))

    return residual(pieces, correction)


def perceptron(expansion: int) -> Form:
    """`x + W2 gelu(W1 x + b1) + b2` with a hidden layer of `expansion` times the channels."""

    def pieces(channels: int) -> Pieces:
        hidden = expansion * channels
        return *_linear(channels, hidden), *_linear(hidden, channels, last=True)

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        inner_weight, inner_bias, outer_weight, outer_bias = parts
        return linear(torch_functional.gelu(linear(x, inner_weight, inner_bias)), outer_weight, outer_bias)

    return residual(pieces, correction)


def attention(window: int | None = None) -> Form:
    """`x + W_o A(W_qkv x + b) + b_o` with A causal self-attention, over the last `window` positions if given."""

    def pieces(channels: int) -> Pieces:
        return *_linear(channels, 3 * channels), *_linear(channels, channels, last=True)

    def correction(parts: tuple[Tensor, ...], x: Tensor) -> Tensor:
        mixed_weight, mixed_bias, out_weight, out_bias = parts
        mixed = linear(x, mixed_weight, mixed_bias)
        seen = causal_attention(mixed, attention_heads(x.shape[1]), window)
        return linear(seen, out_weight, out_bias)

    return residual(pieces, correction)
