"""Fused validation with variants, against one ordinary torch network after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.errors import InvariantViolation
from esper_simic.growing_host import validation
from esper_simic.growing_host.counterfactual import Variants
from esper_simic.growing_host.grafts import seeds_in_validation
from esper_simic.growing_host.validation import Validator, _Rows
from tests.growing_host.mixed_lanes import B, F, MixedLanes, Planted, TaskOfKind
from tests.growing_host.test_training import SMALL_HOSTS, mixed

NOTHING = Variants(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.bool_))


@pytest.mark.parametrize("host", SMALL_HOSTS)
def test_every_variant_equals_an_ordinary_network_without_those_seeds(host):
    lanes = mixed(host)
    samples = lanes.batches()
    lanes.train(samples)
    lanes.train_literally(samples)
    variants = lanes.every_variant()
    measured = lanes.measure(variants)
    assert len(variants.lane) > 10
    for lane in range(len(lanes.literal)):
        accuracy, loss = lanes.measure_literally(lane)
        assert measured.accuracy[lane] == pytest.approx(accuracy)
        assert measured.loss[lane] == pytest.approx(loss, abs=1e-9)
    for index, (lane, keep) in enumerate(zip(variants.lane, variants.keep, strict=True)):
        accuracy, loss = lanes.measure_literally(lane, keep)
        assert measured.variant_accuracy[index] == pytest.approx(accuracy)
        assert measured.variant_loss[index] == pytest.approx(loss, abs=1e-9)


def test_some_lanes_are_measured_as_all_are():
    lanes = mixed("augment")
    lanes.train(lanes.batches())
    everyone = lanes.measure(lanes.every_variant())
    variants = lanes.every_variant()
    mine = np.isin(variants.lane, [5, 2])
    some = lanes.measure(Variants(variants.lane[mine], variants.keep[mine]), np.array([5, 2]))
    np.testing.assert_array_equal(some.accuracy, everyone.accuracy[[5, 2]])
    np.testing.assert_allclose(some.loss, everyone.loss[[5, 2]], atol=1e-12)
    np.testing.assert_array_equal(some.variant_accuracy, everyone.variant_accuracy[mine])
    np.testing.assert_allclose(some.variant_loss, everyone.variant_loss[mine], atol=1e-12)


def test_tiles_and_chunks_change_rounding_only(monkeypatch):
    lanes = mixed("augment")
    lanes.train(lanes.batches())
    whole = lanes.measure(lanes.every_variant())
    monkeypatch.setattr(validation, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(validation, "CHUNK_SAMPLES_MIN", 7)
    monkeypatch.setattr(validation, "CHUNK_ELEMENTS", 1)
    lanes.validator = Validator(lanes.bank, lanes.inputs, lanes.labels)
    cut = lanes.measure(lanes.every_variant())
    np.testing.assert_array_equal(cut.accuracy, whole.accuracy)
    np.testing.assert_array_equal(cut.variant_accuracy, whole.variant_accuracy)
    np.testing.assert_allclose(cut.loss, whole.loss, atol=1e-12)
    np.testing.assert_allclose(cut.variant_loss, whole.variant_loss, atol=1e-12)


def test_leaving_out_a_seed_that_is_not_there_changes_nothing():
    lanes = mixed("rescue")
    variants = Variants(np.array([0, 0]), np.array([[False, False, False], [True, False, True]]))
    measured = lanes.measure(variants)
    assert measured.variant_loss.tolist() == [measured.loss[0]] * 2


def test_what_is_measured_moves_nothing():
    lanes = mixed("augment")
    before = lanes.bank.snapshot(np.arange(6))
    lanes.measure(lanes.every_variant())
    after = lanes.bank.snapshot(np.arange(6))
    assert torch.equal(before.parameters, after.parameters)
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(before.statistics, after.statistics, strict=True))


def test_a_variant_of_a_lane_that_is_not_measured_is_a_contradiction():
    lanes = mixed("rescue")
    with pytest.raises(InvariantViolation, match="lanes \\[3\\]"):
        lanes.measure(Variants(np.array([3]), np.zeros((1, 3), dtype=np.bool_)), np.array([1, 2]))


def test_a_tie_is_wrong_and_what_is_not_a_number_is_wrong():
    lanes = MixedLanes("rescue", TaskOfKind("image"), [{}, {}], slots=("r0c0",))
    lanes.bank.parameters[0] = 0.0
    lanes.bank.parameters[1] = float("nan")
    measured = lanes.measure(Variants(np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.bool_)))
    assert measured.accuracy.tolist() == [0.0, 0.0]
    assert measured.loss[0] == pytest.approx(np.log(10))
    assert np.isnan(measured.loss[1])


def test_tokens_are_measured_position_by_position():
    """A host whose scores depend on the position alone: hits and loss of every position count alike."""
    lanes = MixedLanes(
        "transformer", TaskOfKind("tokens", height=1, width=6, classes=12), [{}], slots=("r0c0",)
    )
    accuracy, loss = lanes.measure_literally(0)
    measured = lanes.measure(Variants(np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.bool_)))
    assert measured.accuracy[0] == pytest.approx(accuracy)
    assert measured.loss[0] == pytest.approx(loss)
    assert measured.accuracy[0] * lanes.labels.numel() / 100 == pytest.approx(
        round(measured.accuracy[0] * lanes.labels.numel() / 100)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_variants_share_rows_until_they_differ(data):
    """Rows never exceed the distinct prefixes of what is kept, and each ends with exactly its own seeds."""
    lanes, slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    present = np.array(
        data.draw(
            st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=lanes, max_size=lanes)
        )
    )
    count = data.draw(st.integers(0, 6))
    host = np.array(
        data.draw(st.lists(st.integers(0, lanes - 1), min_size=count, max_size=count)), dtype=np.int64
    )
    keep = np.array(
        data.draw(
            st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=count, max_size=count)
        ),
        dtype=np.bool_,
    ).reshape(count, slots)
    kind = np.where(present, 1, -1)
    seeds = seeds_in_validation(
        np.where(present, B, 1), kind, np.ones(kind.shape), np.zeros(kind.shape, dtype=np.int64)
    )
    rows = _Rows(np.arange(lanes), host, keep)
    grown = [np.zeros(slots, dtype=np.bool_) for _ in range(lanes)]
    all_kept = np.concatenate((np.ones((lanes, slots), dtype=np.bool_), keep))
    lane_of_item = np.concatenate((np.arange(lanes), host))
    for slot in range(slots):
        on, copied = rows.part(slot, seeds[slot])
        grown += [grown[row].copy() for row in copied]
        for row in np.flatnonzero(on):
            grown[row][slot] = present[rows.lane[row], slot]
        wanted = all_kept[:, : slot + 1] & present[lane_of_item, : slot + 1]
        prefixes = {(int(lane), tuple(own)) for lane, own in zip(lane_of_item, wanted.tolist(), strict=True)}
        assert len(rows.lane) == len(grown) == len(prefixes)
    for item, row in enumerate(rows.row):
        assert rows.lane[row] == lane_of_item[item]
        assert grown[row].tolist() == (all_kept[item] & present[lane_of_item[item]]).tolist()


def test_fossilised_seeds_stay_in_every_variant():
    lanes = MixedLanes(
        "rescue", TaskOfKind("image"), [{"r0c0": Planted(F), "r0c1": Planted(B)}], slots=("r0c0", "r0c1")
    )
    kept = lanes.measure(Variants(np.array([0]), np.array([[True, False]])))
    assert kept.variant_loss[0] == pytest.approx(lanes.measure_literally(0, np.array([True, False]))[1])
