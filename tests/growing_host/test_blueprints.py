"""Blueprints: parameter counts, starts, kinds, and the batched computation against ordinary modules."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import BLUEPRINTS
from esper_simic.config import BLUEPRINT_NAMES, DEFAULT_BLUEPRINTS, EnvironmentConfig
from esper_simic.errors import ConfigError, ContractError
from esper_simic.growing_host.blueprints import (
    CATALOGUE,
    Blueprint,
    Form,
    Piece,
    blueprint,
    normalisation_groups,
    probe,
    residual,
)
from esper_simic.growing_host.blueprints.sequence import WINDOW, attention_heads
from tests.growing_host import literal_blueprints as literal

IMAGE_COUNTS = {
    "norm": {8: 17, 16: 33, 32: 65, 64: 129},
    "attention": {8: 40, 16: 144, 32: 544, 64: 2112},
    "conv_small": {8: 80, 16: 288, 32: 1088, 64: 4224},
    "bottleneck": {8: 720, 16: 864, 32: 1152, 64: 4480},
    "depthwise": {8: 152, 16: 432, 32: 1376, 64: 4800},
    "conv_light": {8: 592, 16: 2336, 32: 9280, 64: 36992},
    "conv_heavy": {8: 1184, 16: 4672, 32: 18560, 64: 73984},
}
TOKEN_COUNTS = {
    "norm": 769,
    "lora": 6144,
    "lora_large": 24576,
    "attention": 591360,
    "flex_attention": 591360,
    "mlp_small": 590976,
    "mlp": 1181568,
}
FORMS = [(name, kind) for name, found in CATALOGUE.items() for kind in sorted(found.kinds)]
SHAPES = {"image": (4, 4), "series": (1, 6), "vector": (1, 1), "tokens": (1, 20)}
"""Height and width; a text is longer than the local window."""


@pytest.mark.parametrize(
    ("name", "channels", "count"),
    [(name, channels, count) for name, counts in IMAGE_COUNTS.items() for channels, count in counts.items()],
)
def test_parameter_counts_on_images(name, channels, count):
    found = blueprint(name)
    assert found.parameter_count(channels) == found.parameter_count(channels, "image") == count
    assert len(found.initial_parameters(channels, np.random.default_rng(0))) == count


@pytest.mark.parametrize(("name", "count"), TOKEN_COUNTS.items())
def test_parameter_counts_on_tokens(name, count):
    assert blueprint(name).parameter_count(384, "tokens") == count


@pytest.mark.parametrize("channels", [8, 16, 64])
@pytest.mark.parametrize(
    ("name", "kernels_on_image", "kernels_on_series"),
    [
        ("conv_light", lambda c: 9 * c * c, lambda c: 3 * c * c),
        ("conv_heavy", lambda c: 18 * c * c, lambda c: 6 * c * c),
        ("depthwise", lambda c: 9 * c, lambda c: 3 * c),
        ("bottleneck", lambda c: 9 * max(8, c // 4) ** 2, lambda c: 3 * max(8, c // 4) ** 2),
        ("conv_small", lambda c: 0, lambda c: 0),
        ("norm", lambda c: 0, lambda c: 0),
        ("attention", lambda c: 0, lambda c: 0),
    ],
)
def test_a_series_has_three_taps_where_an_image_has_nine(name, kernels_on_image, kernels_on_series, channels):
    found = blueprint(name)
    fewer = kernels_on_image(channels) - kernels_on_series(channels)
    assert found.parameter_count(channels, "image") - found.parameter_count(channels, "series") == fewer


def test_three_light_seeds_on_the_rescue_host():
    assert [blueprint("conv_light").parameter_count(channels) for channels in (1, 2, 4)] == [11, 40, 152]


def test_the_catalogue_is_what_the_configuration_and_the_actions_name():
    assert set(CATALOGUE) == set(BLUEPRINT_NAMES)
    assert ("noop", *BLUEPRINT_NAMES) == BLUEPRINTS


def test_the_blueprints_offered_by_default():
    assert DEFAULT_BLUEPRINTS == ("norm", "attention", "depthwise", "conv_light", "conv_heavy")
    assert EnvironmentConfig().blueprints == DEFAULT_BLUEPRINTS


def takers(kind):
    return {
        index for index, name in enumerate(BLUEPRINTS) if name != "noop" and kind in CATALOGUE[name].kinds
    }


def test_which_features_a_blueprint_takes():
    assert takers("image") == takers("series") == {1, 2, 3, 4, 5, 6, 7}
    assert takers("tokens") == {2, 3, 8, 9, 10, 11, 12}
    assert takers("vector") == {3, 8, 9, 10, 11}


@pytest.mark.parametrize("name", ["noop", "Conv_light", "lora_small", ""])
def test_an_unknown_blueprint_is_an_error_and_never_nothing(name):
    with pytest.raises(ConfigError, match="unknown blueprint"):
        blueprint(name)


def test_an_almost_known_blueprint_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'conv_light'"):
        blueprint("conv_ligth")


def test_features_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match="'lora' takes features of kind tokens or vector, not 'image'"):
        blueprint("lora").parameter_count(8)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (4, 1), (16, 1), (32, 2), (64, 4), (24, 1), (48, 3)]
)
def test_normalisation_groups_divide_the_channels(channels, groups):
    assert normalisation_groups(channels) == groups


@pytest.mark.parametrize(
    ("channels", "heads"), [(384, 6), (16, 2), (8, 1), (1, 1), (7, 1), (32, 4), (35, 1), (64, 4)]
)
def test_attention_heads(channels, heads):
    assert attention_heads(channels) == heads


def seeds(name, kind, channels, *, rows=3, samples=5, seed=3):
    """Rows of a blueprint away from their start, features, and weights of a linear functional."""
    rng = np.random.default_rng(seed)
    found = blueprint(name)
    started = np.stack([found.initial_parameters(channels, rng, kind) for _ in range(rows)])
    parameters = torch.from_numpy(started + rng.normal(0, 0.1, started.shape))
    x = torch.from_numpy(rng.normal(size=(rows, channels, *SHAPES[kind], samples)))
    return found, parameters, x, torch.from_numpy(rng.normal(size=x.shape))


@pytest.mark.parametrize("channels", [1, 2, 4, 8, 32])
@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_many_seeds_at_once_are_ordinary_modules_one_by_one(name, kind, channels):
    found, parameters, x, weights = seeds(name, kind, channels)
    parameters.requires_grad_()
    x.requires_grad_()
    for ours, theirs in ((found.forward, "forward"), (found.correction, "correction")):
        out = ours(parameters, x, kind)
        assert out.shape == x.shape
        g_parameters, g_x = torch.autograd.grad((out * weights).sum(), [parameters, x])
        for row in range(len(x)):
            made = literal.module(name, kind, channels)
            literal.load(made, parameters[row])
            own = x[row].detach().requires_grad_()
            expected = literal.from_torch(getattr(made, theirs)(literal.to_torch(own, kind)), kind)
            torch.testing.assert_close(out[row], expected, atol=1e-10, rtol=0)
            g_row, g_own = literal.gradient_row((expected * weights[row]).sum(), made, own)
            torch.testing.assert_close(g_parameters[row], g_row, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(g_x[row], g_own, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, kind in FORMS if kind == "image"])
def test_an_image_of_one_pixel_still_has_nine_taps(name):
    found = blueprint(name)
    row = torch.from_numpy(found.initial_parameters(4, np.random.default_rng(0)))[None]
    assert found.forward(row, torch.ones(1, 4, 1, 1, 2, dtype=torch.float64)).shape == (1, 4, 1, 1, 2)


@pytest.mark.parametrize("name", [name for name, kind in FORMS if kind == "tokens"])
@given(position=st.integers(0, 19), seed=st.integers(0, 9))
def test_a_position_of_a_text_does_not_see_what_follows(name, position, seed):
    found, parameters, x, _ = seeds(name, "tokens", 8, rows=1, samples=2, seed=seed)
    other = x.clone()
    other[:, :, :, position] += 1
    difference = (found.forward(parameters, x, "tokens") - found.forward(parameters, other, "tokens")).abs()
    moved = difference.amax((0, 1, 2, 4))
    assert bool((moved[:position] < 1e-12).all())
    assert moved[position] > 1e-6
    if name == "flex_attention":
        assert bool((moved[position + WINDOW :] < 1e-12).all())
    if name == "attention":
        assert bool((moved[position:] > 1e-12).all())


@pytest.mark.parametrize("channels", [1, 4, 8, 32])
@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_a_seed_whose_last_layer_is_zero_corrects_nothing_but_learns(name, kind, channels):
    found, _, x, weights = seeds(name, kind, channels)
    rows = [
        found.initial_parameters(channels, np.random.default_rng(row), kind, starts_at_zero=True)
        for row in range(3)
    ]
    parameters = torch.from_numpy(np.stack(rows)).requires_grad_()
    out = found.correction(parameters, x, kind)
    assert torch.equal(out, torch.zeros_like(out))
    (gradient,) = torch.autograd.grad((out * weights).sum(), parameters)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient.norm(dim=1) > 1e-3).all())
    pieces = found.pieces(channels, kind)
    for piece, part in zip(pieces, torch.split(gradient, [each.size for each in pieces], dim=1), strict=True):
        # A single channel may sit behind a ReLU that is off; of eight or more, some are on.
        assert not piece.last or channels < 8 or bool((part.norm(dim=1) > 1e-6).all())


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_only_the_last_layer_differs_where_a_seed_starts_at_zero(name, kind):
    found = blueprint(name)
    plain = found.initial_parameters(16, np.random.default_rng(5), kind)
    zeroed = found.initial_parameters(16, np.random.default_rng(5), kind, starts_at_zero=True)
    last = np.repeat(
        [piece.last for piece in found.pieces(16, kind)], [piece.size for piece in found.pieces(16, kind)]
    )
    assert 0 < last.sum() < len(plain)
    np.testing.assert_array_equal(zeroed, np.where(last, 0.0, plain))


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_a_fresh_row_is_uniform_within_its_fan_in(name, kind):
    found = blueprint(name)
    row = found.initial_parameters(24, np.random.default_rng(1), kind)
    start = 0
    for piece in found.pieces(24, kind):
        values = row[start : start + piece.size]
        start += piece.size
        if piece.start == "uniform":
            bound = 1 / math.sqrt(piece.fan_in)
            assert np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
        else:
            assert set(values) == {1.0 if piece.start == "ones" else 0.0}


@pytest.mark.parametrize("name", ["lora", "lora_large", "norm"])
def test_these_seeds_start_as_the_identity(name):
    found = blueprint(name)
    row = torch.from_numpy(found.initial_parameters(8, np.random.default_rng(0), "tokens"))[None]
    x = torch.randn(1, 8, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.forward(row, x, "tokens"), x)


@pytest.mark.parametrize("channels", [1, 8, 48])
@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_every_blueprint_passes_its_probe(name, kind, channels):
    probe(blueprint(name), channels, *SHAPES[kind], kind)


def shrinking(parts, x):
    return parts[0].view(-1, 1, 1, 1, 1) * x[:, :, ::2]


def impossible(parts, x):
    return torch.bmm(parts[0].view(len(x), 1, 1), x.flatten(2))


@pytest.mark.parametrize(
    ("compute", "reason"),
    [(shrinking, r"shape \[4, 1, 2\]; a seed must keep the shape"), (impossible, "cannot compute")],
)
def test_a_seed_that_does_not_keep_the_shape_does_not_germinate(compute, reason):
    def pieces(channels):
        return (Piece(1, start="ones"),)

    wrong = Blueprint("wrong", MappingProxyType({"image": Form(pieces, compute, compute)}))
    with pytest.raises(ContractError, match=reason):
        probe(wrong, 4, 2, 2)


def test_a_correction_of_another_shape_is_found_too():
    form = Form(lambda channels: (Piece(1),), lambda parts, x: x, shrinking)
    wrong = Blueprint("wrong", MappingProxyType({"image": form}))
    with pytest.raises(ContractError, match="correction of blueprint 'wrong'"):
        probe(wrong, 4, 2, 2)


def test_a_probe_refuses_features_of_another_kind():
    with pytest.raises(ConfigError, match="not 'image'"):
        probe(blueprint("mlp"), 8, 1, 1)


def test_a_user_can_make_a_residual_blueprint():
    def pieces(channels):
        return (Piece(channels, start="zeros", last=True),)

    def correction(parts, x):
        return parts[0].view(*x.shape[:2], 1, 1, 1) * x

    made = Blueprint("scale", MappingProxyType({"image": residual(pieces, correction)}))
    probe(made, 3, 2, 2)
    x = torch.arange(24.0).view(1, 3, 2, 2, 2)
    assert torch.equal(made.forward(torch.ones(1, 3), x), 2 * x)
