"""Entropy floors: a policy whose choice at some head has all but closed is pushed open again.

    penalty = scale * sum_h coefficient_h * max(0, floor_h - H_h)^2
    H_h     = mean_w( entropy of head h ) over the steps at which its choice was available

Entropies are normalised, in [0, 1]: each divided by the logarithm of its number of legal choices. *Available* means
that the head, as it was evaluated, had more than one legal choice to act by, whichever it took. Where a head depends on
choices made before it (an operation), it has none where those do not use it: what it would be after another operation
is a distribution that nobody acts by, and kept open, it would hide that the one which acts is closed. Nothing is evaded
by that: no gradient leads from a head's penalty to the choices before it, which have floors of their own. A head
without any available step has no penalty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_masks, check_unrolls
from esper_simic.algorithms.weighted import weighted_mean

SCALE_FIRST_QUARTER: Final = 1.5
SCALE_END: Final = 0.5


@dataclass(frozen=True, slots=True)
class EntropyFloor:
    """A head's floor, of normalised entropy in [0, 1], and the weight of the squared shortfall, >= 0."""

    level: float
    coefficient: float


def entropy_floor_scale(progress: float) -> float:
    """How much floors count: 1.5 in the first quarter of a training, then 1, falling to 0.5 in the last quarter.

    Args:
        progress: Share of the training that is done, in [0, 1].

    Raises:
        ValueError: `progress` is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], it is {progress}")
    if progress < 0.25:
        return SCALE_FIRST_QUARTER
    return 1 - (1 - SCALE_END) * max(0.0, 4 * progress - 3)


def entropy_floor_penalty(
    entropies: Mapping[str, Tensor],
    available: Mapping[str, Tensor],
    weights: Tensor,
    floors: Mapping[str, EntropyFloor],
    scale: float = 1.0,
) -> Tensor:
    """Compute the penalty.

    Args:
        entropies: By head, `[T, B]`, normalised; gradient flows.
        available: By head, `[T, B]`, whether there was a choice to act by.
        weights: `[T, B]` >= 0, of the steps.
        floors: By head; heads that `entropies` does not have are left out.
        scale: Factor of the whole, see `entropy_floor_scale`.

    Returns:
        A scalar >= 0; 0 without floors.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    penalty = weights.new_zeros(())
    for head, floor in floors.items():
        if head not in entropies:
            continue
        check_unrolls(weights=weights, **{f"entropies of {head}": entropies[head]})
        check_masks(weights, **{f"availability of {head}": available[head]})
        counted = weights * available[head].to(weights.dtype)
        # No step is no shortfall: torch.where keeps the penalty of an empty mean, 0, from being that of a closed head.
        shortfall = torch.where(
            counted.sum() > 0, floor.level - weighted_mean(entropies[head], counted), 0.0
        ).clamp(min=0)
        penalty = penalty + scale * floor.coefficient * shortfall.square()
    return penalty
