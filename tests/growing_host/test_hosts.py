"""Hosts: parameter counts, places for slots, what is refused, and their layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.config import HOST_NAMES, HOST_SURFACES, EnvironmentConfig, parse, slot_names
from esper_simic.errors import ConfigError
from esper_simic.growing_host.hosts import HOSTS, Shape, TransformerHost, build_host
from esper_simic.growing_host.trunk import flow_order, tiles
from tests.growing_host.mixed_lanes import TaskOfKind

COLOUR = TaskOfKind("image", channels=3, height=32, width=32)
OF_KIND = {
    "image": COLOUR,
    "series": TaskOfKind("series", height=1, width=40),
    "vector": TaskOfKind("vector", channels=13, height=1, width=1, classes=3),
    "tokens": TaskOfKind("tokens", height=1, width=32, classes=64),
}


def shaped(name):
    return build_host(name, OF_KIND[HOSTS[name].kind])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rescue", 77),
        ("minimal", 164),
        ("deep_impaired", 1_140),
        ("augment", 6_418),
        ("highres", 24_346),
        ("scale", 99_922),
        # 1x3 kernels of 2, 4, 8 channels with scale and shift, then 10 classes
        ("series", 2 * 3 + 4 + 8 * 3 + 8 + 32 * 3 + 16 + 90),
        # 13 features to 2, 4, 8, then 3 classes
        ("mlp", 26 + 4 + 8 + 8 + 32 + 16 + 27),
        # embedding and positions, three blocks, the last norm
        ("transformer", 64 * 16 + 32 * 16 + 3 * (12 * 16**2 + 13 * 16) + 32),
    ],
)
def test_parameter_counts(name, count):
    spec = shaped(name)
    assert spec.parameter_count == sum(spec.layer_parameter_counts) == sum(spec.pieces) == count
    assert len(spec.initial_parameters(np.random.default_rng(0))) == count
    assert len(spec.layer_outputs) == len(spec.layer_positions) == len(spec.layer_parameter_counts)


def test_rescue_on_digits():
    assert build_host("rescue", TaskOfKind("image")).parameter_count == 75


def test_a_transformer_of_the_known_size():
    task = TaskOfKind("tokens", height=1, width=256, classes=50_257)
    assert TransformerHost(384, 6, 6).build("large", task).parameter_count == 30_044_544


def test_the_configuration_knows_every_host_and_its_surfaces():
    assert set(HOST_NAMES) == set(HOSTS)
    for name in HOST_NAMES:
        assert tuple(place.name for place in shaped(name).slot_places) == slot_names(name)
        assert len(shaped(name).blocks) == HOST_SURFACES[name][0]


def test_places_tell_what_features_a_slot_meets():
    places = shaped("scale").places(("r1c4", "r0c0", "r1c0", "r0c4"))
    assert [(place.block, place.behind_pool) for place in places] == [
        (4, True),
        (0, False),
        (0, True),
        (4, False),
    ]
    assert [place.shape for place in places] == [
        Shape(128, 1, 1),
        Shape(8, 32, 32),
        Shape(8, 16, 16),
        Shape(128, 2, 2),
    ]
    assert flow_order(places) == [1, 2, 3, 0]
    series = shaped("series").places(("r1c0", "r0c2"))
    assert [place.shape for place in series] == [Shape(2, 1, 20), Shape(8, 1, 10)]
    assert shaped("transformer").places(("r0c1",))[0].shape == Shape(16, 1, 32)


def test_a_host_starts_as_its_pieces_say():
    spec = shaped("augment")
    row = torch.tensor(spec.initial_parameters(np.random.default_rng(3)))[None]
    pieces = spec.split(row)
    for (kernels, scale, shift), block in zip(pieces.blocks, spec.blocks, strict=True):
        fan_in = kernels.shape[1] / block.output.channels
        assert 0.9 < float(kernels.abs().max()) * fan_in**0.5 <= 1
        assert (scale == 1).all()
        assert (shift == 0).all()
    assert torch.equal(torch.cat([*pieces.stem, *sum(pieces.blocks, ()), *pieces.head], dim=1), row)


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("agument", COLOUR, ["unknown host 'agument'", "did you mean 'augment'", "rescue"]),
        ("deep_impaired", TaskOfKind("image", name="digits"), ["32 divides", "8 x 8", "resize", "minimal"]),
        ("rescue", TaskOfKind("image", height=8, width=12), ["8 divides", "8 x 12", "(minimal)"]),
        ("series", TaskOfKind("series", height=1, width=30), ["8 divides", "has 30", "resize"]),
        ("rescue", OF_KIND["tokens"], ["'image'", "'tokens'", "choose transformer"]),
        ("mlp", COLOUR, ["'vector'", "choose rescue or minimal or"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(name, task, words):
    with pytest.raises(ConfigError) as refused:
        build_host(name, task)
    assert refused.value.key == "environment.host"
    for word in words:
        assert word in str(refused.value)


def test_a_place_the_host_lacks_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="no slot 'r1c0'; did you mean 'r0c0'"):
        shaped("minimal").places(("r1c0",))


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("{host: agument}", "environment.host", "unknown host 'agument'; did you mean 'augment'"),
        ("{slots: [r0c3]}", "environment.slots", "unknown slot of rescue 'r0c3'"),
        ("{host: minimal, slots: [r1c0]}", "environment.slots", "did you mean 'r0c0'"),
        ("{slots: [r0c0, r0c0]}", "environment.slots", "each once"),
        ("{host: agument, slots: [r9c9]}", "environment.host", "unknown host"),
    ],
)
def test_the_configuration_refuses_unknown_hosts_and_slots(text, key, words):
    with pytest.raises(ConfigError) as refused:
        parse(f"environment: {text}")
    assert refused.value.key == key
    assert words in str(refused.value)


def test_both_surfaces_of_every_block_may_be_slots():
    config = EnvironmentConfig(host="deep_impaired", slots=slot_names("deep_impaired"))
    assert len(config.slots) == 10


@given(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 5000))
def test_tiles_cover_all_lanes_once_and_evenly(lanes, own, room):
    cut = tiles(lanes, own, room)
    assert [lane for start, end in cut for lane in range(start, end)] == list(range(lanes))
    sizes = [end - start for start, end in cut]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == 1 or max(sizes) * own <= room
