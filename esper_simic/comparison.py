"""Statistics of a comparison: outcomes of episodes to intervals that can be read beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from scipy import special

CONFIDENCE: Final = 0.95


class Interval(msgspec.Struct, frozen=True):
    """A mean and its two-sided 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Whether this whole interval lies above the other one."""
        return self.low > other.high


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent values.

    `mean ± t(0.975, n - 1) · s / √n`, with the sample standard deviation s.

    Args:
        values: At least two finite numbers.

    Raises:
        ValueError: Fewer than two values.

    Source: Student, The Probable Error of a Mean, Biometrika 6 (1908).
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs at least two values, not {count}")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    quantile = float(special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * float(array.std(ddof=1)) / float(np.sqrt(count))
    return Interval(mean, mean - half, mean + half)
