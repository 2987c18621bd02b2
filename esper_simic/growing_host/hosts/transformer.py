"""A small causal transformer: tokens in, the next token of every position out.

A position is a pixel of a picture of height 1: features are `[rows, width, 1, positions, samples]`. The stem adds the
embedding of the token and of its position. A block is pre-norm,

    x <- x + W_o attention(LN(x)),    x <- x + W_2 gelu(W_1 LN(x)),

all maps with bias, the inner one four times as wide. The head is a last LN and the embedding's own weights (tied), so
a host of width 384 with 6 heads, 6 blocks, 256 positions and a vocabulary of 50257 has 30 044 544 parameters.

Sources: Vaswani et al. 2017 (attention); Xiong et al. 2020 (pre-norm); Press & Wolf 2017 (tied embedding); Hendrycks &
Gimpel 2016 (gelu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from esper_simic.growing_host.blueprints import Piece
from esper_simic.growing_host.functional import causal_attention, layer_norm, linear
from esper_simic.growing_host.hosts.layers import Pieces, Shape, Statistics

EXPANSION: Final = 4
"""Width of a block's inner layer, in widths of the host."""


@dataclass(frozen=True, slots=True)
class TokenStem:
    """Embedding of tokens plus embedding of positions."""

    vocabulary: int
    output: Shape

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Table of tokens `[V, C]`, table of positions `[C, L]`."""
        channels, _, positions = self.output
        return Piece(self.vocabulary * channels, channels), Piece(channels * positions, channels)

    def forward(self, pieces: Pieces, inputs: Tensor) -> Tensor:
        """Tokens `[R or 1, L, B]` int64 to `[R, C, 1, L, B]`."""
        tokens, places = pieces
        rows = len(tokens)
        channels, _, positions = self.output
        # All tables as one: row r of the hosts looks its tokens up behind those of the rows before it.
        first = torch.arange(rows, device=tokens.device).view(-1, 1) * self.vocabulary
        chosen = torch_functional.embedding(
            first + inputs.reshape(len(inputs), -1), tokens.reshape(-1, channels)
        )
        embedded = chosen.transpose(1, 2).reshape(rows, channels, 1, positions, -1)
        return embedded + places.reshape(rows, channels, 1, positions, 1)


@dataclass(frozen=True, slots=True)
class TransformerBlock:
    """Causal self-attention and a two-layer perceptron, both residual and pre-norm."""

    output: Shape
    heads: int

    @property
    def pool(self) -> tuple[int, int] | None:
        """A transformer does not pool."""
        return None

    @property
    def statistics(self) -> int:
        """It keeps none: layer normalisation needs no batch."""
        return 0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """LN, query-key-value, output; LN, inner, outer."""
        width, inner = self.output.channels, EXPANSION * self.output.channels
        norm = Piece(width, start="ones"), Piece(width, start="zeros")
        return (
            *norm,
            *_linear(width, 3 * width),
            *_linear(width, width),
            *norm,
            *_linear(width, inner),
            *_linear(inner, width),
        )

    def forward_train(self, pieces: Pieces, x: Tensor, statistics: Statistics) -> Tensor:
        """The same computation in training and in measuring."""
        return self.forward_measure(pieces, x)

    def prepare(self, pieces: Pieces, statistics: Statistics) -> Pieces:
        """Nothing to fold."""
        return pieces

    def forward_measure(self, prepared: Pieces, x: Tensor) -> Tensor:
        """`[R, C, 1, L, B]` to the same shape."""
        attention, perceptron = prepared[:6], prepared[6:]
        x = x + self._attend(attention, x)
        scale, shift, inner_weight, inner_bias, outer_weight, outer_bias = perceptron
        hidden = torch_functional.gelu(linear(layer_norm(x, scale, shift), inner_weight, inner_bias))
        return x + linear(hidden, outer_weight, outer_bias)

    def _attend(self, pieces: Pieces, x: Tensor) -> Tensor:
        scale, shift, mixed_weight, mixed_bias, out_weight, out_bias = pieces
        mixed = linear(layer_norm(x, scale, shift), mixed_weight, mixed_bias)
        return linear(causal_attention(mixed, self.heads), out_weight, out_bias)


@dataclass(frozen=True, slots=True)
class TokenHead:
    """A last layer normalisation, then the scores of all tokens: inner products with their embeddings."""

    width: int
    vocabulary: int

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Scale and shift; the embedding is the stem's."""
        return Piece(self.width, start="ones"), Piece(self.width, start="zeros")

    def forward(self, pieces: Pieces, stem: Pieces, x: Tensor) -> Tensor:
        """`[R, C, 1, L, B]` to `[R, V, L * B]`."""
        normed = layer_norm(x, *pieces).reshape(len(x), self.width, -1)
        return torch.bmm(stem[0].reshape(len(x), self.vocabulary, self.width), normed)


def _linear(inputs: int, outputs: int) -> tuple[Piece, Piece]:
    return Piece(inputs * outputs, inputs), Piece(outputs, start="zeros")
