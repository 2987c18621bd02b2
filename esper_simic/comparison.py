"""Statistics of a comparison: outcomes of episodes to figures that can be read beside each other.

Few episodes, skewed returns and an outlier or two: so beside the mean stands the *interquartile mean*, the mean of the
middle half, and beside Student's interval the *percentile bootstrap*, which assumes no distribution. Controllers are
measured on the same seeds, so what they differ by is taken seed by seed (`paired`): how hard a seed is cancels out.

A bootstrap replicate is a row of counts: how often each value was drawn. Every statistic here is a function of values
and counts, so thousands of replicates are a few array operations, and none is ever sorted. The percentile interval is
used rather than one with bias correction and acceleration: outcomes such as "no parameter added" are often all equal,
where the jackknife of the acceleration is 0 / 0.

Legend: R replicates, n values, N seeds.

Sources: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021
(interquartile mean, stratified bootstrap, probability of improvement); Efron, Bootstrap Methods: Another Look at the
Jackknife, Annals of Statistics 7 (1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CONFIDENCE: Final = 0.95

REPLICATES: Final = 4000
"""Bootstrap replicates. The standard deviation of an interval's end is then 1 % of the interval's width:
`√(p (1 - p) / R) / (f · 3.92)` at p = 0.025 of normal replicates, whose density there is f = 0.058."""

_BLOCK: Final = 1 << 20
"""Most counts held at once; more replicates are made block after block."""


class Interval(msgspec.Struct, frozen=True):
    """A mean and its two-sided 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Whether this whole interval lies above the other one."""
        return self.low > other.high


class Estimate(msgspec.Struct, frozen=True):
    """A statistic and its two-sided 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def sign(self, origin: float = 0.0) -> int:
        """1 where the whole interval lies above `origin`, -1 where below, 0 where it holds it."""
        return int(self.low > origin) - int(self.high < origin)


class Paired(msgspec.Struct, frozen=True, kw_only=True):
    """Two controllers on the same seeds, the first against the second, in one figure.

    Attributes:
        seeds: How many.
        mean: Mean of the differences, first minus second, seed by seed.
        interquartile_mean: Interquartile mean of the same differences.
        probability: Of improvement: that an episode of the first gives more than one of the second.
    """

    seeds: int
    mean: Estimate
    interquartile_mean: Estimate
    probability: Estimate


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


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half: `⌊n / 4⌋` values are dropped at each end.

    Args:
        values: At least one finite number.

    Raises:
        ValueError: No value.

    Source: Agarwal et al. 2021, section 4.3.
    """
    array = _checked(values, "an interquartile mean", 1)
    return float(interquartile_mean_of(array, np.ones((1, len(array)), dtype=np.int64))[0])


def mean_of(values: Floats, counts: Counts) -> Floats:
    """Mean of each replicate.

    Args:
        values: `[n]`.
        counts: `[R, n]`: how often each value was drawn; every row has the sum n.

    Returns:
        `[R]`.
    """
    return np.asarray(counts @ values / len(values))


def interquartile_mean_of(values: Floats, counts: Counts) -> Floats:
    """Interquartile mean of each replicate; arguments and result as of `mean_of`.

    In sorted order value i fills the places from the count of all before it to that count plus its own; what of them
    lies in `[⌊n/4⌋, n - ⌊n/4⌋)` is kept.
    """
    order = np.argsort(values, kind="stable")
    n = len(values)
    first, stop = n // 4, n - n // 4
    ends = np.cumsum(counts[:, order], axis=1)
    filled = np.clip(ends, first, stop)
    filled[:, 1:] -= filled[:, :-1].copy()
    filled[:, 0] -= first
    return np.asarray(filled @ values[order] / (stop - first))


def improvement_of(ours: Floats, theirs: Floats, counts: Counts) -> Floats:
    """Probability of improvement in each replicate of N seeds.

    `P(X > Y) + P(X = Y) / 2` for X drawn from ours and Y from theirs: over all N x N pairs, as the statistic of Mann
    and Whitney.

    Args:
        ours: `[N]`.
        theirs: `[N]`, on the same seeds.
        counts: `[R, N]`: how often each seed was drawn.

    Returns:
        `[R]` in [0, 1].

    Source: Agarwal et al. 2021, section 4.3 and appendix A.5, within one task.
    """
    n = len(ours)
    order = np.argsort(theirs, kind="stable")
    below = np.zeros((len(counts), n + 1))
    np.cumsum(counts[:, order], axis=1, out=below[:, 1:])
    ranked = theirs[order]
    less, less_or_equal = np.searchsorted(ranked, ours, "left"), np.searchsorted(ranked, ours, "right")
    beaten = (below[:, less] + below[:, less_or_equal]) / 2
    return np.asarray((counts * beaten).sum(axis=1) / n**2)


def resample_counts(sizes: Sequence[int], replicates: int, rng: np.random.Generator) -> Counts:
    """Draw replicates with replacement, each stratum within itself.

    Args:
        sizes: Values of each stratum.
        replicates: R.
        rng: Chance.

    Returns:
        `[R, sum(sizes)]`: how often each value was drawn; in every row the columns of a stratum sum to its size.
    """
    parts = []
    for size in sizes:
        drawn = rng.integers(size, size=(replicates, size))
        drawn += np.arange(replicates)[:, None] * size
        parts.append(np.bincount(drawn.ravel(), minlength=replicates * size).reshape(replicates, size))
    return np.concatenate(parts, axis=1)


def bootstrap_interval(
    strata: Sequence[Sequence[float]],
    *,
    rng: np.random.Generator,
    statistic: Callable[[Floats, Counts], Floats] = interquartile_mean_of,
    replicates: int = REPLICATES,
) -> Estimate:
    """A statistic of values from one or several runs, with its stratified percentile bootstrap interval.

    Values are drawn anew within their stratum, so what distinguishes runs is no chance of the interval; one stratum is
    the ordinary bootstrap.

    Args:
        strata: The values of each run: finite numbers, at least one a run and two in all.
        rng: Chance, such as a stream named by the run.
        statistic: `mean_of` or `interquartile_mean_of`, of all values together.
        replicates: R, at least 2.

    Raises:
        ValueError: Too few values, or one that is not finite.
    """
    arrays = [_checked(stratum, "a stratum of a bootstrap", 1) for stratum in strata]
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    _checked(values, "a bootstrap", 2)
    return _estimate(
        lambda counts: statistic(values, counts), [len(array) for array in arrays], rng, replicates
    )


def paired(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> Paired:
    """Compare two controllers on the same seeds: seeds are drawn anew, each with both of its outcomes.

    Args:
        ours: One finite number a seed, at least two.
        theirs: The same seeds in the same order.
        rng: Chance.
        replicates: R, at least 2.

    Raises:
        ValueError: Other numbers of seeds, fewer than two, or a value that is not finite.
    """
    first, second = _checked(ours, "a comparison", 2), _checked(theirs, "a comparison", 2)
    if len(first) != len(second):
        raise ValueError(f"outcomes are paired by seed: {len(first)} cannot go with {len(second)}")
    differences = first - second
    statistics = (
        lambda counts: mean_of(differences, counts),
        lambda counts: interquartile_mean_of(differences, counts),
        lambda counts: improvement_of(first, second, counts),
    )
    mean, middle, probability = (_estimate(one, [len(first)], rng, replicates) for one in statistics)
    return Paired(seeds=len(first), mean=mean, interquartile_mean=middle, probability=probability)


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> Bools:
    """Which points nobody dominates: no other has at least the gain at no more cost, and is better in one of the two.

    Equal points are on the front together. Compares all pairs.

    Args:
        gains: `[n]`, the more the better, such as accuracy.
        costs: `[n]`, the less the better, such as parameters.

    Returns:
        `[n]`.

    Raises:
        ValueError: Other numbers of gains than of costs.
    """
    gain, cost = np.asarray(gains, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if gain.shape != cost.shape:
        raise ValueError(f"every point has a gain and a cost: {len(gain)} cannot go with {len(cost)}")
    no_worse = (gain[None, :] >= gain[:, None]) & (cost[None, :] <= cost[:, None])
    better = (gain[None, :] > gain[:, None]) | (cost[None, :] < cost[:, None])
    return np.asarray(~(no_worse & better).any(axis=1))


def _estimate(
    statistic: Callable[[Counts], Floats], sizes: Sequence[int], rng: np.random.Generator, replicates: int
) -> Estimate:
    """The statistic of the values as they are, and the middle 95 % of its replicates."""
    total = sum(sizes)
    rows_max = max(1, _BLOCK // total)
    found = []
    for start in range(0, replicates, rows_max):
        counts = resample_counts(sizes, min(rows_max, replicates - start), rng)
        found.append(statistic(counts))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), (tail, 1 - tail))
    value = statistic(np.ones((1, total), dtype=np.int64))[0]
    return Estimate(float(value), float(low), float(high))


def _checked(values: npt.ArrayLike, what: str, count_min: int) -> npt.NDArray[Any]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < count_min:
        raise ValueError(f"{what} needs at least {count_min} values, not {array.size}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} needs finite values; {array[~np.isfinite(array)][0]} is none")
    return array
