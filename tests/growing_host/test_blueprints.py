"""Blueprints: parameter counts, and the batched computation against ordinary modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esper_simic.actions import BLUEPRINTS
from esper_simic.config import BLUEPRINT_NAMES
from esper_simic.errors import ConfigError
from esper_simic.growing_host.blueprints import CATALOGUE, blueprint, normalisation_groups
from tests.growing_host import literal

COUNTS = {
    "norm": {8: 17, 16: 33, 32: 65, 64: 129},
    "attention": {8: 40, 16: 144, 32: 544, 64: 2112},
    "depthwise": {8: 152, 16: 432, 32: 1376, 64: 4800},
    "conv_light": {8: 592, 16: 2336, 32: 9280, 64: 36992},
    "conv_heavy": {8: 1184, 16: 4672, 32: 18560, 64: 73984},
}


@pytest.mark.parametrize(
    ("name", "channels", "count"),
    [(name, channels, count) for name, counts in COUNTS.items() for channels, count in counts.items()],
)
def test_parameter_counts(name, channels, count):
    found = blueprint(name)
    assert found.parameter_count(channels) == count
    assert len(found.initial_parameters(channels, np.random.default_rng(0))) == count


def test_three_light_seeds_on_the_rescue_host():
    assert [blueprint("conv_light").parameter_count(channels) for channels in (1, 2, 4)] == [11, 40, 152]


def test_the_catalogue_is_what_the_configuration_and_the_actions_name():
    assert set(CATALOGUE) == set(BLUEPRINT_NAMES) < set(BLUEPRINTS)


@pytest.mark.parametrize("name", ["noop", "Conv_light", "lora", ""])
def test_an_unknown_blueprint_is_an_error_and_never_nothing(name):
    with pytest.raises(ConfigError, match="unknown blueprint"):
        blueprint(name)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (4, 1), (16, 1), (32, 2), (64, 4), (24, 1), (48, 3)]
)
def test_normalisation_groups_divide_the_channels(channels, groups):
    assert normalisation_groups(channels) == groups


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
@pytest.mark.parametrize("name", BLUEPRINT_NAMES)
def test_many_seeds_at_once_are_ordinary_modules_one_by_one(name, channels):
    rng = np.random.default_rng(3)
    found = blueprint(name)
    rows = np.stack([found.initial_parameters(channels, rng) for _ in range(3)]) + rng.normal(
        0, 0.1, (3, found.parameter_count(channels))
    )
    x = torch.from_numpy(rng.normal(size=(3, channels, 4, 4, 5)))
    parameters = torch.from_numpy(rows).requires_grad_()
    ours = found.forward(parameters, x)
    assert ours.shape == x.shape
    weights = torch.from_numpy(rng.normal(size=x.shape))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), parameters)
    for row in range(3):
        made = literal.module(name, channels).double()
        literal.load(literal.flat(made), rows[row])
        expected = made(x[row].permute(3, 0, 1, 2)).permute(1, 2, 3, 0)
        torch.testing.assert_close(ours[row], expected, atol=1e-10, rtol=0)
        grads = torch.autograd.grad((expected * weights[row]).sum(), literal.flat(made))
        torch.testing.assert_close(
            gradient[row], torch.cat([grad.flatten() for grad in grads]), atol=1e-9, rtol=0
        )
