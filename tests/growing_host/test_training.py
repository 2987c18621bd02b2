"""Training and validation of many hosts at once, against one ordinary torch network after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esper_simic.actions import BLUEPRINTS
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.grafts import NO_SEED, seeds_in_training, seeds_in_validation
from esper_simic.growing_host.hosts import Block, HostSpec, build_host
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.training import EXPLODING_NORM, Trainer, report_gradients
from esper_simic.growing_host.validation import Validator
from esper_simic.lifecycle import LIVE, SeedStage
from tests.growing_host.literal import LiteralHost, flat, row_of

CONFIG = EnvironmentConfig(train_batch_size=8, train_batches=4, host_lr=0.03, seed_lr=0.05)
N, T, B, H, F = (
    SeedStage.DORMANT,
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.HOLDING,
    SeedStage.FOSSILIZED,
)
# One lane a row: what is in its three slots.
STAGES = np.array(
    [[N, N, N], [T, N, N], [B, B, B], [F, N, T], [H, F, B], [F, F, F], [T, B, H]], dtype=np.int8
)
KINDS: list[list[str | None]] = [
    [None, None, None],
    ["conv_light", None, None],
    ["conv_light", "conv_heavy", "attention"],
    ["norm", None, "conv_light"],
    ["depthwise", "conv_light", "norm"],
    ["conv_heavy", "depthwise", "conv_heavy"],
    ["attention", "attention", "depthwise"],
]


class Mixed:
    """Seven lanes in all sorts of stages, batched and literal, from the same numbers."""

    def __init__(self, dtype=torch.float64):
        task, rng = load_task("digits"), np.random.default_rng(5)
        self.spec = build_host("rescue", task)
        lanes = len(STAGES)
        self.bank = ParameterBank(lanes, self.spec, (0, 1, 2), CONFIG, dtype)
        self.alpha = np.where(STAGES == F, 1.0, np.where((STAGES == B) | (STAGES == H), 0.4, 0.0))
        self.kind = np.full(STAGES.shape, NO_SEED)
        self.literal = []
        for lane in range(lanes):
            row = self.spec.initial_parameters(rng)
            self.bank.reset_lane(lane, row)
            host = LiteralHost(row, lr=CONFIG.host_lr, momentum=CONFIG.momentum, clip=CONFIG.max_grad_norm)
            for slot, name in enumerate(KINDS[lane]):
                if name is not None:
                    seed = blueprint(name).initial_parameters(self.spec.blocks[slot].channels_out, rng)
                    self.kind[lane, slot] = BLUEPRINTS.index(name)
                    self.bank.create_seed(lane, slot, seed)
                    stage, alpha = SeedStage(int(STAGES[lane, slot])), float(self.alpha[lane, slot])
                    host.add_seed(slot, name, seed, stage, alpha, CONFIG.seed_lr)
            self.literal.append(host)
        self.images = torch.tensor(task.train_images, dtype=dtype)
        self.labels = torch.tensor(task.train_labels)
        self.trainer = Trainer(self.bank, self.images.flatten(1), self.labels, (0, 1, 2))
        self.validation = (
            torch.tensor(task.validation_images[:100], dtype=dtype),
            torch.tensor(task.validation_labels[:100]),
        )
        self.validator = Validator(self.bank, *self.validation, (0, 1, 2))
        self.rng = rng

    def samples(self):
        shape = (CONFIG.train_batches, len(STAGES), CONFIG.train_batch_size)
        return self.rng.integers(0, len(self.labels), shape)

    def train(self, samples):
        return self.trainer.train_epoch(samples, seeds_in_training(STAGES, self.kind, self.alpha))

    def measure(self, lanes=None):
        ablate = LIVE[STAGES] & (self.alpha > 0)
        return self.validator.measure(seeds_in_validation(STAGES, self.kind, self.alpha), ablate, lanes)

    def seed_row(self, lane, slot):
        start = self.bank.slot_offsets[slot]
        count = blueprint(KINDS[lane][slot]).parameter_count(self.spec.blocks[slot].channels_out)
        return self.bank.parameters[lane, start : start + count].numpy()


def test_two_epochs_equal_ordinary_networks_trained_one_by_one():
    mixed = Mixed()
    reports = []
    for _ in range(2):
        samples = mixed.samples()
        reports.append(mixed.train(samples))
        for lane, host in enumerate(mixed.literal):
            for seed in host.seeds.values():
                seed.norms.clear()
            for batch in samples[:, lane]:
                host.train_batch(mixed.images[batch], mixed.labels[batch])
    count = mixed.spec.parameter_count
    for lane, host in enumerate(mixed.literal):
        np.testing.assert_allclose(
            mixed.bank.parameters[lane, :count].numpy(), row_of(host.parameters), atol=1e-9
        )
        for block, norm in enumerate(host.norms):
            torch.testing.assert_close(
                mixed.bank.running_means[block][lane], norm.running_mean, atol=1e-9, rtol=0
            )
            torch.testing.assert_close(
                mixed.bank.running_variances[block][lane], norm.running_var, atol=1e-9, rtol=0
            )
        for slot, seed in host.seeds.items():
            np.testing.assert_allclose(mixed.seed_row(lane, slot), row_of(flat(seed.made)), atol=1e-9)
            assert reports[-1].seed_norm[lane, slot] == pytest.approx(np.mean(seed.norms), abs=1e-9)


def test_validation_equals_ordinary_networks_measured_one_by_one():
    mixed = Mixed()
    samples = mixed.samples()
    mixed.train(samples)
    for lane, host in enumerate(mixed.literal):
        for batch in samples[:, lane]:
            host.train_batch(mixed.images[batch], mixed.labels[batch])
    measured = mixed.measure()
    for lane, host in enumerate(mixed.literal):
        accuracy, loss = host.measure(*mixed.validation)
        assert measured.accuracy[lane] == pytest.approx(accuracy)
        assert measured.loss[lane] == pytest.approx(loss, abs=1e-9)
        for slot in range(3):
            if LIVE[STAGES[lane, slot]] and mixed.alpha[lane, slot] > 0:
                without, _ = host.measure(*mixed.validation, off=slot)
                assert measured.accuracy_without[lane, slot] == pytest.approx(without)
            else:
                assert np.isnan(measured.accuracy_without[lane, slot])


def test_some_lanes_are_measured_as_all_are():
    mixed = Mixed()
    mixed.train(mixed.samples())
    everyone, some = mixed.measure(), mixed.measure(np.array([6, 2]))
    np.testing.assert_array_equal(some.accuracy, everyone.accuracy[[6, 2]])
    np.testing.assert_array_equal(some.accuracy_without, everyone.accuracy_without[[6, 2]])
    np.testing.assert_allclose(some.loss, everyone.loss[[6, 2]], atol=1e-12)


def without_seeds(mixed):
    kind = np.full(STAGES.shape, NO_SEED)
    return seeds_in_training(np.full(STAGES.shape, N), kind, np.zeros(STAGES.shape))


def test_a_seed_in_training_changes_no_bit_of_its_host():
    """Parameters of the host after an epoch, with and without an isolated seed, are the same bits (float32)."""
    grown, bare = Mixed(torch.float32), Mixed(torch.float32)
    samples = grown.samples()
    stage = np.full(STAGES.shape, N)
    stage[:, 0] = T
    kind = np.full(STAGES.shape, NO_SEED)
    kind[:, 0] = BLUEPRINTS.index("conv_light")
    for lane in range(len(STAGES)):
        grown.bank.create_seed(lane, 0, blueprint("conv_light").initial_parameters(1, grown.rng))
    before = grown.bank.parameters.clone()
    grown.trainer.train_epoch(samples, seeds_in_training(stage, kind, np.zeros(STAGES.shape)))
    bare.trainer.train_epoch(samples, without_seeds(bare))
    count = grown.spec.parameter_count
    assert torch.equal(grown.bank.parameters[:, :count], bare.bank.parameters[:, :count])
    assert all(
        torch.equal(a, b) for a, b in zip(grown.bank.running_means, bare.bank.running_means, strict=True)
    )
    seed = slice(grown.bank.slot_offsets[0], grown.bank.slot_offsets[0] + 11)
    assert not torch.equal(grown.bank.parameters[:, seed], before[:, seed]), (
        "the isolated seed learned nothing"
    )


def test_no_seed_moves_a_number_of_another_lane():
    grown, bare = Mixed(), Mixed()
    samples = grown.samples()
    grown.train(samples)
    bare.trainer.train_epoch(samples, without_seeds(bare))
    assert torch.equal(grown.bank.parameters[0], bare.bank.parameters[0])


def test_creating_and_removing_a_seed_takes_its_momentum_along():
    mixed = Mixed()
    mixed.train(mixed.samples())
    bank, start = mixed.bank, mixed.bank.slot_offsets[1]
    end = mixed.bank.slot_offsets[2]
    others = bank.momentum[2, :start].clone()
    assert bank.momentum[2, start:end].abs().sum() > 0
    bank.remove_seed(2, 1)
    assert bank.momentum[2, start:end].abs().sum() == bank.parameters[2, start:end].abs().sum() == 0
    assert torch.equal(bank.momentum[2, :start], others)
    bank.momentum[2, start:end] = 1.0
    bank.create_seed(2, 1, np.ones(5))
    assert bank.momentum[2, start:end].abs().sum() == 0
    assert bank.parameters[2, start:end].sum() == 5


def test_a_gradient_that_is_not_finite_is_not_applied_and_is_reported():
    mixed = Mixed()
    before = mixed.bank.parameters.clone()
    start = mixed.bank.slot_offsets[0]
    mixed.bank.gradients[2, start] = float("nan")
    mixed.bank.gradients[2, 0] = 0.5
    squares = mixed.bank.step()
    assert torch.equal(mixed.bank.parameters[2, start:], before[2, start:])
    assert mixed.bank.parameters[2, 0] == pytest.approx(float(before[2, 0]) - 0.03 * 0.5)
    report = report_gradients(squares.numpy()[None], mixed.bank.layers)
    assert report.exploding[2].tolist() == [True, False, False]
    assert report.health[2, 0] == 0.0
    assert np.isfinite(report.seed_norm).all()


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


def test_host_parameter_counts():
    digits = build_host("rescue", load_task("digits"))
    assert digits.parameter_count == sum(digits.layer_parameter_counts) == 75
    colour = HostSpec("rescue", (Block(3, 1, 32), Block(1, 2, 16), Block(2, 4, 8)), 10)
    assert colour.parameter_count == sum(colour.layer_parameter_counts) == 77
