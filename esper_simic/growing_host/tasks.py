"""Tasks: the data on which hosts are trained and measured.

A task is loaded once a process and is then immutable. Its split into training and validation samples is a property of
the task, not of a run: it comes from a fixed stream, and is stratified, so every lane, run and machine measures on the
same samples. The validation samples are ordered so that any prefix of them is balanced as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.errors import ConfigError

VALIDATION_SHARE: Final = 0.25
"""Share of each class that is held out."""


@dataclass(frozen=True, slots=True)
class Task:
    """Images and labels, split for good.

    Args:
        name: Name in `TASKS`.
        classes: Number of labels.
        train_images: `[N, channels, height, width]` float32, standardised by the training samples.
        train_labels: `[N]` int64 in [0, classes).
        validation_images: As `train_images`, of the held-out samples.
        validation_labels: As `train_labels`, of the held-out samples.
    """

    name: str
    classes: int
    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    validation_images: NDArray[np.float32]
    validation_labels: NDArray[np.int64]

    @property
    def channels(self) -> int:
        """Input channels."""
        return int(self.train_images.shape[1])

    @property
    def side(self) -> int:
        """Height and width of an image, in pixels."""
        return int(self.train_images.shape[2])


def stratified_split(
    labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split sample indices so that each class keeps its share.

    Args:
        labels: `[N]` int64.
        share: Share of each class that is held out, in (0, 1).
        rng: Source of the shuffle.

    Returns:
        Indices of the training samples, ascending, and of the held-out samples, classes taken in turn.
    """
    held_out, ranks = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(share * len(members))
        held_out.append(members[:count])
        ranks.append(np.arange(count))
    picked = np.concatenate(held_out)
    picked = picked[np.argsort(np.concatenate(ranks), kind="stable")]
    return np.setdiff1d(np.arange(len(labels)), picked), picked


def _digits() -> Task:
    """Scikit-learn's digits: 1797 images of 8x8 pixels, ten classes. It ships with the package; nothing is fetched."""
    from sklearn.datasets import load_digits  # slow to import; only a process that steps hosts pays for it

    data = load_digits()
    images = data.images.astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    train, validation = stratified_split(
        labels, VALIDATION_SHARE, seeding.generator("task", "digits", "split")
    )
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Task("digits", 10, images[train], labels[train], images[validation], labels[validation])


TASKS: Final[dict[str, Callable[[], Task]]] = {"digits": _digits}
"""Name to loader."""


@functools.cache
def load_task(name: str) -> Task:
    """The task of this name, loaded once a process; its arrays are read-only.

    Raises:
        ConfigError: No task has this name.
    """
    loader = TASKS.get(name)
    if loader is None:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(TASKS)}", "environment.task")
    task = loader()
    for array in (task.train_images, task.train_labels, task.validation_images, task.validation_labels):
        array.setflags(write=False)
    return task
