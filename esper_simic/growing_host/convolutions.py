"""Convolutions of many hosts at once, each with its own kernels.

The layout is `[rows, channels, height, width, samples]` (`functional.py`).

There are four ways to compute one, and `convolve` takes the one that was fastest where it applies
(docs/decisions/0010-convolutions.md):

| kernel | where | how |
|---|---|---|
| 1x1 | always | one batched matrix product |
| 3x3 | channels on both sides are multiples of `WIDE` | torch's grouped convolution between two plain transpositions |
| 3x3 | narrower, and the nine-fold copy is small | products with gathered patches (`functional.convolution_3x3`) |
| 3x3, 1x3 | everything else | products with horizontally shifted copies |

**Shifted copies.** A `kh x kw` kernel is a sum over its rows: with the `kw` horizontal shifts of the input stacked as
channels, `X: [rows, in * kw, (height + kh - 1) * width * samples]`, row k of the kernel meets a contiguous slice of X,
because a vertical shift is an offset there. So `y = sum_k W_k X[..., k w b : (k + height) w b]`: `kw` copies instead of
`kh * kw`, and `kh` products that accumulate in place.

**Transposition.** The layout seen as a matrix `[rows * channels * height * width, samples]` is, transposed, torch's own
`[samples, rows * channels, height, width]`; a plain transposition costs little against the convolution from 8 channels
on.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from esper_simic.growing_host.functional import convolution_3x3, pointwise_convolution

WIDE: Final = 8
"""Channels in steps of which torch's grouped convolution fills its vector units."""

PATCH_ELEMENTS_MAX: Final = 2**20
"""Numbers in a nine-fold copy up to which gathering patches beats shifted copies (it stays in a core's cache)."""


def convolve(x: Tensor, weight: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Convolution with stride 1, zero padding that keeps the size, no bias; each row has its own kernels.

    Args:
        x: `[R, I, H, W, B]`.
        weight: `[R, O * I * kh * kw]`, or any shape of that order of elements.
        kernel: `(1, 1)`, `(1, 3)` or `(3, 3)`.

    Returns:
        `[R, O, H, W, B]`.
    """
    rows, inputs = x.shape[:2]
    if kernel == (1, 1):
        return pointwise_convolution(x, weight.reshape(rows, -1, inputs))
    kernels = weight.reshape(rows, -1, inputs, *kernel)
    if kernel == (3, 3):
        if inputs % WIDE == 0 and kernels.shape[1] % WIDE == 0:
            return _grouped(x, kernels)
        if 9 * x.numel() <= PATCH_ELEMENTS_MAX:
            return convolution_3x3(x, kernels.reshape(rows, -1, inputs * 9))
    out: Tensor = _Shifted.apply(x, kernels)
    return out


class _Transpose(Function):
    """`[N, M]` to a contiguous `[M, N]`, and the same for the gradient (autograd's own would come back strided)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.t().contiguous()


def _transpose(x: Tensor) -> Tensor:
    out: Tensor = _Transpose.apply(x)
    return out


def _grouped(x: Tensor, kernels: Tensor) -> Tensor:
    """Torch's grouped convolution, one group a row: `[R, I, H, W, B]` with `[R, O, I, 3, 3]`."""
    rows, inputs, height, width, samples = x.shape
    outputs = kernels.shape[1]
    maps = _transpose(x.reshape(-1, samples)).view(samples, rows * inputs, height, width)
    convolved = torch_functional.conv2d(maps, kernels.flatten(0, 1), padding=1, groups=rows)
    return _transpose(convolved.reshape(samples, -1)).view(rows, outputs, height, width, samples)


class _Shifted(Function):
    """A convolution as products with shifted copies; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        columns = _shifts(x, *kernels.shape[3:])
        ctx.save_for_backward(columns, kernels)
        ctx.shape = x.shape
        return _product(kernels, columns, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        columns, kernels = ctx.saved_tensors
        rows, outputs, inputs, kernel_height, kernel_width = kernels.shape
        line = ctx.shape[3] * ctx.shape[4]
        g = gradient.reshape(rows, outputs, -1)
        by_row = [
            torch.bmm(g, columns.narrow(2, k * line, g.shape[2]).transpose(1, 2))
            for k in range(kernel_height)
        ]
        g_kernels = torch.stack(by_row, dim=2).view(rows, outputs, kernel_height, inputs, kernel_width)
        g_x = None
        if ctx.needs_input_grad[0]:
            # The adjoint of a padded convolution is one with the kernel turned by half a turn.
            turned = kernels.flip(3, 4).transpose(1, 2)
            shape = (rows, outputs, *ctx.shape[2:])
            g_columns = _shifts(gradient.reshape(shape), kernel_height, kernel_width)
            g_x = _product(turned, g_columns, shape)
        return g_x, g_kernels.transpose(2, 3)


def _shifts(x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """The horizontal shifts of the input, stacked as channels: `[R, I * kw, (H + kh - 1) * W * B]`."""
    rows, channels, height, width, samples = x.shape
    above, beside = kernel_height // 2, kernel_width // 2
    stacked = x.new_zeros(rows, channels, kernel_width, height + kernel_height - 1, width, samples)
    inside = stacked.narrow(3, above, height)
    for position in range(kernel_width):
        shift = position - beside
        kept = width - abs(shift)
        if kept > 0:
            source = x.narrow(3, max(shift, 0), kept)
            inside.select(2, position).narrow(3, max(-shift, 0), kept).copy_(source)
    return stacked.view(rows, channels * kernel_width, -1)


def _product(kernels: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`sum_k W_k X[slice k]`, `[R, O, H, W, B]`; `shape` is that of the features behind `columns`."""
    rows, outputs, inputs, kernel_height, kernel_width = kernels.shape
    _, _, height, width, samples = shape
    line = width * samples
    by_row = kernels.permute(3, 0, 1, 2, 4).reshape(kernel_height, rows, outputs, inputs * kernel_width)
    out = torch.bmm(by_row[0], columns.narrow(2, 0, height * line))
    for k in range(1, kernel_height):
        out.baddbmm_(by_row[k], columns.narrow(2, k * line, height * line))
    return out.view(rows, outputs, height, width, samples)
