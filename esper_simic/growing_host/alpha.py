r"""Alpha: how much of a seed is blended into its host, how it is composed with it, and how alpha moves.

A ramp of n epochs leads alpha from `a0` to a target `a1`: after t of them

    alpha = a0 + (a1 - a0) curve(t / n),    exactly a1 from t = n on;

a ramp of 0 epochs is over at once. Alpha moves monotonically and never leaves [a0, a1]. The curves, with `u = t / n`:

| curve | formula |
|---|---|
| LINEAR | `u` |
| COSINE | `(1 - cos(pi u)) / 2` |
| SIGMOID_GENTLE, SIGMOID, SIGMOID_SHARP | `(s(u) - s(0)) / (s(1) - s(0))` with k = 6, 12, 24 |

where `s(u) = 1 / (1 + exp(-k (u - 1/2)))`.

A seed is composed with its host in one of three ways: ADD, MULTIPLY, or GATE, an ADD whose alpha a learned gate scales
for each sample. The ramp of a gated seed is always LINEAR: the gate has a shape of its own.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import ALPHA_CURVES, Style
from esper_simic.lifecycle import Floats, Integers


class Composition(IntEnum):
    """How the features of a seed join those of its host."""

    ADD = 0
    MULTIPLY = 1
    GATE = 2


class AlphaMode(IntEnum):
    """Whether alpha moves, and where to. Only a seed in HOLD can be given another target or be pruned."""

    HOLD = 0
    UP = 1
    DOWN = 2


LINEAR: Final = ALPHA_CURVES.index("LINEAR")
COSINE: Final = ALPHA_CURVES.index("COSINE")
STEEPNESS: Final = {
    ALPHA_CURVES.index("SIGMOID_GENTLE"): 6.0,
    ALPHA_CURVES.index("SIGMOID"): 12.0,
    ALPHA_CURVES.index("SIGMOID_SHARP"): 24.0,
}
"""Steepness k of each logistic curve."""


def _by_style(**values: int) -> NDArray[np.int64]:
    table = np.array([values[style.name] for style in Style], dtype=np.int64)
    table.setflags(write=False)
    return table


COMPOSITION_OF_STYLE: Final = _by_style(
    LINEAR_ADD=Composition.ADD,
    LINEAR_MULTIPLY=Composition.MULTIPLY,
    SIGMOID_ADD=Composition.ADD,
    GATED_GATE=Composition.GATE,
)
"""`Composition` of each `Style`."""

CURVE_OF_STYLE: Final = _by_style(
    LINEAR_ADD=LINEAR,
    LINEAR_MULTIPLY=LINEAR,
    SIGMOID_ADD=ALPHA_CURVES.index("SIGMOID"),
    GATED_GATE=LINEAR,
)
"""Curve, an index into `actions.ALPHA_CURVES`, of the first ramp of a seed that germinated with each `Style`."""


def linear(progress: Floats) -> NDArray[np.float64]:
    """`u` clipped to [0, 1]."""
    return np.clip(np.asarray(progress, dtype=np.float64), 0.0, 1.0)


def cosine(progress: Floats) -> NDArray[np.float64]:
    """`(1 - cos(pi u)) / 2`; 0 at 0 and 1 at 1 exactly."""
    return np.asarray(0.5 * (1 - np.cos(np.pi * linear(progress))))


def sigmoid(progress: Floats, steepness: float) -> NDArray[np.float64]:
    """The logistic of the module's formula with k = `steepness`, stretched to be 0 at 0 and 1 at 1 exactly."""
    u = linear(progress)
    low = 1 / (1 + np.exp(steepness / 2))
    raw = 1 / (1 + np.exp(-steepness * (u - 0.5)))
    stretched = (raw - low) / (1 - 2 * low)
    return np.where(u >= 1.0, 1.0, np.where(u <= 0.0, 0.0, stretched))


def shape(curve: Integers, progress: Floats) -> NDArray[np.float64]:
    """Value of each element's own curve.

    Args:
        curve: `[n]` indices into `actions.ALPHA_CURVES`.
        progress: `[n]` share of the ramp that is done; clipped to [0, 1].

    Returns:
        `[n]` float64 in [0, 1].
    """
    value = np.zeros(np.shape(progress))
    for kind in np.unique(curve).tolist():
        chosen = curve == kind
        u = progress[chosen]
        if kind in STEEPNESS:
            value[chosen] = sigmoid(u, STEEPNESS[kind])
        else:
            value[chosen] = cosine(u) if kind == COSINE else linear(u)
    return value


def curve_for(composition: Integers, wished: Integers) -> NDArray[np.int64]:
    """The curve that a ramp takes: the wished one, but LINEAR for a gated seed. All `[n]`."""
    return np.where(composition == Composition.GATE, LINEAR, wished)


def ramp(
    start: Floats, target: Floats, curve: Integers, epochs_done: Integers, epochs_total: Integers
) -> NDArray[np.float64]:
    """Alpha after so many epochs of a ramp; the module's formula.

    Args:
        start: `[n]` alpha at the ramp's beginning, in [0, 1].
        target: `[n]` alpha at its end, in [0, 1].
        curve: `[n]` indices into `actions.ALPHA_CURVES`.
        epochs_done: `[n]` epochs of the ramp that have passed.
        epochs_total: `[n]` its length, at least 0.

    Returns:
        `[n]` float64, between `start` and `target`; exactly `target` once `epochs_done >= epochs_total`.
    """
    u = epochs_done / np.maximum(epochs_total, 1)
    moving = start + (target - start) * shape(curve, u)
    return np.where(epochs_done >= epochs_total, target, moving)


def mode_of_ramp(start: Floats, target: Floats, epochs_total: Integers) -> NDArray[np.int8]:
    """`AlphaMode` at the beginning of a ramp: HOLD where nothing is left to move. All `[n]`."""
    direction = np.where(target > start, AlphaMode.UP, AlphaMode.DOWN)
    over = (epochs_total == 0) | (target == start)
    return np.where(over, AlphaMode.HOLD, direction).astype(np.int8)
