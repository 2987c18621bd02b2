"""Batch normalisation and ReLU of many hosts as one operation, in the layout `[rows, channels, ..., samples]`.

    z = (x - mean) / sqrt(variance + epsilon),    y = relu(scale * z + shift)

with the mean and the (biased) variance of each row and channel over all positions and samples. The forward pass works
in place on one copy, and takes the variance from the centred values; torch's own spends two to three times as long
on the same statistics. The backward pass is torch's kernel, which reads the input once
(docs/decisions/0010-convolutions.md).

Source: Ioffe & Szegedy 2015, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from esper_simic.growing_host.functional import EPSILON, RUNNING_MOMENTUM


class _BatchNormRectify(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, running_mean: Tensor, running_variance: Tensor
    ) -> Tensor:
        rows, channels = scale.shape
        flat = x.reshape(1, rows * channels, -1)
        count = flat.shape[2]
        mean = flat.mean(2, keepdim=True)
        out = flat - mean
        variance = torch.linalg.vecdot(out, out).view(-1) / count
        running_mean.lerp_(mean.view(rows, channels), RUNNING_MOMENTUM)
        running_variance.lerp_(variance.view(rows, channels) * (count / (count - 1)), RUNNING_MOMENTUM)
        inverse = torch.rsqrt(variance + EPSILON)
        weight = scale.reshape(-1)
        out.mul_((inverse * weight).unsqueeze(1)).add_(shift.reshape(-1, 1)).relu_()
        ctx.save_for_backward(flat, weight, mean.view(-1), inverse, out)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        flat, weight, mean, inverse, out = ctx.saved_tensors
        rows = gradient.shape[0]
        g = torch.ops.aten.threshold_backward(gradient.reshape(flat.shape), out, 0)
        g_x, g_scale, g_shift = torch.ops.aten.native_batch_norm_backward(
            g, flat, weight, None, None, mean, inverse, True, EPSILON, [ctx.needs_input_grad[0], True, True]
        )
        return g_x.view(gradient.shape), g_scale.view(rows, -1), g_shift.view(rows, -1), None, None


def batch_norm_rectify(
    x: Tensor, scale: Tensor, shift: Tensor, running_mean: Tensor, running_variance: Tensor
) -> Tensor:
    """`relu(scale * z + shift)` with `z` the input normalised per row and channel over positions and samples.

    Args:
        x: `[R, C, H, W, B]`, with at least two numbers a channel.
        scale: `[R, C]`.
        shift: `[R, C]`.
        running_mean: `[R, C]`; moved in place by `RUNNING_MOMENTUM` towards the batch's mean.
        running_variance: `[R, C]`; likewise, towards the batch's unbiased variance.

    Returns:
        `[R, C, H, W, B]`.
    """
    out: Tensor = _BatchNormRectify.apply(x, scale, shift, running_mean, running_variance)
    return out
