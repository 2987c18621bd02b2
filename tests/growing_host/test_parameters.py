"""The bank: seeds come and go with their momentum, gates are appended, lanes are copied and put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.compositions import gate_parameter_count
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.parameters import ParameterBank
from tests.growing_host.mixed_lanes import TaskOfKind
from tests.growing_host.test_training import mixed

SLOTS = ("r0c0", "r1c2")
CONFIG = EnvironmentConfig(blueprints=("conv_light", "norm"))


def bank(lanes=3):
    spec = build_host("augment", TaskOfKind("image"))
    return ParameterBank(lanes, spec, SLOTS, CONFIG)


def segment(of, slot):
    return slice(of.slot_offsets[slot], of.slot_offsets[slot] + of.slot_widths[slot])


def test_a_slot_has_room_for_the_largest_blueprint_and_a_gate():
    made = bank()
    widths = [
        blueprint("conv_light").parameter_count(channels) + gate_parameter_count(channels)
        for channels in (8, 32)
    ]
    assert list(made.slot_widths) == widths
    assert made.slot_offsets == (made.spec.parameter_count, made.spec.parameter_count + widths[0])
    assert made.parameters.shape == (3, made.spec.parameter_count + sum(widths))


def test_creating_and_removing_a_seed_takes_its_momentum_along():
    made = bank()
    made.momentum[:] = 1.0
    made.create_seed(1, 0, np.full(10, 2.0))
    assert made.parameters[1, segment(made, 0)].sum() == 20
    assert made.momentum[1, segment(made, 0)].abs().sum() == 0
    made.momentum[1] = 3.0
    made.remove_seed(1, 0)
    assert made.parameters[1].abs().sum() == made.momentum[1, segment(made, 0)].abs().sum() == 0
    assert (made.momentum[1, segment(made, 1)] == 3).all()
    assert (made.momentum[[0, 2]] == 1).all()


def test_a_gate_is_appended_and_only_it_starts_anew():
    made = bank()
    made.create_seed(2, 1, np.full(5, 2.0))
    made.momentum[2] = 3.0
    made.append_gate(2, 1, 5, np.full(4, 7.0))
    start = made.slot_offsets[1]
    assert made.parameters[2, start : start + 10].tolist() == [2.0] * 5 + [7.0] * 4 + [0.0]
    assert made.momentum[2, start : start + 10].tolist() == [3.0] * 5 + [0.0] * 4 + [3.0]


@pytest.mark.parametrize("act", ["seed", "gate"])
def test_what_does_not_fit_its_slot_is_a_contradiction(act):
    made = bank()
    with pytest.raises(InvariantViolation, match="slot r0c0, which holds"):
        if act == "seed":
            made.create_seed(0, 0, np.zeros(made.slot_widths[0] + 1))
        else:
            made.append_gate(0, 0, made.slot_widths[0] - 3, np.zeros(4))


def test_lanes_are_put_back_as_they_were_and_go_on_as_they_would_have():
    lanes = mixed("augment", torch.float32)
    lanes.train(lanes.batches())
    copy = lanes.bank.snapshot(np.array([4, 2]))
    samples = lanes.batches()
    lanes.train(samples)
    first = lanes.bank.snapshot(np.arange(6))
    lanes.bank.restore(np.array([4, 2]), copy)
    assert torch.equal(lanes.bank.parameters[[0, 1, 3, 5]], first.parameters[[0, 1, 3, 5]])
    assert torch.equal(lanes.bank.parameters[[4, 2]], copy.parameters)
    lanes.train(samples)
    again = lanes.bank.snapshot(np.array([4, 2]))
    assert torch.equal(again.parameters, first.parameters[[4, 2]])
    assert torch.equal(again.momentum, first.momentum[[4, 2]])
    for mine, theirs in zip(again.statistics, first.statistics, strict=True):
        assert torch.equal(mine.mean, theirs.mean[[4, 2]])
        assert torch.equal(mine.variance, theirs.variance[[4, 2]])


def test_a_copy_of_other_lanes_is_a_contradiction():
    made = bank()
    with pytest.raises(InvariantViolation, match="for 2 lanes"):
        made.restore(np.array([0, 1]), made.snapshot(np.array([0])))


def test_momentum_is_cleared_in_some_lanes():
    made = bank()
    made.momentum[:] = 1.0
    made.clear_momentum(np.array([0, 2]))
    assert made.momentum.sum(dim=1).tolist() == [0.0, float(made.momentum.shape[1]), 0.0]


def test_a_lane_starts_anew():
    made = bank()
    made.parameters[:], made.momentum[:] = 5.0, 5.0
    for statistics in made.statistics:
        statistics.mean[:], statistics.variance[:] = 5.0, 5.0
    row = np.arange(made.spec.parameter_count, dtype=np.float64)
    made.reset_lane(1, row)
    assert torch.equal(made.parameters[1, : len(row)], torch.tensor(row, dtype=torch.float32))
    assert made.parameters[1, len(row) :].abs().sum() == made.momentum[1].abs().sum() == 0
    assert (made.parameters[0] == 5).all()
    assert all((each.mean[1] == 0).all() and (each.variance[1] == 1).all() for each in made.statistics)


def test_weight_norms_are_those_of_the_layers():
    made = bank()
    row = np.arange(made.spec.parameter_count, dtype=np.float64) / 1000
    made.reset_lane(0, row)
    ends = np.cumsum(made.spec.layer_parameter_counts)
    expected = [np.linalg.norm(part) for part in np.split(row, ends[:-1])]
    np.testing.assert_allclose(made.weight_norms()[0], expected, rtol=1e-5)
    assert (made.weight_norms()[1] == 0).all()
