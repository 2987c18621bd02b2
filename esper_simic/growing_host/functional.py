"""The few operations of which batched hosts consist, written for the layout they run in.

**Layout.** Activations are `[rows, channels, height, width, samples]`: a row is one host (lane), the samples of its
batch lie innermost. Every host has its own weights, so a convolution over many hosts is a batched matrix product
`[rows, out, in] x [rows, in, height * width * samples]`: long contiguous inner loops however few channels a host has
(grouped convolutions were 4 to 20 times slower at 1 to 4 channels: docs/decisions/0001-batched-hosts.md). Statistics
over a batch reduce a contiguous axis; gathering some lanes is a copy of whole rows.

**Own gradients.** Group normalisation and 3x3 convolution have hand-written derivatives: torch has no such operations
in this layout, and composed ones cost several times as much at these sizes. Tests compare each with torch's own
operation in torch's own layout.
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
        groups, count, samples = z.shape[1:]
        g = gradient.reshape(rows, channels, -1)
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out, 0)
        g_z = g * z.view(rows, channels, -1)
        g_shift, g_scale = g.sum(2), g_z.sum(2)
        g_x = None
        if ctx.needs_input_grad[0]:
            # d/dx = (s g - mean(s g) - z mean(s g z)) / deviation with the scale s, means over what shares statistics:
            # weighted sums, and so products that read their input once.
            weights = (scale / count).repeat_interleave(groups * count // channels, 1)
            weights = weights.view(rows * groups, 1, count)
            mean, correlation = (
                torch.bmm(weights, each.view(-1, count, samples)).view(inverse.shape) for each in (g, g_z)
            )
            g_x = torch.mul(g, scale.unsqueeze(2), out=g_z).view(z.shape)
            g_x.addcmul_(z, correlation, value=-1).sub_(mean).mul_(inverse)
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


def patches(x: Tensor, kernel: tuple[int, int] = (3, 3)) -> Tensor:
    """Neighbourhoods with zero padding, k = kh * kw: `[R, C, H, W, B]` gives `[R, C, k, H * W * B]` (a copy).

    Args:
        x: `[R, C, H, W, B]`.
        kernel: Odd height kh and width kw of a neighbourhood.
    """
    rows, channels, height, width, samples = x.shape
    above, beside = kernel[0] // 2, kernel[1] // 2
    padded = torch_functional.pad(x, (0, 0, beside, beside, above, above))
    row_stride = (width + 2 * beside) * samples
    map_stride = (height + 2 * above) * row_stride
    windows = padded.as_strided(
        (rows, channels, *kernel, height, width, samples),
        (channels * map_stride, map_stride, row_stride, samples, row_stride, samples, 1),
    )
    return windows.reshape(rows, channels, kernel[0] * kernel[1], height * width * samples)


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


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same linear map at every position: `[R, I, H, W, B]`, `[R, O * I]`, `[R, O]` give `[R, O, H, W, B]`."""
    rows, inputs = x.shape[:2]
    mapped = torch.baddbmm(bias.unsqueeze(2), weight.reshape(rows, -1, inputs), x.reshape(rows, inputs, -1))
    return mapped.view(rows, -1, *x.shape[2:])


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer normalisation of each position's channels: `[R, C, H, W, B]` with scale and shift `[R, C]`.

    Source: Ba, Kiros & Hinton 2016, equation 3.
    """
    # One group of all channels whose "samples" are the positions of all samples.
    rows, channels = x.shape[:2]
    return group_norm(x.reshape(rows, channels, 1, 1, -1), scale, shift, 1).view(x.shape)


def causal_attention(mixed: Tensor, heads: int, window: int | None = None) -> Tensor:
    """Scaled dot-product attention in which a position sees itself and what came before.

    Args:
        mixed: `[R, 3 C, 1, L, B]`: queries, keys and values; of each, head after head.
        heads: Divides C.
        window: How many positions one sees, itself the last of them; all before it by default. The cost is that of
            full attention whatever the window.

    Returns:
        `[R, C, 1, L, B]`.

    Source: Vaswani et al. 2017, equation 1, with the mask of section 3.2.3; Beltagy, Peters & Cohan 2020, section 3.1
    (sliding window).
    """
    rows, width, _, positions, samples = mixed.shape
    channels = width // (3 * heads)
    # [R, 3, heads, c, L, B] -> [3, R, B, heads, L, c]
    split = mixed.view(rows, 3, heads, channels, positions, samples).permute(1, 0, 5, 2, 4, 3)
    query, key, value = split.reshape(3, rows * samples, heads, positions, channels)
    if window is None or window >= positions:
        seen = torch_functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        allowed = torch.ones(positions, positions, dtype=torch.bool, device=mixed.device)
        allowed = allowed.tril() & ~allowed.tril(-window)
        seen = torch_functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    by_row = seen.view(rows, samples, heads, positions, channels).permute(0, 2, 4, 3, 1)
    return by_row.reshape(rows, heads * channels, 1, positions, samples)
