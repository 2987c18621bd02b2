"""Alpha: how much of a seed is blended into its host, and how that rises.

A ramp of n epochs leads alpha from 0 to 1: after t of them `alpha = curve(t / n)`, exactly 0 at t = 0 and exactly 1 at
t = n. The curve is LINEAR, `u`, or SIGMOID, a logistic with steepness k = 12 stretched to hit both ends:
`(s(u) - s(0)) / (s(1) - s(0))`, `s(u) = 1 / (1 + exp(-k (u - 1/2)))`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import Style
from esper_simic.lifecycle import Floats, Integers

SIGMOID_STEEPNESS: Final = 12.0

SUPPORTED_STYLES: Final = (Style.LINEAR_ADD, Style.SIGMOID_ADD)
"""Styles this version can blend; the others are masked."""


def linear(progress: Floats) -> NDArray[np.float64]:
    """`u` clipped to [0, 1]."""
    return np.clip(np.asarray(progress, dtype=np.float64), 0.0, 1.0)


def sigmoid(progress: Floats) -> NDArray[np.float64]:
    """The normalised logistic of the module's formula; monotone, 0 at 0 and 1 at 1 exactly."""
    u = linear(progress)
    low = 1 / (1 + np.exp(SIGMOID_STEEPNESS / 2))
    raw = 1 / (1 + np.exp(-SIGMOID_STEEPNESS * (u - 0.5)))
    stretched = (raw - low) / (1 - 2 * low)
    return np.where(u >= 1.0, 1.0, np.where(u <= 0.0, 0.0, stretched))


def ramp(style: Integers, epochs_done: Integers, epochs_total: Integers) -> NDArray[np.float64]:
    """Alpha after so many epochs of a ramp.

    Args:
        style: `[...]` values of `Style` among `SUPPORTED_STYLES`.
        epochs_done: `[...]` epochs of the ramp that have passed.
        epochs_total: `[...]` length of the ramp, at least 1.

    Returns:
        `[...]` float64 in [0, 1]; exactly 1 once `epochs_done >= epochs_total`.
    """
    u = epochs_done / epochs_total
    return np.where(style == Style.SIGMOID_ADD, sigmoid(u), linear(u))
