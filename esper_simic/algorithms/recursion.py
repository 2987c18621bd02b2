"""The recursion that value targets and advantages share, from the last step of an unroll to its first.

    y_t = b_t + a_t y_{t+1},    y_T = 0,    and y_t = b_t where a_t = 0, whatever y_{t+1} is

One step after the other, it is T small operations, and their fixed cost is all the cost there is. Long unrolls are
therefore doubled: affine maps compose, (b, a) after (b', a') is (b + a b', a a'), so when y_t holds its first k terms
and a_t the product of its first k decays,

    y_t <- y_t + a_t y_{t+k},    a_t <- a_t a_{t+k},    k <- 2 k

holds 2 k of them, and log2(T) rounds are enough. Rounding errors grow with the number of rounds, not of steps.

What is chosen, and why, as measured on one thread with 32 lanes: a round costs 3 µs with NumPy (which shares a CPU
tensor's memory), 13 µs with torch; a step of the loop 1.5 µs. So on a CPU short unrolls, and those too wide for the
fixed cost to matter, are looped. The loop's bits are those of every journal that was written before doubling came.

Both multiply by decays of 0, which is exact unless what lies behind the episode's end is infinite or NaN (0 times
infinity is NaN). On a CPU a result that is not finite is therefore computed again with the ends cut out. On other
devices looking at a result would stall them, so ends are cut in every round; there, decays above 1 whose product
passes the largest float can spread NaN over the lane.

Source: Kogge, Stone, A parallel algorithm for the efficient solution of a general class of recurrence equations
(1973).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from esper_simic.algorithms.shapes import check_unrolls

LOOP_STEPS_MAX: Final = 24
"""On a CPU unrolls up to so long are looped: the most that doubling could save there is 20 µs."""

DOUBLING_LANES_MAX: Final = 512
"""On a CPU wider unrolls are looped: doubling reads and writes everything log2(T) times."""

NUMPY_DTYPES: Final = (torch.float32, torch.float64)


def affine_scan(decays: Tensor, terms: Tensor) -> Tensor:
    """Solve y_t = terms_t + decays_t y_{t+1} with y_T = 0.

    Args:
        decays: `[T, B]`, a_t >= 0; 0 where an episode ends with step t. The last row counts for nothing.
        terms: `[T, B]`, b_t.

    Returns:
        `[T, B]`, without gradient; a new tensor.

    Raises:
        ValueError: Shapes or dtypes do not agree; the message names the argument.
    """
    check_unrolls(terms=terms, decays=decays)
    decays, terms = decays.detach(), terms.detach()
    # Compiled, looking at a result would break the graph.
    is_looked_at = terms.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_looked_at or terms.dtype not in NUMPY_DTYPES:
        return _doubled_cutting_ends(decays, terms)
    steps, lanes = terms.shape
    looped = steps <= LOOP_STEPS_MAX or lanes > DOUBLING_LANES_MAX
    sums = _looped(decays, terms) if looped else _doubled(decays, terms)
    # The sum is finite only if everything in it is; where it alone overflows, the slow way gives the same numbers.
    return sums if math.isfinite(sums.sum().item()) else _looped_cutting_ends(decays, terms)


def next_values(values: Tensor, bootstrap_value: Tensor, discounts: Tensor) -> Tensor:
    """V(x_{t+1}) beside V(x_t): 0 where the episode ends with step t, so that discount times it is 0 there.

    Args:
        values: `[T, B]`, V(x_t).
        bootstrap_value: `[B]`, V(x_T).
        discounts: `[T, B]`.

    Returns:
        `[T, B]`.
    """
    return torch.cat([values[1:], bootstrap_value.unsqueeze(0)]).masked_fill_(discounts == 0, 0.0)


def _looped(decays: Tensor, terms: Tensor) -> Tensor:
    sums = terms.clone()
    rows, factors = sums.unbind(0), decays.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(factors[t], rows[t + 1])
    return sums


def _looped_cutting_ends(decays: Tensor, terms: Tensor) -> Tensor:
    sums = terms.clone()
    rows, factors, ends = sums.unbind(0), decays.unbind(0), (decays == 0).unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(factors[t], rows[t + 1].masked_fill(ends[t], 0.0))
    return sums


def _doubled(decays: Tensor, terms: Tensor) -> Tensor:
    sums = terms.numpy().copy()
    # What overflows here is found by the caller.
    with np.errstate(over="ignore", invalid="ignore"):
        _double(decays.numpy().copy(), sums, np.empty_like(sums), np.multiply)
    return torch.from_numpy(sums)


def _doubled_cutting_ends(decays: Tensor, terms: Tensor) -> Tensor:
    sums = terms.clone()
    _double(decays.clone(), sums, torch.empty_like(sums), _multiply_cutting_ends)
    return sums


def _double(decays: Any, sums: Any, spare: Any, multiply: Callable[..., object]) -> None:
    """The rounds, in place; `[T, B]` each, all NumPy's or all torch's. `spare` is overwritten."""
    steps, shift = sums.shape[0], 1
    while shift < steps:
        reached = sums[:-shift]
        added = spare[:-shift]
        multiply(decays[:-shift], sums[shift:], out=added)
        reached += added
        if 2 * shift < steps:
            kept = steps - 2 * shift
            multiply(decays[:kept], decays[shift : shift + kept], out=spare[:kept])
            decays[:kept] = spare[:kept]
        shift *= 2


def _multiply_cutting_ends(x: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
    return torch.mul(x, y, out=out).masked_fill_(x == 0, 0.0)
