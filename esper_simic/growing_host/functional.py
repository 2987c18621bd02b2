"""The few operations of which batched hosts consist, written for the layout they run in.

**Layout.** Activations are `[rows, channels, height, width, samples]`: a row is one host (lane), the samples of its
batch lie innermost. Every host has its own weights, so a convolution over many hosts is a batched matrix product
`[rows, out, in] x [rows, in, height * width * samples]`: long contiguous inner loops however few channels a host has
(grouped convolutions were 4 to 20 times slower at 1 to 4 channels: docs/decisions/0001-batched-hosts.md). Statistics
over a batch reduce a contiguous axis; gathering some lanes is a copy of whole rows; a max-pool sees the samples as
channels in channels-last memory.

**Own gradients.** Group normalisation, 3x3 convolution and grafting have hand-written derivatives: torch has no such
operations in this layout, and composed ones cost several times as much at these sizes. Tests compare each with torch's
own operation in torch's own layout.
Legend: `g` gradient of the output, `z` a normalised value.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPSILON: Final = 1e-5
"""Added to variances by both normalisations."""

RUNNING_MOMENTUM: Final = 0.1
"""Weight of a new batch in the running statistics of batch normalisation."""


def pointwise_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution: `[R, I, H, W, B]` with weights `[R, O, I]` gives `[R, O, H, W, B]`."""
    rows, channels, height, width, samples = x.shape
    return torch.bmm(weight, x.reshape(rows, channels, -1)).view(rows, -1, height, width, samples)


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pool with stride 2: `[R, C, H, W, B]` gives `[R, C, H/2, W/2, B]`."""
    rows, channels, height, width, samples = x.shape
    maps = x.reshape(rows * channels, height, width, samples).permute(0, 3, 1, 2)
    pooled = torch_functional.max_pool2d(maps, 2).permute(0, 2, 3, 1)
    return pooled.reshape(rows, channels, height // 2, width // 2, samples)


def batch_norm_rectify(
    x: Tensor, scale: Tensor, shift: Tensor, running_mean: Tensor, running_variance: Tensor
) -> Tensor:
    """`relu(scale * z + shift)` with `z` the input normalised per row and channel over positions and samples.

    Args:
        x: `[R, C, H, W, B]`.
        scale: `[R, C]`.
        shift: `[R, C]`.
        running_mean: `[R, C]`, contiguous; moved in place by `RUNNING_MOMENTUM` towards the batch's mean.
        running_variance: `[R, C]`, contiguous; likewise, towards the batch's unbiased variance.

    Returns:
        `[R, C, H, W, B]`.

    Source: Ioffe & Szegedy 2015, algorithm 1.
    """
    rows, channels = scale.shape
    normed = torch_functional.batch_norm(
        x.reshape(1, rows * channels, -1),
        running_mean.view(-1),
        running_variance.view(-1),
        scale.reshape(-1),
        shift.reshape(-1),
        training=True,
        momentum=RUNNING_MOMENTUM,
        eps=EPSILON,
    )
    return torch.relu(normed).view(x.shape)


class _GroupNorm(Function):
    """Group normalisation, optionally followed by ReLU; see `group_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, rectify: bool) -> Tensor:
        rows, channels, samples = x.shape[0], x.shape[1], x.shape[-1]
        grouped = x.reshape(rows, groups, -1, samples)
        z = grouped - grouped.mean(2, keepdim=True)
        inverse = torch.rsqrt((z * z).mean(2, keepdim=True) + EPSILON)
        z *= inverse
        out = z.view(rows, channels, -1) * scale.unsqueeze(2)
        out += shift.unsqueeze(2)
        if rectify:
            out.relu_()
        ctx.save_for_backward(z, inverse, scale, out if rectify else None)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        z, inverse, scale, out = ctx.saved_tensors
        rows, channels = scale.shape
        g = gradient.reshape(rows, channels, -1)
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out, 0)
        g_shift = g.sum(2)
        g_scale = torch.linalg.vecdot(g, z.view(rows, channels, -1))
        g_x = None
        if ctx.needs_input_grad[0]:
            g_z = (g * scale.unsqueeze(2)).view(z.shape)
            # d/dx = (g_z - mean(g_z) - z mean(g_z z)) / deviation, means over what shares statistics.
            correlation = (g_z * z).mean(2, keepdim=True)
            g_x = g_z - g_z.mean(2, keepdim=True)
            g_x -= z * correlation
            g_x *= inverse
            g_x = g_x.view(gradient.shape)
        return g_x, g_scale, g_shift, None, None


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, *, rectify: bool = False) -> Tensor:
    """`scale * z + shift` with `z` normalised per row, sample and group of channels; ReLU on top if `rectify`.

    Args:
        x: `[R, C, H, W, B]`.
        scale: `[R, C]`.
        shift: `[R, C]`.
        groups: Groups of channels; divides C.
        rectify: Apply ReLU to the result.

    Returns:
        `[R, C, H, W, B]`.

    Source: Wu & He 2018, equation 1.
    """
    out: Tensor = _GroupNorm.apply(x, scale, shift, groups, rectify)
    return out


def patches(x: Tensor) -> Tensor:
    """3x3 neighbourhoods with zero padding: `[R, C, H, W, B]` gives `[R, C, 9, H * W * B]` (a copy)."""
    rows, channels, height, width, samples = x.shape
    padded = torch_functional.pad(x, (0, 0, 1, 1, 1, 1))
    row_stride = (width + 2) * samples
    map_stride = (height + 2) * row_stride
    windows = padded.as_strided(
        (rows, channels, 3, 3, height, width, samples),
        (channels * map_stride, map_stride, row_stride, samples, row_stride, samples, 1),
    )
    return windows.reshape(rows, channels, 9, height * width * samples)


class _Convolution3x3(Function):
    """3x3 convolution as a product with patches; see `convolution_3x3`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, channels = x.shape[:2]
        columns = patches(x).view(rows, channels * 9, -1)
        ctx.save_for_backward(columns, weight)
        ctx.shape = x.shape
        return torch.bmm(weight, columns).view(rows, weight.shape[1], *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        columns, weight = ctx.saved_tensors
        rows, outputs = weight.shape[:2]
        g = gradient.reshape(rows, outputs, -1)
        g_weight = torch.bmm(g, columns.transpose(1, 2))
        g_x = None
        if ctx.needs_input_grad[0]:
            # The adjoint of a padded 3x3 convolution is one with the kernel turned by half a turn.
            turned = weight.view(rows, outputs, -1, 9).flip(3).transpose(1, 2).reshape(rows, -1, outputs * 9)
            g_columns = patches(gradient).view(rows, outputs * 9, -1)
            g_x = torch.bmm(turned, g_columns).view(ctx.shape)
        return g_x, g_weight


def convolution_3x3(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution, stride 1, zero padding 1, without bias, each row with its own kernels.

    Args:
        x: `[R, I, H, W, B]`.
        weight: `[R, O, I * 9]`; the nine taps of an input channel are consecutive, row by row.

    Returns:
        `[R, O, H, W, B]`.
    """
    out: Tensor = _Convolution3x3.apply(x, weight)
    return out


class _Graft(Function):
    """Blending of seeds into hosts; see `graft`."""

    @staticmethod
    def forward(
        ctx: Any, host: Tensor, seed: Tensor, lanes: Tensor | None, alpha: Tensor, seed_share: Tensor
    ) -> Tensor:
        ctx.save_for_backward(lanes, alpha, seed_share)
        weight = _per_row(alpha, seed)
        if lanes is None:
            return torch.lerp(host, seed, weight)
        return host.index_copy(0, lanes, torch.lerp(host.index_select(0, lanes), seed, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        lanes, alpha, seed_share = ctx.saved_tensors
        g = gradient if lanes is None else gradient.index_select(0, lanes)
        g_seed = g * _per_row(seed_share, g)
        g_host = g * _per_row(1 - alpha, g)
        if lanes is not None:
            g_host = gradient.index_copy(0, lanes, g_host)
        return g_host, g_seed, None, None, None


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *([1] * (like.dim() - 1)))


def graft(host: Tensor, seed: Tensor, lanes: Tensor | None, alpha: Tensor, seed_share: Tensor) -> Tensor:
    """Blend seeds into the rows of some lanes: `host + alpha (seed - host)`.

    The gradient of the output reaches the host with share `1 - alpha` and the seed with `seed_share`. That is `alpha`
    for a blended seed. For a seed in isolation `alpha = 0` and `seed_share = 1`: the literal form
    `host + (seed - stopgrad(seed))`, so the output equals the host's bit for bit, the host's gradient is what it would
    be without the seed, and the seed learns from the whole gradient.

    Args:
        host: `[E, C, H, W, B]` features of all lanes.
        seed: `[n, C, H, W, B]` features of the seeds.
        lanes: `[n]` int64, the lane of each seed, each at most once; None where seed i belongs to lane i for all lanes.
        alpha: `[n]` in [0, 1].
        seed_share: `[n]` in [0, 1].

    Returns:
        `[E, C, H, W, B]`; lanes without a seed are untouched.
    """
    out: Tensor = _Graft.apply(host, seed, lanes, alpha, seed_share)
    return out
