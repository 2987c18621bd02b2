"""How samples are split, and the orders in which lanes see them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import seeding
from esper_simic.errors import ConfigError
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.tasks import Task, in_turns, load_task, split_task, stratified_split


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.floats(0.1, 0.9))
def test_a_split_keeps_each_class_share_and_every_sample(labels, share):
    labels = np.array(labels)
    train, held_out = stratified_split(labels, share, np.random.default_rng(0))
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    for label in np.unique(labels):
        assert (labels[held_out] == label).sum() == round(share * (labels == label).sum())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_groups_taken_in_turns_are_even_in_every_prefix(sizes):
    groups = [10 * which + np.arange(size) for which, size in enumerate(sizes)]
    taken = in_turns(groups)
    assert sorted(taken) == sorted(np.concatenate(groups))
    for length in range(len(taken) + 1):
        counts = np.bincount(taken[:length] // 10, minlength=len(sizes))
        assert all(
            count in {counts.max(), counts.max() - 1, size} for count, size in zip(counts, sizes, strict=True)
        )


def test_features_are_scaled_by_the_training_samples_alone():
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(40, 2, 1, 1)) * [[[5]], [[0.1]]] + [[[7]], [[-2]]]
    labels = np.arange(40) % 2
    task = split_task("odd", "vector", inputs, labels, axes=0)
    train, held_out = stratified_split(labels, 0.25, seeding.generator("task", "odd", "split"))
    for feature in range(2):
        mean, deviation = inputs[train, feature].mean(), inputs[train, feature].std()
        for samples, indices in ((task.train_inputs, train), (task.validation_inputs, held_out)):
            expected = (inputs[indices, feature, 0, 0] - mean) / deviation
            assert samples[:, feature, 0, 0] == pytest.approx(expected, rel=1e-6)
    assert task.train_inputs.dtype == np.float32
    assert (task.validation_labels == labels[held_out]).all()
    assert split_task("other", "vector", inputs, labels, axes=0, stream="odd").digest == task.digest
    assert split_task("other", "vector", inputs, labels, axes=0).digest != task.digest


def test_unknown_hosts_and_shapes_are_configuration_errors():
    with pytest.raises(ConfigError, match="unknown host 'giant'"):
        build_host("giant", load_task("digits"))
    images, labels = np.zeros((2, 1, 6, 6), np.float32), np.zeros(2, np.int64)
    odd = Task("odd", 10, "image", images, labels, images, labels)
    with pytest.raises(ConfigError, match="that 8 divides"):
        build_host("rescue", odd)


def test_a_lane_sees_each_sample_once_before_it_shuffles_again():
    orders = SampleOrders(2, available=12, batches=2, batch_size=2)
    streams = [seeding.generator(lane) for lane in range(2)]
    epochs = [orders.next_epoch(streams) for _ in range(6)]
    assert epochs[0].shape == (2, 2, 2)
    for lane in range(2):
        seen = np.concatenate([epoch[:, lane].ravel() for epoch in epochs])
        assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
        assert list(seen[:12]) != list(seen[12:])


def test_an_epoch_may_be_longer_than_the_data():
    orders = SampleOrders(1, available=3, batches=4, batch_size=2)
    epoch = orders.next_epoch([seeding.generator(0)])
    assert np.bincount(epoch.ravel(), minlength=3).min() >= 2


def test_restarting_a_lane_leaves_the_others_alone():
    def second_epoch(restart):
        orders = SampleOrders(2, available=12, batches=1, batch_size=4)
        streams = [seeding.generator(lane) for lane in range(2)]
        orders.next_epoch(streams)
        if restart:
            orders.restart(0)
        return orders.next_epoch(streams)

    assert (second_epoch(True)[:, 1] == second_epoch(False)[:, 1]).all()
    assert (second_epoch(True)[:, 0] != second_epoch(False)[:, 0]).any()
