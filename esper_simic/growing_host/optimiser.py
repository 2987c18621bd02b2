"""One step of the optimiser, row by row: SGD with momentum, gradients clipped by their norm.

With momentum m, rate eta, limit c and the gradient g of one row:

    v <- m v + g min(1, c / |g|),    theta <- theta - eta v

A gradient that is not finite is not applied (its share is 0), but momentum goes on; the caller sees its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trained:
    """Rows that are trained together: parameters and momentum `[n, P]`, and their learning rate."""

    parameters: Tensor
    momentum: Tensor
    rate: float

    def leaf(self) -> Tensor:
        """The parameters as a leaf of a gradient's graph; shares memory."""
        return self.parameters.detach().requires_grad_()


def descend(rows: Trained, gradient: Tensor, squared_norm: Tensor, *, decay: float, limit: float) -> None:
    """Move rows along their clipped gradients, in place.

    Args:
        rows: What is moved.
        gradient: `[n, P]`.
        squared_norm: `[n]` of `gradient`.
        decay: Momentum, in [0, 1).
        limit: Norm above which a row's gradient is scaled down to it.
    """
    norm = squared_norm.sqrt()
    finite = torch.isfinite(norm)
    share = torch.where(finite, torch.clamp(limit / (norm + 1e-6), max=1.0), 0.0)
    clipped = gradient * share.unsqueeze(1)
    # On a CPU the answer is at hand and saves a pass; elsewhere, asking would wait for the device.
    if gradient.device.type != "cpu" or not bool(finite.all()):
        clipped = torch.where(finite.unsqueeze(1), clipped, 0.0)
    rows.momentum.mul_(decay).add_(clipped)
    rows.parameters.add_(rows.momentum, alpha=-rows.rate)
