"""MNIST-1D: ten short curves, each hidden in a longer noisy signal; small, and yet it tells kinds of network apart.

A sample is made from the template of its class, twelve points of deviation 1/6, in these steps, with the published
numbers:

1. *pad* with p zeros behind, p uniform in 36 to 60, and stretch the whole to 72 points: the curve gets 12 / (12 + p) of
   them;
2. *scale* by `1 + 0.4 u`, u uniform in [-1/2, 1/2);
3. *translate* by k points around the end, k uniform in 0 to 47;
4. *noise*: where the padding is, Gaussian noise of deviation 0.25 smoothed by a Gaussian of deviation 2 points;
   everywhere, independent noise of deviation 0.02;
5. *shear*: subtract `0.75 u s`, u uniform in [-1/2, 1/2), s rising from -1/2 to 1/2 along the signal;
6. resample to 40 points.

Source: Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D" (ICML 2024, arXiv:2011.14439). Code and templates
are our own: accuracies are near those of the paper's data set, but not to be compared with them number by number.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic import seeding
from esper_simic.growing_host.tasks.splits import split_task
from esper_simic.growing_host.tasks.task import Task

SAMPLES: Final = 5000
PADDING: Final = (36, 60)
LENGTH: Final = 72
"""Points of the signal while it is made: a template's and the longest padding's."""

FINAL_LENGTH: Final = 40
SCALE: Final = 0.4
TRANSLATION_MAX: Final = 48
CORRELATED_NOISE: Final = 0.25
CORRELATION_POINTS: Final = 2.0
INDEPENDENT_NOISE: Final = 0.02
SHEAR: Final = 0.75

TEMPLATES: Final = (
    (5, 8, 10, 10, 10, 10, 10, 10, 10, 10, 8, 5),
    (5, 5, 5, 5, 6, 10, 10, 6, 5, 5, 5, 5),
    (5, 8, 10, 8, 6, 5, 5, 4, 2, 0, 2, 5),
    (5, 8, 10, 8, 5, 5, 5, 5, 8, 10, 8, 5),
    (5, 4, 3, 2, 1, 0, 5, 5, 5, 5, 5, 5),
    (5, 2, 0, 2, 4, 5, 5, 6, 8, 10, 8, 5),
    (5, 3, 1, 0, 0, 0, 0, 0, 0, 1, 3, 5),
    (5, 10, 9, 8, 7.5, 7, 6.5, 6, 5.5, 5, 5, 5),
    (5, 2, 0, 2, 5, 5, 5, 5, 2, 0, 2, 5),
    (5, 2, 0, 4, 8, 9, 9, 9, 9, 9, 8, 5),
)
"""The curve of each class: a plateau, a spike, waves, twin peaks, ramps, ...; all begin and end at one height."""

CURVE_SIZE: Final = 1 / 6
"""Deviation of each curve."""


def mnist1d() -> Task:
    """5000 noisy series of 40 points, ten classes, made from a fixed stream."""
    labels = np.arange(SAMPLES) % len(TEMPLATES)
    signals = make_signals(labels, seeding.generator("task", "mnist1d", "samples"))
    return split_task("mnist1d", "series", signals[:, None, None, :], labels)


def make_signals(labels: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.float64]:
    """A signal of each label: `[N, 40]`.

    Args:
        labels: `[N]` in 0 to 9.
        rng: Source of all draws.
    """
    from scipy.ndimage import gaussian_filter1d  # slow to import, like the other tasks' sources

    shape = (len(labels), LENGTH)
    padding = rng.integers(PADDING[0], PADDING[1] + 1, len(labels))
    signals, is_curve = _stretched(templates()[labels], padding)
    signals *= 1 + SCALE * (rng.random((len(labels), 1)) - 0.5)
    shift = rng.integers(0, TRANSLATION_MAX, (len(labels), 1))
    source = (np.arange(LENGTH) - shift) % LENGTH
    signals = np.take_along_axis(signals, source, axis=1)
    is_curve = np.take_along_axis(is_curve, source, axis=1)
    smooth = gaussian_filter1d(CORRELATED_NOISE * rng.standard_normal(shape), CORRELATION_POINTS, axis=1)
    signals = np.where(is_curve, signals, smooth) + INDEPENDENT_NOISE * rng.standard_normal(shape)
    signals -= SHEAR * (rng.random((len(labels), 1)) - 0.5) * np.linspace(-0.5, 0.5, LENGTH)
    positions = np.linspace(0, LENGTH - 1, FINAL_LENGTH)
    return interpolated(signals, np.broadcast_to(positions, (len(labels), FINAL_LENGTH)))


def templates() -> NDArray[np.float64]:
    """`[10, 12]` the curves, all of one deviation and from 0 to 0, so that neither size nor level tells them apart."""
    curves = np.array(TEMPLATES, dtype=np.float64)
    deviation: NDArray[np.float64] = curves.std(axis=1, keepdims=True)
    return CURVE_SIZE * (curves - curves[:, :1]) / deviation


def _stretched(
    curves: NDArray[np.float64], padding: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`[N, 72]` curves with zeros behind, all stretched to one length, and which of the points are of the curve."""
    points = curves.shape[1]
    padded = np.pad(curves, ((0, 0), (0, PADDING[1])))
    positions = np.linspace(0, points + padding - 1, LENGTH, axis=1)
    return interpolated(padded, positions), positions < points


def interpolated(signals: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of signals between their points, linearly: `[N, P]` and `[N, Q]` in [0, P - 1] to `[N, Q]`."""
    left = np.minimum(positions.astype(np.int64), signals.shape[1] - 2)
    share = positions - left
    before = np.take_along_axis(signals, left, axis=1)
    after = np.take_along_axis(signals, left + 1, axis=1)
    values: NDArray[np.float64] = before + share * (after - before)
    return values
