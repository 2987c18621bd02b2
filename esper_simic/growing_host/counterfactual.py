"""What is each seed worth? Which variants of a host are measured, and what follows from them.

A *configuration* of a host says which of its ablatable seeds (blended, not fossilised) compute; those that are not
ablatable always do. With `f(K)` the accuracy in percent when exactly the seeds K are kept, N all ablatable ones and
`f(N)` the host as it is, for a seed s:

    contribution_s = f(N) - f(N - {s})                        removal cost
    solo_s         = f({s}) - f({})                            worth alone
    I_st           = f({s, t}) - f({s}) - f({t}) + f({})       interaction of a pair; interaction_s = sum over t of I_st
    total          = f(N) - f({})                              total improvement
    shapley_s      = mean over all orders of joining of f(those before and s) - f(those before)

all in accuracy points. `named_configurations` lists what is asked about a host with n such seeds: 1, 4, 7, 12
configurations for n = 0 to 3, and 20 for n = 3 at the end. Several names often mean the same network (of one seed,
"off" and "committed" are both the bare host), so `plan_variants` measures each distinct one once and never the host as
it is, which is measured anyway: 0, 1, 3, 7, 15 variants for n = 0 to 4. Up to four seeds that is every subset,
so exact Shapley values come free in every epoch; beyond, they are estimated from sampled orders in the last one.

**What these numbers are not.** The host trains with its seeds and adapts to them: it may come to lean on a seed that
added nothing, or unlearn what the seed does better. Removing the seed then costs accuracy although the host, had it
never had it, would be as good. Removal cost is thus confounded by the host's adaptation, and so is everything
above: it describes the network as it stands and is no causal effect of having grown the seed. That effect is what
whole episodes with paired seeds measure (`evaluation.py`).

Everything here works on arrays over lanes; no Python loop runs over lanes but in the last epoch of hosts with more
than four ablatable seeds.

Sources: L. S. Shapley, A Value for n-Person Games, 1953; permutation estimate: Castro, Gómez and Tejada, Polynomial
calculation of the Shapley value based on sampling, Computers & Operations Research 36 (2009), Algorithm 1; orders in
antithetic pairs: Mitchell et al., Sampling Permutations for Shapley Value Estimation, JMLR 23 (2022), section 4.1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.errors import InvariantViolation
from esper_simic.lifecycle import Bools, Floats

FACTORIAL_SEEDS_MAX: Final = 4
"""Up to so many ablatable seeds all subsets are measured at the end; beyond, orders are sampled."""

SAMPLED_ORDERS: Final = 20
"""Orders of joining sampled for the Shapley values of a host with more; half of them are reversals of the others."""

SLOTS_MAX: Final = 32
"""Slots a lane may have here: a configuration is one bit a slot, beside the lane's number in 63 bits."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One thing that is asked about a host: `keep[i]` says whether its i-th ablatable seed computes."""

    name: str
    keep: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Orders:
    """Sampled orders in which the ablatable seeds of a lane join.

    | field | shape | meaning |
    |---|---|---|
    | `lane` | `[P]` int64 | the lane; `SAMPLED_ORDERS` rows each |
    | `slot` | `[P, S]` int64 | slots in order of joining, then -1 |
    """

    lane: NDArray[np.int64]
    slot: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Variants:
    """Variants of hosts to be measured, each once, none of them the host as it is.

    | field | shape | meaning |
    |---|---|---|
    | `lane` | `[V]` int64 | the lane, ascending |
    | `keep` | `[V, S]` bool | which slots' seeds compute; true wherever a slot is not ablatable |
    | `orders` | | the sampled orders behind some of them, None where no lane needs any |
    """

    lane: NDArray[np.int64]
    keep: Bools
    orders: Orders | None = None


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the ablatable seeds of E hosts were worth, in accuracy points; NaN where a seed was not ablated.

    | field | shape | meaning (formulas: see the module) |
    |---|---|---|
    | `contribution` | `[E, S]` | removal cost |
    | `solo` | `[E, S]` | worth alone |
    | `interaction` | `[E, S]` | sum over the other seeds; 0 for an only one |
    | `total_improvement` | `[E]` | of all ablatable seeds together; 0 without any |
    | `committed_accuracy` | `[E]` | percent, with the permanent seeds only |
    | `shapley` | `[E, S]` | NaN too where more than `FACTORIAL_SEEDS_MAX` seeds were not in their last epoch |
    """

    contribution: Floats
    solo: Floats
    interaction: Floats
    total_improvement: Floats
    committed_accuracy: Floats
    shapley: Floats


@functools.cache
def named_configurations(seeds: int, final: bool) -> tuple[Configuration, ...]:
    """All that is asked about a host with so many ablatable seeds, by name, with repetitions.

    The host as it is; each seed off; each alone; from two seeds on all off; from three on each pair; and, with any
    seed, the committed network (permanent seeds only). At the end also all 2^n subsets, for 1 to
    `FACTORIAL_SEEDS_MAX` seeds; the sampled orders of more are a lane's own and not listed here.

    Args:
        seeds: Number n of ablatable seeds.
        final: Whether this is the host's last epoch.
    """
    everyone = range(seeds)

    def keeping(name: str, *kept: int) -> Configuration:
        return Configuration(name, tuple(index in kept for index in everyone))

    asked = [keeping("main", *everyone)]
    asked += [keeping(f"off {index}", *(other for other in everyone if other != index)) for index in everyone]
    asked += [keeping(f"on {index}", index) for index in everyone]
    if seeds >= 2:
        asked.append(keeping("all off"))
    if seeds >= 3:
        asked += [keeping(f"pair {a} {b}", a, b) for a, b in itertools.combinations(everyone, 2)]
    if seeds >= 1:
        asked.append(keeping("committed"))
    if final and 1 <= seeds <= FACTORIAL_SEEDS_MAX:
        subsets = itertools.product((False, True), repeat=seeds)
        asked += [
            Configuration("subset " + "".join(str(int(kept)) for kept in keep), keep) for keep in subsets
        ]
    return tuple(asked)


def plan_variants(
    ablatable: Bools,
    final: Bools,
    *,
    rng: Sequence[np.random.Generator],
    permanent: Bools | None = None,
) -> Variants:
    """Lay out what must be measured, beside the hosts as they are, to answer `named_configurations` in every lane.

    Args:
        ablatable: `[E, S]` seeds that may be switched off.
        final: `[E]` lanes in their last epoch.
        rng: One stream a lane, so that a lane's orders do not depend on its neighbours; drawn from only by lanes in
            their last epoch with more than `FACTORIAL_SEEDS_MAX` ablatable seeds.
        permanent: `[E, S]` seeds that the committed network keeps although they are ablatable, such as fossilised
            ones where a reward asks for their worth too; none by default.

    Returns:
        Distinct variants, ascending by lane.

    Raises:
        InvariantViolation: More than `SLOTS_MAX` slots.
    """
    lanes, slots = ablatable.shape
    bits = _slot_bits(slots)
    whole = ablatable @ bits
    keys = [_keys(np.arange(lanes), _committed(ablatable, permanent, bits), slots)]
    counts = ablatable.sum(axis=1)
    for seeds in np.flatnonzero(np.bincount(counts)).tolist():
        members = np.flatnonzero(counts == seeds)
        # Row r of `own` is the bits of a lane's ablatable slots, in order.
        own = bits[np.nonzero(ablatable[members])[1].reshape(len(members), seeds)]
        keys.append(_keys(members[:, None], own @ _kept_seeds(seeds), slots).ravel())
    orders = _sample_orders(ablatable, final & (counts > FACTORIAL_SEEDS_MAX), rng)
    if orders is not None:
        keys.append(_keys(orders.lane[:, None], _joined(orders, bits), slots).ravel())
    distinct = np.unique(np.concatenate(keys))
    lane, kept = distinct >> slots, distinct & (bits.sum() if slots else 0)
    variant = kept != whole[lane]
    lane, kept = lane[variant], kept[variant]
    keep = (kept[:, None] & bits).astype(np.bool_) | ~ablatable[lane]
    return Variants(lane, keep, orders)


def attribute(
    ablatable: Bools,
    accuracy: Floats,
    variants: Variants,
    variant_accuracy: Floats,
    *,
    permanent: Bools | None = None,
) -> Attribution:
    """What the measured variants say about every seed.

    A number that needs a variant which was not measured is NaN; `total_improvement` then falls back to
    `f(N) - min over s of f(N - {s})`, the largest removal cost.

    Args:
        ablatable: `[E, S]` as given to `plan_variants`.
        accuracy: `[E]` percent, of the hosts as they are.
        variants: V variants, in any order.
        variant_accuracy: `[V]` percent.
        permanent: As given to `plan_variants`.
    """
    lanes, slots = ablatable.shape
    bits = _slot_bits(slots)
    f = _Measured(ablatable, accuracy, variants, variant_accuracy)
    each = np.arange(lanes)
    by_slot = each[:, None]
    whole = ablatable @ bits
    none = f(each, np.zeros_like(whole))
    leave_one_out = np.where(ablatable, f(by_slot, whole[:, None] & ~bits), np.nan)
    alone = np.where(ablatable, f(by_slot, ablatable * bits), np.nan)
    fewest = np.fmin.reduce(leave_one_out, axis=1, initial=np.inf)
    return Attribution(
        contribution=accuracy[:, None] - leave_one_out,
        solo=alone - none[:, None],
        interaction=_interaction(ablatable, f, alone, none),
        total_improvement=np.where(
            np.isnan(none), accuracy - np.where(np.isinf(fewest), np.nan, fewest), accuracy - none
        ),
        committed_accuracy=f(each, _committed(ablatable, permanent, bits)),
        shapley=_shapley(ablatable, f, variants.orders),
    )


class AttributionTable:
    """The last attribution of E hosts, as far as it is not a slot's own.

    Contribution, solo and interaction are fields of `SlotTable`, which forgets them with the seed; what belongs to a
    whole host, or only to an episode's end, is kept here, and here alone.

    | field | shape | meaning |
    |---|---|---|
    | `total_improvement` | `[E]` | points; NaN before the first measurement |
    | `committed_accuracy` | `[E]` | percent; NaN before the first measurement |
    | `shapley` | `[E, S]` | points; NaN where unknown |
    """

    def __init__(self, lanes: int, slots: int) -> None:
        self.total_improvement = np.full(lanes, np.nan)
        self.committed_accuracy = np.full(lanes, np.nan)
        self.shapley = np.full((lanes, slots), np.nan)

    def reset(self, lanes: NDArray[np.int64]) -> None:
        """Forget what was measured in some lanes."""
        for values in (self.total_improvement, self.committed_accuracy, self.shapley):
            values[lanes] = np.nan

    def record(self, measured: Attribution) -> None:
        """Replace everything by the measurement that has just been made, in every lane."""
        np.copyto(self.total_improvement, measured.total_improvement)
        np.copyto(self.committed_accuracy, measured.committed_accuracy)
        np.copyto(self.shapley, measured.shapley)

    def state_dict(self) -> dict[str, NDArray[np.float64]]:
        """All fields, copied."""
        return {
            "total_improvement": self.total_improvement.copy(),
            "committed_accuracy": self.committed_accuracy.copy(),
            "shapley": self.shapley.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; shapes must agree.

        Raises:
            ValueError: A field has another shape.
        """
        np.copyto(self.total_improvement, _shaped(state, "total_improvement", self.total_improvement.shape))
        np.copyto(
            self.committed_accuracy, _shaped(state, "committed_accuracy", self.committed_accuracy.shape)
        )
        np.copyto(self.shapley, _shaped(state, "shapley", self.shapley.shape))


class _Measured:
    """`f`: the accuracy of a lane with exactly these ablatable slots kept (bits); NaN where not measured."""

    def __init__(
        self, ablatable: Bools, accuracy: Floats, variants: Variants, variant_accuracy: Floats
    ) -> None:
        lanes, self._slots = ablatable.shape
        bits = _slot_bits(self._slots)
        own = _keys(np.arange(lanes), ablatable @ bits, self._slots)
        varied = _keys(variants.lane, (variants.keep & ablatable[variants.lane]) @ bits, self._slots)
        keys = np.concatenate((own, varied))
        order = np.argsort(keys)
        # The last entry catches searches beyond the largest key.
        self._keys = np.append(keys[order], -1)
        self._accuracy = np.append(np.concatenate((accuracy, variant_accuracy))[order], np.nan)

    def __call__(self, lane: NDArray[np.int64], kept: NDArray[np.int64]) -> Floats:
        wanted = _keys(lane, kept, self._slots)
        at = np.searchsorted(self._keys[:-1], wanted)
        return np.where(self._keys[at] == wanted, self._accuracy[at], np.nan)


def _interaction(ablatable: Bools, f: _Measured, alone: Floats, none: Floats) -> Floats:
    """Sum of each seed's interactions with the others, `[E, S]`."""
    lanes, slots = ablatable.shape
    bits = _slot_bits(slots)
    pairs = ablatable[:, :, None] & ablatable[:, None, :] & ~np.eye(slots, dtype=np.bool_)
    lane, a, b = np.nonzero(pairs)
    both = f(lane, bits[a] | bits[b])
    interaction = np.zeros((lanes, slots))
    np.add.at(interaction, (lane, a), both - alone[lane, a] - alone[lane, b] + none[lane])
    return np.where(ablatable, interaction, np.nan)


def _shapley(ablatable: Bools, f: _Measured, orders: Orders | None) -> Floats:
    """Exact where all subsets are few enough to have been measured, the mean over sampled orders elsewhere."""
    bits = _slot_bits(ablatable.shape[1])
    counts = ablatable.sum(axis=1)
    values = np.full(ablatable.shape, np.nan)
    for seeds in range(1, FACTORIAL_SEEDS_MAX + 1):
        lanes = np.flatnonzero(counts == seeds)
        if len(lanes):
            members = np.nonzero(ablatable[lanes])[1].reshape(len(lanes), seeds)
            accuracy = f(lanes[:, None], bits[members] @ _all_subsets(seeds))
            values[lanes[:, None], members] = accuracy @ _shapley_weights(seeds)
    if orders is not None:
        sampled = np.unique(orders.lane)
        values[sampled] = _mean_over_orders(orders, f, bits, len(ablatable))[sampled]
    return np.where(ablatable, values, np.nan)


def _mean_over_orders(orders: Orders, f: _Measured, bits: NDArray[np.int64], lanes: int) -> Floats:
    """Mean gain of each slot at the moment it joins, `[E, S]`; 0 where it never does."""
    accuracy = f(orders.lane[:, None], _joined(orders, bits))
    gain = np.diff(accuracy, axis=1)
    row, position = np.nonzero(orders.slot >= 0)
    total = np.zeros((lanes, len(bits)))
    np.add.at(total, (orders.lane[row], orders.slot[row, position]), gain[row, position])
    return total / SAMPLED_ORDERS


def _sample_orders(ablatable: Bools, wanted: Bools, rng: Sequence[np.random.Generator]) -> Orders | None:
    """Orders in antithetic pairs (each with its reversal) for the lanes in `wanted`, `[E]`."""
    lanes = np.flatnonzero(wanted)
    if not len(lanes):
        return None
    slot = np.full((len(lanes), SAMPLED_ORDERS, ablatable.shape[1]), -1)
    for row, lane in enumerate(lanes.tolist()):
        members = np.flatnonzero(ablatable[lane])
        forward = rng[lane].permuted(np.tile(members, (SAMPLED_ORDERS // 2, 1)), axis=1)
        slot[row, :, : len(members)] = np.concatenate((forward, forward[:, ::-1]))
    return Orders(np.repeat(lanes, SAMPLED_ORDERS), slot.reshape(-1, ablatable.shape[1]))


def _joined(orders: Orders, bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Who has joined after 0, 1, 2, ... steps of each order: bits, `[P, S + 1]`."""
    joining = np.where(orders.slot >= 0, bits[orders.slot], 0)
    joined = np.zeros((len(joining), len(bits) + 1), dtype=np.int64)
    np.cumsum(joining, axis=1, out=joined[:, 1:])
    return joined


def _committed(ablatable: Bools, permanent: Bools | None, bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ablatable slots that the committed network keeps: bits, `[E]`."""
    if permanent is None:
        return np.zeros(len(ablatable), dtype=np.int64)
    return np.asarray((ablatable & permanent) @ bits)


def _keys(lane: NDArray[np.int64], kept: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    """One integer for a lane and its kept slots."""
    return np.asarray((lane << slots) | kept)


def _slot_bits(slots: int) -> NDArray[np.int64]:
    if slots > SLOTS_MAX:
        raise InvariantViolation(f"{slots} slots a lane; counterfactuals know at most {SLOTS_MAX}")
    return np.int64(1) << np.arange(slots, dtype=np.int64)


@functools.cache
def _kept_seeds(seeds: int) -> NDArray[np.int64]:
    """The distinct named configurations of every epoch as columns of 0 and 1, `[seeds, K]`."""
    distinct = sorted({configuration.keep for configuration in named_configurations(seeds, False)})
    return np.array(distinct, dtype=np.int64).reshape(len(distinct), seeds).T


@functools.cache
def _all_subsets(seeds: int) -> NDArray[np.int64]:
    """All subsets as columns of 0 and 1, `[seeds, 2^seeds]`."""
    return np.array(list(itertools.product((0, 1), repeat=seeds)), dtype=np.int64).T


@functools.cache
def _shapley_weights(seeds: int) -> NDArray[np.float64]:
    """Shapley values as a linear map of the accuracies of all subsets, `[2^seeds, seeds]`.

    Of a subset T with s in it, `(|T| - 1)! (n - |T|)! / n!` counts for s; without it, `-|T|! (n - |T| - 1)! / n!`.
    """
    subsets = _all_subsets(seeds).T
    weights = np.zeros(subsets.shape)
    for row, inside in enumerate(subsets):
        size = int(inside.sum())
        for seed in range(seeds):
            before = size - 1 if inside[seed] else size
            share = math.factorial(before) * math.factorial(seeds - before - 1) / math.factorial(seeds)
            weights[row, seed] = share if inside[seed] else -share
    return weights


def _shaped(state: dict[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    values = np.asarray(state[name], dtype=np.float64)
    if values.shape != shape:
        raise ValueError(f"{name} has shape {list(values.shape)}, not {list(shape)}")
    return values
