"""Training of many hosts at once, against one ordinary torch network after another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from esper_simic.growing_host import training
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import CATALOGUE
from esper_simic.growing_host.hosts import HOSTS
from esper_simic.growing_host.optimiser import Trained, descend
from esper_simic.growing_host.training import EXPLODING_NORM, report_gradients
from tests.growing_host.mixed_lanes import B, F, H, MixedLanes, Planted, T, TaskOfKind

ADD, MULTIPLY, GATE = Composition.ADD, Composition.MULTIPLY, Composition.GATE

TASKS = {
    "image": TaskOfKind("image", channels=3),
    "series": TaskOfKind("series", height=1, width=16),
    "vector": TaskOfKind("vector", channels=5, height=1, width=1, classes=3),
    "tokens": TaskOfKind("tokens", height=1, width=6, classes=12),
}
SEEDS = {
    "image": ("conv_light", "conv_heavy", "attention", "bottleneck"),
    "series": ("conv_light", "depthwise", "norm", "conv_small"),
    "vector": ("mlp", "lora", "norm", "mlp_small"),
    "tokens": ("mlp_small", "attention", "flex_attention", "norm"),
}
SMALL_HOSTS = [name for name in HOSTS if name not in ("deep_impaired", "highres", "scale")]


def mixed(host, dtype=torch.float64, **settings):
    """Six lanes in all sorts of stages, slots named out of order, both surfaces of a block where there are two."""
    task = TASKS[HOSTS[host].kind]
    one, two, three, four = SEEDS[task.kind]
    behind = "r1c0" if HOSTS[host].kind in ("image", "series") and host != "minimal" else "r0c1"
    lanes = [
        {},
        {"r0c0": Planted(T, one), behind: Planted(T, two, composition=MULTIPLY)},
        {"r0c0": Planted(B, two, 0.3), behind: Planted(B, one, 0.6, GATE), "r0c2": Planted(H, three, 1.0)},
        {"r0c0": Planted(F, three), "r0c2": Planted(T, one, composition=GATE)},
        {"r0c0": Planted(B, one, 0.5, frozen=True), behind: Planted(F, four), "r0c2": Planted(B, one, 0.7)},
        {"r0c0": Planted(B, one, 0.2, MULTIPLY), "r0c2": Planted(B, one, 0.9, frozen=True)},
    ]
    return MixedLanes(host, task, lanes, slots=("r0c2", behind, "r0c0"), dtype=dtype, **settings)


def assert_same_state(lanes, atol):
    count = lanes.spec.parameter_count
    for lane, host in enumerate(lanes.literal):
        np.testing.assert_allclose(lanes.bank.parameters[lane, :count], host.row(), rtol=0, atol=atol)
        for statistics, block in zip(lanes.bank.statistics, host.blocks, strict=True):
            if statistics.mean.shape[1]:
                ours = np.stack((statistics.mean[lane], statistics.variance[lane]))
                theirs = np.stack((block.norm.running_mean, block.norm.running_var))
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * atol)
        for name, seed in host.seeds.items():
            np.testing.assert_allclose(lanes.seed_row(lane, name), seed.row.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("host", SMALL_HOSTS)
def test_two_epochs_equal_ordinary_networks_trained_one_by_one(host):
    lanes = mixed(host)
    for samples in (lanes.batches(), lanes.batches()):
        report = lanes.train(samples)
        lanes.train_literally(samples)
        assert_same_state(lanes, 1e-8)
        for lane, literal in enumerate(lanes.literal):
            for name, seed in literal.seeds.items():
                norm = report.seed_norm[lane, lanes.slots.index(name)]
                assert norm == pytest.approx(0.0 if seed.frozen else np.mean(seed.norms), abs=1e-9)


@pytest.mark.parametrize("host", SMALL_HOSTS)
def test_one_batch_in_single_precision_gives_the_same_clipped_gradients(host):
    """From zero, momentum after one batch is the clipped gradient."""
    lanes = mixed(host, torch.float32, train_batches=1)
    samples = lanes.batches()
    lanes.train(samples)
    lanes.train_literally(samples)
    for lane, literal in enumerate(lanes.literal):
        gradient = torch.cat([velocity.flatten() for velocity in literal.velocity])
        ours = lanes.bank.momentum[lane, : lanes.spec.parameter_count]
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-5)
        for name, seed in literal.seeds.items():
            start = lanes.bank.slot_offsets[lanes.slots.index(name)]
            ours = lanes.bank.momentum[lane, start : start + len(seed.momentum)]
            np.testing.assert_allclose(ours, seed.momentum, rtol=0, atol=1e-5)


@pytest.mark.parametrize("composition", list(Composition))
@pytest.mark.parametrize("stage", [T, B, F])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, found in CATALOGUE.items() for kind in sorted(found.kinds)]
)
def test_every_blueprint_in_every_composition_trains_and_measures_as_alone(name, kind, stage, composition):
    host = next(host for host, made in HOSTS.items() if made.kind == kind)
    lanes = MixedLanes(
        host,
        TASKS[kind],
        [{}, {"r0c1": Planted(stage, name, 0.4, composition)}],
        slots=("r0c0", "r0c1"),
        dtype=torch.float32,
        train_batches=2,
        samples=20,
    )
    samples = lanes.batches()
    lanes.train(samples)
    lanes.train_literally(samples)
    assert_same_state(lanes, 1e-5)
    measured = lanes.measure(lanes.every_variant())
    for lane in range(2):
        accuracy, loss = lanes.measure_literally(lane)
        assert measured.accuracy[lane] == pytest.approx(accuracy)
        assert measured.loss[lane] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("host", ["rescue", "augment", "transformer"])
def test_tiles_change_rounding_only(host, monkeypatch):
    whole, cut = mixed(host), mixed(host)
    samples = whole.batches()
    report = whole.train(samples)
    monkeypatch.setattr(training, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(training, "GATHERED_WHOLE_MAX", 0)
    own = cut.train(samples)
    torch.testing.assert_close(cut.bank.parameters, whole.bank.parameters, rtol=0, atol=1e-12)
    torch.testing.assert_close(cut.bank.momentum, whole.bank.momentum, rtol=0, atol=1e-12)
    for field in dataclasses.fields(report):
        np.testing.assert_allclose(getattr(own, field.name), getattr(report, field.name), atol=1e-12)


@pytest.mark.parametrize("composition", list(Composition))
@pytest.mark.parametrize("host", SMALL_HOSTS)
def test_a_seed_in_training_changes_no_bit_of_its_host(host, composition):
    """Parameters of the host after an epoch, with and without an isolated seed, are the same bits (float32)."""
    task = TASKS[HOSTS[host].kind]
    planted = Planted(T, SEEDS[task.kind][0], composition=composition)
    grown = MixedLanes(host, task, [{"r0c1": planted}] * 3, slots=("r0c1",), dtype=torch.float32)
    bare = MixedLanes(host, task, [{"r0c1": planted}] * 3, slots=("r0c1",), dtype=torch.float32)
    bare.kind[:] = -1
    samples = grown.batches()
    before = grown.bank.parameters.clone()
    grown.train(samples)
    bare.train(samples)
    count = grown.spec.parameter_count
    assert torch.equal(grown.bank.parameters[:, :count], bare.bank.parameters[:, :count])
    for mine, theirs in zip(grown.bank.statistics, bare.bank.statistics, strict=True):
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.variance, theirs.variance)
    assert not torch.equal(grown.bank.parameters[:, count:], before[:, count:]), "the seed learned nothing"
    assert torch.equal(bare.bank.parameters[:, count:], before[:, count:])


def test_no_seed_moves_a_number_of_another_lane():
    grown, bare = mixed("augment"), mixed("augment")
    bare.kind[:] = -1
    samples = grown.batches()
    grown.train(samples)
    bare.train(samples)
    torch.testing.assert_close(grown.bank.parameters[0], bare.bank.parameters[0], rtol=0, atol=1e-13)


def test_a_lane_that_diverges_takes_no_other_along():
    sick, sound = mixed("augment"), mixed("augment")
    sick.bank.parameters[2] = float("nan")
    samples = sick.batches()
    report = sick.train(samples)
    sound.train(samples)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(
        sick.bank.parameters[others], sound.bank.parameters[others], rtol=0, atol=1e-13
    )
    assert report.exploding[2].all()
    assert np.isfinite(report.layer_norm).all()


@pytest.mark.parametrize("host", ["augment", "transformer"])
def test_a_frozen_seed_computes_and_stands_still(host):
    lanes = mixed(host)
    lanes.train(lanes.batches())
    lanes.frozen[:, lanes.slots.index("r0c2")] = True
    start = lanes.bank.slot_offsets[lanes.slots.index("r0c2")]
    end = start + lanes.bank.slot_widths[lanes.slots.index("r0c2")]
    parameters, momentum = lanes.bank.parameters.clone(), lanes.bank.momentum.clone()
    report = lanes.train(lanes.batches())
    assert torch.equal(lanes.bank.parameters[:, start:end], parameters[:, start:end])
    assert torch.equal(lanes.bank.momentum[:, start:end], momentum[:, start:end])
    assert momentum[2:4, start:end].abs().sum() > 0
    assert (report.seed_norm[:, lanes.slots.index("r0c2")] == 0).all()
    count = lanes.spec.parameter_count
    assert not torch.equal(lanes.bank.parameters[:, :count], parameters[:, :count])


def test_blended_seeds_and_hosts_adapt_to_each_other_in_transformers_only():
    """Does the host's gradient in front of a blended seed depend on what lies behind its input?"""

    def first_layer_gradient(host, stage):
        task = TASKS[HOSTS[host].kind]
        planted = {"r0c1": Planted(stage, SEEDS[task.kind][0], 1.0)}
        lanes = MixedLanes(host, task, [planted], slots=("r0c1",), train_batches=1)
        lanes.train(lanes.batches())
        return float(lanes.bank.momentum[0, : lanes.spec.layer_parameter_counts[0]].abs().sum())

    assert (
        first_layer_gradient("augment", F) == 0
    )  # all that is behind is the seed, and it sends nothing back
    assert first_layer_gradient("transformer", F) > 0
    assert first_layer_gradient("augment", T) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_not_applied(bad):
    """1e30 is finite, but its square is not in single precision."""
    rows = Trained(torch.ones(2, 3), torch.full((2, 3), 0.5), rate=0.1)
    gradient = torch.tensor([[1.0, bad, 1.0], [3.0, 0.0, 4.0]])
    descend(rows, gradient, (gradient * gradient).sum(1), decay=0.9, limit=1.0)
    torch.testing.assert_close(rows.momentum[0], torch.full((3,), 0.45))
    torch.testing.assert_close(rows.momentum[1], torch.tensor([0.45 + 0.6, 0.45, 0.45 + 0.8]))
    torch.testing.assert_close(rows.parameters, 1 - 0.1 * rows.momentum)


@pytest.mark.parametrize(
    ("norms", "health", "vanishing", "exploding"),
    [
        ([1.0, 2.0], 1.0, False, False),
        ([1.0, EXPLODING_NORM * 2], 0.5, False, True),
        ([0.0, 0.0], 0.0, True, False),
        ([0.0, 1.0, 1.0, 1.0], 0.75, False, False),
    ],
)
def test_gradient_reports(norms, health, vanishing, exploding):
    squares = np.array(norms)[:, None, None] ** 2 * np.array([0.0, 1.0])
    report = report_gradients(squares, 1)
    assert report.health.tolist() == [[health]]
    assert report.vanishing.tolist() == [[vanishing]]
    assert report.exploding.tolist() == [[exploding]]
    assert report.seed_norm[0, 0] == pytest.approx(np.mean(norms))
    assert report.layer_norm.tolist() == [[0.0]]


def test_a_gradient_that_is_not_finite_is_reported():
    report = report_gradients(np.array([[[1.0, np.nan, 1.0]], [[1.0, 4.0, np.inf]]]), 1)
    assert report.exploding.tolist() == [[True, True]]
    assert report.health.tolist() == [[0.5, 0.5]]
    assert np.isfinite(report.seed_norm).all()
