"""Tasks and sample orders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import seeding
from esper_simic.errors import ConfigError
from esper_simic.growing_host.hosts import build_host
from esper_simic.growing_host.samples import SampleOrders
from esper_simic.growing_host.tasks import Task, load_task, stratified_split


def test_digits():
    task = load_task("digits")
    assert load_task("digits") is task
    assert (task.channels, task.side, task.classes) == (1, 8, 10)
    assert len(task.train_labels) + len(task.validation_labels) == 1797
    assert len(task.validation_labels) >= 256
    assert task.train_images.mean() == pytest.approx(0, abs=1e-4)
    assert task.train_images.std() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="read-only"):
        task.train_images[0] = 0


def test_the_first_validation_samples_are_balanced():
    counts = np.bincount(load_task("digits").validation_labels[:256], minlength=10)
    assert counts.min() >= 25
    assert counts.max() <= 26


def test_no_validation_image_is_trained_on():
    task = load_task("digits")
    trained = {image.tobytes() for image in task.train_images}
    assert not any(image.tobytes() in trained for image in task.validation_images)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.floats(0.1, 0.9))
def test_a_split_keeps_each_class_share_and_every_sample(labels, share):
    labels = np.array(labels)
    train, held_out = stratified_split(labels, share, np.random.default_rng(0))
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    for label in np.unique(labels):
        assert (labels[held_out] == label).sum() == round(share * (labels == label).sum())


def test_unknown_names_and_shapes_are_configuration_errors():
    with pytest.raises(ConfigError, match="unknown task 'cifar'"):
        load_task("cifar")
    with pytest.raises(ConfigError, match="unknown host 'giant'"):
        build_host("giant", load_task("digits"))
    images, labels = np.zeros((2, 1, 6, 6), np.float32), np.zeros(2, np.int64)
    odd = Task("odd", 10, images, labels, images, labels)
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
