"""Operations in the layout of many hosts against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper_simic.growing_host.functional import (
    causal_attention,
    convolution_3x3,
    group_norm,
    layer_norm,
    linear,
    patches,
    pointwise_convolution,
)

ROWS, SAMPLES, SIDE = 3, 5, 4


def random(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) * 7 + shape[-1])
    )


def images(x):
    """One lane's features `[C, H, W, B]` as torch's `[B, C, H, W]`."""
    return x.permute(3, 0, 1, 2)


def texts(x):
    """One lane's features `[C, 1, L, B]` as torch's `[B, L, C]`."""
    return x[:, 0].permute(2, 1, 0)


def from_texts(x):
    return x.permute(2, 1, 0)[:, None]


def same(ours, reference, leaves, atol=1e-10):
    """Equal values, and equal gradients of a random linear functional."""
    torch.testing.assert_close(ours, reference, atol=atol, rtol=0)
    weights = random(*ours.shape)
    got = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((reference * weights).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 1), (4, 2), (6, 3)])
def test_group_norm(channels, groups, rectify):
    x = random(ROWS, channels, SIDE, SIDE, SAMPLES).requires_grad_()
    scale, shift = random(ROWS, channels).requires_grad_(), random(ROWS, channels, 1)[..., 0].requires_grad_()
    reference = torch.stack(
        [
            F.group_norm(images(x[row]), groups, scale[row], shift[row]).permute(1, 2, 3, 0)
            for row in range(ROWS)
        ]
    )
    same(
        group_norm(x, scale, shift, groups, rectify=rectify),
        torch.relu(reference) if rectify else reference,
        [x, scale, shift],
    )


@pytest.mark.parametrize("channels", [1, 6])
def test_layer_norm(channels):
    x = random(ROWS, channels, 1, SIDE, SAMPLES).requires_grad_()
    scale, shift = random(ROWS, channels).requires_grad_(), random(ROWS, channels, 1)[..., 0].requires_grad_()
    reference = [
        from_texts(F.layer_norm(texts(x[row]), (channels,), scale[row], shift[row])) for row in range(ROWS)
    ]
    same(layer_norm(x, scale, shift), torch.stack(reference), [x, scale, shift])


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 2), (3, 5)])
def test_convolution_3x3(inputs, outputs):
    x = random(ROWS, inputs, SIDE, SIDE, SAMPLES).requires_grad_()
    weight = random(ROWS, outputs, inputs * 9).requires_grad_()
    reference = torch.stack(
        [
            F.conv2d(images(x[row]), weight[row].view(outputs, inputs, 3, 3), padding=1).permute(1, 2, 3, 0)
            for row in range(ROWS)
        ]
    )
    same(convolution_3x3(x, weight), reference, [x, weight])


def test_pointwise_convolution():
    x = random(ROWS, 2, SIDE, SIDE, SAMPLES).requires_grad_()
    weight = random(ROWS, 3, 2).requires_grad_()
    reference = [
        F.conv2d(images(x[row]), weight[row][:, :, None, None]).permute(1, 2, 3, 0) for row in range(ROWS)
    ]
    same(pointwise_convolution(x, weight), torch.stack(reference), [x, weight])


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (3, 1), (5, 3)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (4, 4)])
def test_patches(kernel, height, width):
    x = random(ROWS, 2, height, width, SAMPLES).requires_grad_()
    padding = (kernel[0] // 2, kernel[1] // 2)
    reference = [
        F.unfold(images(x[row]), kernel, padding=padding)
        .view(SAMPLES, 2, kernel[0] * kernel[1], height * width)
        .permute(1, 2, 3, 0)
        .flatten(2)
        for row in range(ROWS)
    ]
    same(patches(x, kernel), torch.stack(reference), [x])


def test_linear():
    x = random(ROWS, 2, 1, SIDE, SAMPLES).requires_grad_()
    weight, bias = random(ROWS, 6).requires_grad_(), random(ROWS, 3).requires_grad_()
    reference = [
        from_texts(F.linear(texts(x[row]), weight[row].view(3, 2), bias[row])) for row in range(ROWS)
    ]
    same(linear(x, weight, bias), torch.stack(reference), [x, weight, bias])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 50])
def test_causal_attention(heads, window):
    """Against a softmax over what a position may see, one after another."""
    channels, positions = 4, 7
    mixed = random(ROWS, 3 * channels, 1, positions, SAMPLES).requires_grad_()
    reach = positions if window is None else window
    size = channels // heads
    rows = []
    for row in range(ROWS):
        query, key, value = texts(mixed[row]).chunk(3, dim=2)
        out = torch.zeros(SAMPLES, positions, channels, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for position in range(positions):
                seen = [before for before in range(position + 1) if position - before < reach]
                scores = (query[:, position, None, part] * key[:, seen, part]).sum(2) / size**0.5
                out[:, position, part] = (torch.softmax(scores, 1)[:, :, None] * value[:, seen, part]).sum(1)
        rows.append(from_texts(out))
    same(causal_attention(mixed, heads, window), torch.stack(rows), [mixed])
