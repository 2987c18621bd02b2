"""The data sets that ship with scikit-learn; nothing is fetched.

scikit-learn is slow to import, so each loader imports it itself: only a process that steps hosts pays for it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.growing_host.tasks.splits import VALIDATION_SHARE, split_task, stratified_split
from esper_simic.growing_host.tasks.task import Task

LARGE_SIDE: Final = 32
"""Height and width of an image of `digits32`, in pixels: those of CIFAR-10."""

LARGE_CHANNELS: Final = 3


def digits() -> Task:
    """1797 written digits of 8x8 pixels in 16 greys, ten classes.

    Source: the test set of UCI's "Optical Recognition of Handwritten Digits", as in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images.astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    train, validation = stratified_split(
        labels, VALIDATION_SHARE, seeding.generator("task", "digits", "split")
    )
    # In float32, unlike the other tasks: journals were written with exactly these numbers.
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Task("digits", 10, "image", images[train], labels[train], images[validation], labels[validation])


def digits32() -> Task:
    """`digits` in the shape of CIFAR-10: enlarged to 32x32 pixels, its grey in each of three channels.

    The split is that of `digits`: the same images are held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    weights = bilinear_weights(data.images.shape[1], LARGE_SIDE)
    large = weights @ data.images @ weights.T
    images = np.broadcast_to(large[:, None], (len(large), LARGE_CHANNELS, LARGE_SIDE, LARGE_SIDE))
    return split_task("digits32", "image", images, data.target, stream="digits")


def bilinear_weights(size: int, larger: int) -> NDArray[np.float64]:
    """`[larger, size]` weights that enlarge one axis by linear interpolation.

    Pixels are areas: the centre of new pixel i lies at `(i + 1/2) size / larger - 1/2` of the old ones, and beyond the
    outermost old centres their values go on.
    """
    centres = np.clip((np.arange(larger) + 0.5) * size / larger - 0.5, 0, size - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(size)))


def wine() -> Task:
    """178 wines of three growers by 13 chemical measurements. Source: UCI, as in `sklearn.datasets.load_wine`."""
    from sklearn.datasets import load_wine

    data = load_wine()
    return split_task("wine", "vector", data.data[:, :, None, None], data.target, axes=0)


def breast_cancer() -> Task:
    """569 tumours, malignant (0) or benign (1), by 30 measurements of cell nuclei.

    Source: UCI's Wisconsin diagnostic data, as in `sklearn.datasets.load_breast_cancer`.
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return split_task("breast_cancer", "vector", data.data[:, :, None, None], data.target, axes=0)
