"""Means in which a step of weight 0 has no part, and how much of the targets the values explain."""

from __future__ import annotations

from typing import Final

from torch import Tensor

TINY: Final = 1e-8


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """`sum(w x) / sum(w)`, 0 if every weight is 0; gradient flows through `x`.

    Args:
        x: Finite, also where its weight is 0.
        weights: Of the same shape, >= 0.

    Returns:
        A scalar.
    """
    return (x * weights).sum() / weights.sum().clamp(min=TINY)


def explained_variance(targets: Tensor, values: Tensor) -> Tensor:
    """`1 - Var(targets - values) / (Var(targets) + TINY)` over all steps, whatever their weight.

    1 is perfect, 0 no better than a constant, and far below 0 where all targets are alike.
    """
    return 1 - (targets - values).var(correction=0) / (targets.var(correction=0) + TINY)
