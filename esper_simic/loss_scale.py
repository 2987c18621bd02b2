"""The scale of a loss whose gradients are float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
from torch import Tensor


class LossScale(msgspec.Struct, frozen=True, kw_only=True):
    """By what a loss is multiplied so that float16 gradients neither vanish nor overflow; dynamic, as GradScaler's.

    A pure fold of whether each step's gradients were finite, made of numbers, so that it stands in checkpoints and
    digests; torch's own `GradScaler` decides for each optimiser alone, so that one of two could step and the other
    not, and keeps its state on the device. The rule is the same: halved after gradients that are not finite, doubled
    after `GROWTH_INTERVAL` finite ones in a row. It never falls below 1: there a gradient that is not finite is not
    the scale's fault (`is_exhausted`), and the failure ladder deals with it.

    Use: multiply the loss by `scale`; after `backward` call `unscale`; when the global norm is finite, clip and step,
    else leave the weights alone; `followed(is_finite)` is the next one. It belongs to one learner: two that train on
    one device have two, so neither's overflow changes the other's steps.

    Source: Micikevicius et al., Mixed Precision Training (2018), section 3.2.
    """

    scale: float = 2.0**16
    finite_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse what is none: it is a power of two in [1, 2^24], so that scaling rounds nothing."""
        if self.scale not in _SCALES or not 0 <= self.finite_steps < GROWTH_INTERVAL:
            raise ValueError(f"this is no loss scale: {self.scale} after {self.finite_steps} finite steps")

    @property
    def is_exhausted(self) -> bool:
        """Whether it can fall no further."""
        return self.scale == 1.0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place; exact, but for the smallest of numbers."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.scale)

    def followed(self, is_finite: bool) -> LossScale:
        """After a step whose gradients were finite, or were not."""
        if not is_finite:
            return LossScale(scale=max(1.0, self.scale / 2))
        if self.finite_steps + 1 < GROWTH_INTERVAL:
            return LossScale(scale=self.scale, finite_steps=self.finite_steps + 1)
        return LossScale(scale=min(_SCALES[-1], self.scale * 2))


GROWTH_INTERVAL: Final = 2000
_SCALES: Final = tuple(2.0**exponent for exponent in range(25))
