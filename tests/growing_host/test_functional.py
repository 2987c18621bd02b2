"""Hand-written operations against torch's own and against automatic differentiation of their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper_simic.growing_host.functional import (
    batch_norm_rectify,
    convolution_3x3,
    graft,
    group_norm,
    max_pool,
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


def same(ours, reference, leaves, atol=1e-10):
    """Equal values, and equal gradients of a random linear functional."""
    torch.testing.assert_close(ours, reference, atol=atol, rtol=0)
    weights = random(*ours.shape)
    got = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((reference * weights).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_batch_norm_rectify(channels):
    x = (random(ROWS, channels, SIDE, SIDE, SAMPLES) + 1).requires_grad_()
    scale, shift = random(ROWS, channels).requires_grad_(), random(ROWS, channels, 1)[..., 0].requires_grad_()
    means, variances = random(ROWS, channels), random(ROWS, channels).abs()
    expected_means, expected_variances = means.clone(), variances.clone()
    ours = batch_norm_rectify(x, scale, shift, means, variances)
    reference = []
    for row in range(ROWS):
        normed = F.batch_norm(
            images(x[row]),
            expected_means[row],
            expected_variances[row],
            scale[row],
            shift[row],
            training=True,
        )
        reference.append(torch.relu(normed).permute(1, 2, 3, 0))
    same(ours, torch.stack(reference), [x, scale, shift])
    torch.testing.assert_close(means, expected_means)
    torch.testing.assert_close(variances, expected_variances)


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


def test_pointwise_convolution_and_pool():
    x = random(ROWS, 2, SIDE, SIDE, SAMPLES).requires_grad_()
    weight = random(ROWS, 3, 2).requires_grad_()
    reference = torch.stack(
        [
            F.max_pool2d(F.conv2d(images(x[row]), weight[row][:, :, None, None]), 2).permute(1, 2, 3, 0)
            for row in range(ROWS)
        ]
    )
    same(max_pool(pointwise_convolution(x, weight)), reference, [x, weight])


def literal_graft(host, seed, lanes, alphas, isolated):
    rows = list(host)
    for position, lane in enumerate(lanes):
        if isolated[position]:
            rows[lane] = rows[lane] + (seed[position] - seed[position].detach())
        else:
            rows[lane] = (1 - alphas[position]) * rows[lane] + alphas[position] * seed[position]
    return torch.stack(rows)


@pytest.mark.parametrize("lanes", [[2, 0], [1], [0, 1, 2]])
def test_graft(lanes):
    host = random(ROWS, 2, SIDE, SIDE, SAMPLES).requires_grad_()
    seed = random(len(lanes), 2, SIDE, SIDE, SAMPLES).requires_grad_()
    isolated = [position % 2 == 0 for position in range(len(lanes))]
    alphas = [0.0 if alone else 0.3 for alone in isolated]
    alpha = torch.tensor(alphas, dtype=torch.float64)
    share = torch.where(torch.tensor(isolated), 1.0, alpha)
    reference = literal_graft(host, seed, lanes, alphas, isolated)
    rows = None if lanes == [0, 1, 2] else torch.tensor(lanes)
    same(graft(host, seed, rows, alpha, share), reference, [host, seed])


def test_a_seed_in_isolation_leaves_every_bit_of_the_host():
    host = torch.randn(ROWS, 2, SIDE, SIDE, SAMPLES, generator=torch.Generator().manual_seed(1))
    seed = 1e6 * torch.randn(ROWS, 2, SIDE, SIDE, SAMPLES, generator=torch.Generator().manual_seed(2))
    zero, one = torch.zeros(ROWS), torch.ones(ROWS)
    assert torch.equal(graft(host, seed, None, zero, one), host)
    assert torch.equal(graft(host, seed[:1], torch.tensor([1]), zero[:1], one[:1]), host)
