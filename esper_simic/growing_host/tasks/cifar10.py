"""CIFAR-10, for machines that have it: nothing is ever fetched, and neither torchvision nor the files are required.

The files are pickles, which run code when they are read. torchvision's loader checks them against the published
digests first; so they are read by it alone.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.errors import UnavailableError
from esper_simic.growing_host.tasks.splits import in_turns
from esper_simic.growing_host.tasks.task import Task

FOLDER: Final = "data"
"""Where the data is looked for, from the directory the process runs in, unless the task's name says otherwise."""

ARCHIVE: Final = "cifar-10-batches-py"


def cifar10(folder: str = FOLDER) -> Task:
    """60 000 photographs of 32x32 pixels in colour, ten classes; its own 10 000 test images are the held-out ones.

    Args:
        folder: The folder that holds `cifar-10-batches-py`; `cifar10:/srv/data` names another one than `data`.

    Raises:
        UnavailableError: No torchvision, or no intact files there; says what to install and where to put them.
    """
    images, labels = _read(folder, train=True)
    held_out, held_out_labels = _read(folder, train=False)
    rng = seeding.generator("task", "cifar10", "order")
    order = in_turns([rng.permutation(np.flatnonzero(held_out_labels == label)) for label in range(10)])
    mean = images.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = images.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    return Task(
        "cifar10",
        10,
        "image",
        _standardised(images, mean, deviation),
        labels,
        _standardised(held_out[order], mean, deviation),
        held_out_labels[order],
    )


def _read(folder: str, *, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels `[N, 3, 32, 32]` and labels `[N]` of one part."""
    try:
        datasets: Any = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        raise UnavailableError(
            f"task 'cifar10' needs torchvision, in the edition made for the installed torch ({error}): "
            f"pip install torchvision"
        ) from error
    try:
        data = datasets.CIFAR10(root=folder, train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise UnavailableError(
            f"task 'cifar10': no intact {ARCHIVE} in the folder {folder!r} ({error}); unpack cifar-10-python.tar.gz "
            f"there, or name its folder: environment.task=cifar10:FOLDER"
        ) from error
    pixels = np.ascontiguousarray(np.asarray(data.data, dtype=np.uint8).transpose(0, 3, 1, 2))
    return pixels, np.asarray(data.targets, dtype=np.int64)


def _standardised(
    pixels: NDArray[np.uint8], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float32]:
    """In place after one conversion: the training images are 0.6 GB."""
    scaled = pixels.astype(np.float32)
    scaled -= mean.astype(np.float32)
    scaled /= deviation.astype(np.float32)
    return scaled
