"""Generated tensors for load: any shape, any number, and still something to learn.

The name says the size: `synthetic` alone is `synthetic:3x32x32:10:2048`, that is channels x height x width, classes,
samples (a quarter of them held out; leave classes and samples out for 10 and 2048). A height of 1 makes series, a
height and width of 1 vectors.

Each class has a centre, drawn once; a sample is its class's centre at half its size, and noise.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from esper_simic import seeding
from esper_simic.config_environment import Kind
from esper_simic.errors import ConfigError
from esper_simic.growing_host.tasks.splits import VALIDATION_SHARE, stratified_split
from esper_simic.growing_host.tasks.task import Task

DEFAULT_SIZE: Final = "3x32x32:10:2048"
CLASSES: Final = 10
SAMPLES: Final = 2048
CENTRE_SIZE: Final = 0.5
"""Deviation of the centres; that of the noise is 1."""

SAMPLES_PER_CLASS_MIN: Final = 4
"""With fewer, a quarter of a class would be nothing."""

ELEMENTS_MAX: Final = 2**30
"""Numbers in all samples: 4 GiB. A larger task is refused."""

_SIZE: Final = re.compile(r"(\d{1,9})x(\d{1,9})x(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?")


def synthetic(size: str = DEFAULT_SIZE) -> Task:
    """A task of this size, always the same.

    Args:
        size: `CxHxW`, `CxHxW:classes` or `CxHxW:classes:samples`.

    Raises:
        ConfigError: Not a size, or one out of bounds.
    """
    channels, height, width, classes, samples = _parsed(size)
    name = f"synthetic:{channels}x{height}x{width}:{classes}:{samples}"
    rng = seeding.generator("task", "synthetic", channels, height, width, classes, samples)
    kind: Kind = "vector"
    if height > 1:
        kind = "image"
    elif width > 1:
        kind = "series"
    labels = np.arange(samples, dtype=np.int64) % classes
    centres = CENTRE_SIZE * rng.standard_normal((classes, channels, height, width), dtype=np.float32)
    inputs = rng.standard_normal((samples, channels, height, width), dtype=np.float32)
    for label in range(classes):  # one class at a time: the sum needs no second array of that size
        inputs[label::classes] += centres[label]
    inputs /= np.float32(np.sqrt(1 + CENTRE_SIZE**2))
    train, validation = stratified_split(labels, VALIDATION_SHARE, rng)
    return Task(name, classes, kind, inputs[train], labels[train], inputs[validation], labels[validation])


def _parsed(size: str) -> tuple[int, int, int, int, int]:
    """Channels, height, width, classes, samples."""
    parts = _SIZE.fullmatch(size)
    if parts is None:
        raise ConfigError(
            f"task 'synthetic': {size!r} is not a size; it is written CxHxW:classes:samples, such as {DEFAULT_SIZE}",
            "environment.task",
        )
    channels, height, width = (int(parts[group]) for group in (1, 2, 3))
    classes, samples = int(parts[4] or CLASSES), int(parts[5] or SAMPLES)
    if not min(channels, height, width) or (width == 1 and height > 1):
        raise ConfigError(
            f"task 'synthetic': {size!r} must have at least 1 in each place, and no width of 1 under a height",
            "environment.task",
        )
    if classes < 2 or samples < SAMPLES_PER_CLASS_MIN * classes:
        raise ConfigError(
            f"task 'synthetic': {classes} classes and {samples} samples; there must be at least 2 classes and "
            f"{SAMPLES_PER_CLASS_MIN} samples of each",
            "environment.task",
        )
    if channels * height * width * (samples + classes) > ELEMENTS_MAX:
        raise ConfigError(
            f"task 'synthetic': {size!r} is more than {ELEMENTS_MAX} numbers in all; take fewer samples",
            "environment.task",
        )
    return channels, height, width, classes, samples
