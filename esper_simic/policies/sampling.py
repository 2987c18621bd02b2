"""Chance handed in as uniform numbers becomes actions: inversion of distribution functions."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

UNIFORM_MIN: Final = 2.0**-54
"""Stands for a uniform number of 0, whose normal quantile would be minus infinity; half of the next one that can be."""


def invert(logits: Tensor, legal: Tensor, uniforms: Tensor) -> Tensor:
    """The choice at which the distribution function of softmax(logits) over the legal choices passes `uniforms`.

    Args:
        logits: `[N, choices]`.
        legal: `[N, choices]` bool, true somewhere in each row.
        uniforms: `[N]` float64 in [0, 1).

    Returns:
        `[N]` int64; never an illegal choice nor one of probability 0.
    """
    return invert_probabilities(logits.double().masked_fill(~legal, -math.inf).softmax(dim=-1), uniforms)


def invert_probabilities(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The choice at which the distribution function passes `uniforms`, whatever the probabilities sum to.

    Args:
        probabilities: `[N, choices]`, at least 0, in each row somewhere above it.
        uniforms: `[N]` float64 in [0, 1).

    Returns:
        `[N]` int64; never a choice of probability 0.
    """
    cumulative = probabilities.cumsum(dim=-1)
    # In float64 also for probabilities of float32: a uniform is at most 1 - 2^-53, and that times a total rounds to
    # below the total, so never past the last choice. A choice of probability 0 adds nothing, so it is passed together
    # with the one before it.
    target = uniforms * cumulative[:, -1]
    return (cumulative <= target.unsqueeze(-1)).sum(dim=-1)


def normal_quantiles(uniforms: Tensor) -> Tensor:
    """The standard normal numbers at which the distribution function is `uniforms` (float64 in [0, 1)): finite."""
    quantiles: Tensor = torch.special.ndtri(uniforms.clamp(min=UNIFORM_MIN))
    return quantiles
