"""Convolutions and batch normalisation of many hosts at once, against torch's own, host by host."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper_simic.growing_host import convolutions
from esper_simic.growing_host.batch_normalisation import batch_norm_rectify
from esper_simic.growing_host.convolutions import convolve
from esper_simic.growing_host.hosts.convolutional import max_pool

ROWS, SAMPLES = 3, 5


def random(*shape, dtype=torch.float64):
    chance = torch.Generator().manual_seed(sum(shape) * 7 + shape[-1])
    return torch.randn(*shape, dtype=dtype, generator=chance)


def one_by_one(operation, x, *others):
    """An operation of torch's on `[B, C, H, W]`, row by row of `[R, C, H, W, B]`."""
    rows = [
        operation(x[row].permute(3, 0, 1, 2), *(other[row] for other in others)).permute(1, 2, 3, 0)
        for row in range(len(x))
    ]
    return torch.stack(rows)


def same(ours, reference, leaves, atol=1e-10):
    """Equal values, and equal gradients of a random linear functional."""
    torch.testing.assert_close(ours, reference, atol=atol, rtol=0)
    weights = random(*ours.shape, dtype=ours.dtype)
    got = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((reference * weights).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("patch_elements_max", [0, 2**20])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 8), (8, 3), (8, 16), (16, 8), (6, 6)])
@pytest.mark.parametrize(
    ("kernel", "height", "width"),
    [((1, 1), 4, 3), ((3, 3), 4, 6), ((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 3), 1, 7), ((1, 3), 1, 1)],
)
def test_convolutions(kernel, height, width, inputs, outputs, patch_elements_max, monkeypatch):
    monkeypatch.setattr(convolutions, "PATCH_ELEMENTS_MAX", patch_elements_max)
    x = random(ROWS, inputs, height, width, SAMPLES).requires_grad_()
    weight = random(ROWS, outputs * inputs * kernel[0] * kernel[1]).requires_grad_()

    def literally(images, row):
        padding = (kernel[0] // 2, kernel[1] // 2)
        return F.conv2d(images, row.view(outputs, inputs, *kernel), padding=padding)

    same(convolve(x, weight, kernel), one_by_one(literally, x, weight), [x, weight])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 3)])
def test_input_without_gradient_costs_none(kernel, channels):
    x = random(ROWS, channels, 3, 4, SAMPLES)
    weight = random(ROWS, channels * channels * kernel[0] * kernel[1]).requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, weight, kernel).sum(), [weight])
    assert gradient.shape == weight.shape


@pytest.mark.parametrize(("channels", "side"), [(1, 4), (2, 4), (4, 1), (3, 2)])
def test_batch_norm_rectify(channels, side):
    x = (random(ROWS, channels, side, side, SAMPLES) + 1).requires_grad_()
    scale, shift = random(ROWS, channels).requires_grad_(), random(ROWS, channels + 1)[:, 1:].requires_grad_()
    means, variances = random(ROWS, channels), random(ROWS, channels).abs()
    expected_means, expected_variances = means.clone(), variances.clone()

    def literally(images, mean, variance, own_scale, own_shift):
        normed = F.batch_norm(images, mean, variance, own_scale, own_shift, training=True)
        return torch.relu(normed)

    ours = batch_norm_rectify(x, scale, shift, means, variances)
    same(ours, one_by_one(literally, x, expected_means, expected_variances, scale, shift), [x, scale, shift])
    torch.testing.assert_close(means, expected_means)
    torch.testing.assert_close(variances, expected_variances)


def test_batch_norm_keeps_its_precision_far_from_zero():
    """Features of mean 1000 and deviation 1 in single precision: centred before they are squared."""
    x = (random(1, 1, 8, 8, 32) + 1000).float()
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    variance = torch.ones(1, 1)
    batch_norm_rectify(x, one, zero, zero.clone(), variance)
    assert float(variance) == pytest.approx(0.9 + 0.1 * float(x.double().var()), rel=1e-4)


@pytest.mark.parametrize("window", [(2, 2), (1, 2)])
def test_max_pool(window):
    x = random(ROWS, 2, 4 if window[0] == 2 else 1, 6, SAMPLES).requires_grad_()
    same(max_pool(x, window), one_by_one(lambda images: F.max_pool2d(images, window), x), [x])
