"""The tasks of this package: what they are, bit by bit, and that nothing held out is ever trained on."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from esper_simic import seeding
from esper_simic.config_environment import TASK_NAMES
from esper_simic.errors import ConfigError, UnavailableError
from esper_simic.growing_host.tasks import Task, characters, load_task, mnist1d, registry, tables
from esper_simic.growing_host.tasks.synthetic import synthetic

HERE = tuple(name for name in TASK_NAMES if name != "cifar10")
"""The tasks that any machine has."""

CLASSIFICATIONS = tuple(name for name in HERE if name != "characters")


def rows(task: Task, part: str) -> list[bytes]:
    return [sample.tobytes() for sample in getattr(task, f"{part}_inputs")]


@pytest.mark.parametrize(
    ("name", "kind", "classes", "shape", "samples"),
    [
        ("digits", "image", 10, (1, 8, 8), (1347, 450)),
        ("digits32", "image", 10, (3, 32, 32), (1347, 450)),
        ("wine", "vector", 3, (13, 1, 1), (133, 45)),
        ("breast_cancer", "vector", 2, (30, 1, 1), (427, 142)),
        ("mnist1d", "series", 10, (1, 1, 40), (3750, 1250)),
        ("characters", "tokens", 39, (1, 1, 32), (8288, 2466)),
        ("synthetic", "image", 10, (3, 32, 32), (1538, 510)),
    ],
)
def test_what_the_tasks_are(name, kind, classes, shape, samples):
    task = load_task(name)
    assert load_task(name) is task
    assert (task.kind, task.classes) == (kind, classes)
    assert (task.channels, task.height, task.width) == shape
    assert (len(task.train_inputs), len(task.validation_inputs)) == samples
    assert set(np.unique(task.train_labels)) == set(range(classes))
    for array in (task.train_inputs, task.train_labels, task.validation_inputs, task.validation_labels):
        with pytest.raises(ValueError, match="read-only"):
            array[:1] = 0


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("digits", "1768bd23cb6f70a5"),
        ("digits32", "7b513ee32303b935"),
        ("wine", "d3f9f22c43ed5e28"),
        ("breast_cancer", "125a761cb05eaceb"),
        ("mnist1d", "84bda9c3d26bdf04"),
        ("characters", "c8f94e031c4d6621"),
        ("synthetic", "84f169b9505b401e"),
        ("synthetic:1x1x8:3:60", "701b948cb60be81d"),
    ],
)
def test_the_data_are_the_same_on_every_machine(name, digest):
    assert load_task(name).digest[:16] == digest


def test_the_digits_that_journals_were_written_with_stay_bit_by_bit():
    task = load_task("digits")
    arrays = (task.train_inputs, task.train_labels, task.validation_inputs, task.validation_labels)
    assert [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in arrays] == [
        "734dc97b77745a1a",
        "6190fcef8a7e3bf9",
        "76bd948b9731894d",
        "5b1869b5d80baee6",
    ]


def test_every_name_of_the_configuration_has_its_loader():
    assert tuple(registry.BUILT_IN) == TASK_NAMES


@pytest.mark.parametrize("name", HERE)
def test_no_held_out_sample_is_trained_on(name):
    task = load_task(name)
    trained = set(rows(task, "train"))
    assert not any(sample in trained for sample in rows(task, "validation"))


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_every_prefix_of_the_held_out_samples_is_balanced(name):
    task = load_task(name)
    of_class = np.bincount(task.validation_labels)
    counts = np.cumsum(task.validation_labels[:, None] == np.arange(task.classes), axis=0)
    most = counts.max(axis=1, keepdims=True)
    assert ((counts >= most - 1) | (counts == of_class)).all()  # even, but for classes that are used up
    share = of_class / np.bincount(task.train_labels)
    assert share == pytest.approx(1 / 3, abs=0.05)  # a quarter of each class is a third of the rest


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_inputs_are_standardised_by_the_training_samples(name):
    inputs = load_task(name).train_inputs.astype(np.float64)
    if load_task(name).kind == "vector":
        assert inputs.mean(axis=0) == pytest.approx(0, abs=1e-6)
        assert inputs.std(axis=0) == pytest.approx(1, abs=1e-6)
    else:
        tolerance = 0.01 if name == "synthetic" else 1e-6  # that one is so by its making, in expectation
        assert (inputs.mean(), inputs.std()) == pytest.approx((0, 1), abs=tolerance)


def test_large_digits_are_the_digits_enlarged():
    small, large = load_task("digits"), load_task("digits32")
    assert (large.train_labels == small.train_labels).all()
    assert (large.validation_labels == small.validation_labels).all()
    pixels = torch.tensor(small.validation_inputs[:50].astype(np.float64))
    grown = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", align_corners=False).numpy()
    for channel in range(3):
        found = large.validation_inputs[:50, channel].astype(np.float64)
        slope, offset = np.polyfit(grown.ravel(), found.ravel(), 1)  # the two are scaled differently
        assert found == pytest.approx(slope * grown[:, 0] + offset, abs=1e-5)


@given(st.integers(1, 12), st.integers(1, 6))
def test_enlarging_keeps_what_is_level_and_what_is_straight(size, factor):
    weights = tables.bilinear_weights(size, size * factor)
    assert weights.sum(axis=1) == pytest.approx(1)
    centres = (np.arange(size * factor) + 0.5) / factor - 0.5
    assert weights @ np.arange(size) == pytest.approx(np.clip(centres, 0, size - 1))


def literal_signal(curve, padding, scale, shift, correlated, independent, shear):
    """One sample as the paper makes it, step by step."""
    padded = np.concatenate([curve + 1e-8, np.zeros(padding)])
    signal = np.interp(np.linspace(0, 1, 72), np.linspace(0, 1, len(padded)), padded)
    signal = np.roll(signal * (1 + 0.4 * (scale - 0.5)), shift)
    empty = signal == 0
    signal = np.where(empty, gaussian_filter(0.25 * correlated, 2), signal) + 0.02 * independent
    signal = signal - 0.75 * (shear - 0.5) * np.linspace(-0.5, 0.5, 72)
    return np.interp(np.linspace(0, 1, 40), np.linspace(0, 1, 72), signal)


def test_mnist1d_is_made_as_the_paper_says():
    labels = np.arange(30) % 10
    found = mnist1d.make_signals(labels, np.random.default_rng(4))
    rng = np.random.default_rng(4)
    padding = rng.integers(36, 61, 30)
    scale = rng.random(30)
    shift = rng.integers(0, 48, 30)
    correlated, independent = rng.standard_normal((30, 72)), rng.standard_normal((30, 72))
    shear = rng.random(30)
    curves = np.array(mnist1d.TEMPLATES, dtype=np.float64)
    for sample, label in enumerate(labels):
        curve = (curves[label] - curves[label].mean()) / curves[label].std()
        curve = (curve - curve[0]) / 6
        made = (padding, scale, shift, correlated, independent, shear)
        expected = literal_signal(curve, *(draw[sample] for draw in made))
        assert found[sample] == pytest.approx(expected, abs=1e-6)


def test_mnist1d_tells_a_curve_by_its_shape_alone():
    curves = mnist1d.templates()
    assert curves.shape == (10, 12)
    assert curves[:, [0, -1]] == pytest.approx(0)
    assert curves.std(axis=1) == pytest.approx(1 / 6)
    centred = curves - curves.mean(axis=1, keepdims=True)
    likeness = centred @ centred.T / (12 / 36)
    assert (likeness - np.eye(10)).max() < 0.85


def test_the_characters_are_those_of_the_names():
    task = load_task("characters")
    text = characters.names_text()
    assert len(text) == 354_743
    assert text.startswith("SPACE\nEXCLAMATION MARK\nQUOTATION MARK\n")
    assert unicodedata.name("\N{SNOWMAN}") in text.split("\n")
    vocabulary = sorted(set(text))
    assert "".join(vocabulary) == "\n -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    first = "".join(vocabulary[token] for token in task.train_inputs[0])
    following = "".join(vocabulary[token] for token in task.train_labels[0])
    assert first[1:] == following[:-1]
    assert first + following[-1] in text


def test_no_held_out_character_or_passage_is_trained_on():
    text = characters.names_text()
    starts, stretches = characters.window_starts(len(text))
    train, held_out = characters.split_stretches(stretches, seeding.generator("task", "characters", "split"))
    validation = characters.unseen(text, starts, train, held_out)
    assert sorted([*train, *held_out]) == list(range(len(starts)))
    trained_on = np.zeros(len(text), dtype=bool)
    for window in train:
        trained_on[starts[window] : starts[window] + 33] = True  # inputs and the last label
    for window in held_out:
        assert not trained_on[starts[window] : starts[window] + 33].any()
    passages = {
        text[first + start : first + start + 32]
        for first in starts[train][::32]
        for start in range(1025 - 31)
    }
    repeated = [text[starts[window] : starts[window] + 32] in passages for window in held_out]
    assert list(validation) == [window for window, seen in zip(held_out, repeated, strict=True) if not seen]
    task = load_task("characters")
    vocabulary = np.array(sorted(set(text)))
    shown = ["".join(window) for window in vocabulary[task.validation_inputs]]
    assert shown == [text[starts[window] : starts[window] + 32] for window in validation]


def test_held_out_stretches_lie_everywhere_and_take_turns():
    stretches = np.repeat(np.arange(41), characters.WINDOWS_PER_STRETCH)
    train, held_out = characters.split_stretches(stretches, np.random.default_rng(1))
    chosen = np.unique(stretches[held_out])
    assert list(np.unique(chosen // 4)) in (list(range(10)), list(range(11)))
    assert len(np.unique(chosen // 4)) == len(chosen)
    assert not set(stretches[train]) & set(chosen)
    for turn in range(characters.WINDOWS_PER_STRETCH):
        of_turn = held_out[turn * len(chosen) : (turn + 1) * len(chosen)]
        assert sorted(stretches[of_turn]) == list(chosen)


def test_another_text_would_be_another_task(monkeypatch):
    monkeypatch.setattr(characters, "names_text", lambda: "SPACE\nEXCLAMATION POINT")
    with pytest.raises(UnavailableError, match=r"names of this Python .* have SHA-256 .*, not 03ce3aea"):
        characters.characters()


@pytest.mark.parametrize(
    ("size", "kind", "shape", "classes", "samples"),
    [
        ("1x8x8", "image", (1, 8, 8), 10, 2048),
        ("2x1x40:3", "series", (2, 1, 40), 3, 2048),
        ("13x1x1:2:8", "vector", (13, 1, 1), 2, 8),
    ],
)
def test_a_synthetic_task_has_the_size_of_its_name(size, kind, shape, classes, samples):
    task = load_task(f"synthetic:{size}")
    assert (task.kind, task.classes) == (kind, classes)
    assert task.train_inputs.shape[1:] == shape
    assert len(task.train_labels) + len(task.validation_labels) == samples
    assert load_task(task.name).digest == task.digest  # its name says all


def test_a_synthetic_task_can_be_learned():
    task = synthetic("3x8x8:4:400")
    centres = np.stack([task.train_inputs[task.train_labels == label].mean(axis=0) for label in range(4)])
    distances = ((task.validation_inputs[:, None] - centres) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == task.validation_labels).mean() > 0.9


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ("", "is not a size"),
        ("3x32", "is not a size"),
        ("3x32x32:10:2048:1", "is not a size"),
        ("-3x32x32", "is not a size"),
        ("0x32x32", "at least 1 in each place"),
        ("3x32x1", "no width of 1 under a height"),
        ("3x32x32:1", "at least 2 classes"),
        ("3x32x32:10:39", "4 samples of each"),
        ("999x999x999:10:50", "numbers in all; take fewer samples"),
    ],
)
def test_sizes_out_of_bounds_are_refused_by_name(size, problem):
    with pytest.raises(ConfigError, match=f"environment.task: task 'synthetic'.*{problem}"):
        load_task(f"synthetic:{size}")


def test_a_digest_tells_data_apart_and_nothing_else():
    task = synthetic("1x4x4:2:8")
    base = (task.classes, task.kind, task.train_inputs, task.train_labels)
    held_out = (task.validation_inputs, task.validation_labels)
    assert Task("other", *base, *held_out).digest == task.digest
    changed = task.train_inputs.copy()
    changed[0, 0, 0, 0] += 1
    assert Task("other", 2, "image", changed, task.train_labels, *held_out).digest != task.digest
    assert Task("other", 3, *base[1:], *held_out).digest != task.digest
    swapped = task.train_inputs.astype(">f4")
    assert Task("other", 2, "image", swapped, task.train_labels, *held_out).digest == task.digest
