"""Counterfactuals against a literal truth: one lane, one dictionary from kept seeds to accuracy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic import seeding
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.counterfactual import (
    SAMPLED_ORDERS,
    Attribution,
    AttributionTable,
    Variants,
    attribute,
    named_configurations,
    plan_variants,
)

SMALL = settings(max_examples=60, deadline=None, derandomize=True)
ablatables = st.integers(1, 5).flatmap(
    lambda slots: st.lists(
        st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=6
    ).map(np.array)
)


def streams(lanes, key="test"):
    return [seeding.generator(key, lane) for lane in range(lanes)]


def plan(ablatable, final=False, permanent=None):
    lanes = len(ablatable)
    return plan_variants(ablatable, np.full(lanes, final), rng=streams(lanes), permanent=permanent)


def truth(lane, kept):
    """An accuracy that depends in no simple way on the seeds kept: `f(K)`."""
    return float(seeding.generator("accuracy", int(lane), *sorted(int(s) for s in kept)).uniform(10, 95))


def kept_seeds(ablatable, variants):
    """Each variant's kept ablatable slots."""
    return [
        frozenset(np.flatnonzero(keep & ablatable[lane]).tolist())
        for lane, keep in zip(variants.lane, variants.keep, strict=True)
    ]


def measured(ablatable, final=False, permanent=None, f=truth):
    """Plan, measure by `f`, attribute."""
    variants = plan(ablatable, final, permanent)
    found = [f(lane, kept) for lane, kept in zip(variants.lane, kept_seeds(ablatable, variants), strict=True)]
    accuracy = np.array([f(lane, np.flatnonzero(row)) for lane, row in enumerate(ablatable)])
    return attribute(ablatable, accuracy, variants, np.array(found), permanent=permanent)


@pytest.mark.parametrize(
    ("seeds", "final", "count"),
    [
        (0, False, 1),
        (1, False, 4),
        (2, False, 7),
        (3, False, 12),
        (0, True, 1),
        (1, True, 6),
        (2, True, 11),
        (3, True, 20),
        (4, False, 17),
        (4, True, 33),
        (5, True, 23),
    ],
)
def test_configurations_asked_about_a_host(seeds, final, count):
    asked = named_configurations(seeds, final)
    assert len(asked) == len({configuration.name for configuration in asked}) == count
    assert all(len(configuration.keep) == seeds for configuration in asked)
    assert asked[0].name == "main"
    assert all(asked[0].keep)


def test_what_the_names_of_three_seeds_keep():
    keep = {
        configuration.name: "".join("01"[kept] for kept in configuration.keep)
        for configuration in named_configurations(3, True)
    }
    assert keep["off 1"] == "101"
    assert keep["on 1"] == "010"
    assert keep["pair 0 2"] == "101"
    assert keep["all off"] == keep["committed"] == "000"
    assert {keep[name] for name in keep if name.startswith("subset")} == {
        "".join(bits) for bits in itertools.product("01", repeat=3)
    }


@pytest.mark.parametrize(("seeds", "count"), [(0, 0), (1, 1), (2, 3), (3, 7), (4, 15), (5, 21), (10, 66)])
def test_each_distinct_variant_is_measured_once(seeds, count):
    ablatable = np.arange(12)[None] < seeds
    assert len(plan(ablatable).lane) == count
    if seeds <= 4:  # the subsets asked for at the end have all been measured anyway
        assert len(plan(ablatable, final=True).lane) == count


@given(ablatables, st.booleans())
@SMALL
def test_the_plan_holds_every_configuration_of_every_lane_and_nothing_else(ablatable, final):
    variants = plan(ablatable, final)
    found = list(zip(variants.lane.tolist(), kept_seeds(ablatable, variants), strict=True))
    assert len(found) == len(set(found))
    assert variants.keep[~ablatable[variants.lane]].all()
    assert (np.diff(variants.lane) >= 0).all()
    for lane, row in enumerate(ablatable):
        members = np.flatnonzero(row)
        asked = {
            frozenset(members[list(configuration.keep)].tolist())
            for configuration in named_configurations(len(members), final)
        }
        mine = {kept for owner, kept in found if owner == lane}
        assert frozenset(members.tolist()) not in mine
        extra = mine - asked
        assert asked - mine == {frozenset(members.tolist())}
        assert not extra or (final and len(members) > 4)


def literal(lane, members):
    """What the module's formulas say, one seed and one subset at a time."""
    everyone = frozenset(members)
    f = {
        frozenset(kept): truth(lane, kept)
        for size in range(len(members) + 1)
        for kept in itertools.combinations(members, size)
    }
    none: frozenset[int] = frozenset()
    result = {}
    for s in members:
        others = [t for t in members if t != s]
        interactions = [
            f[frozenset({s, t})] - f[frozenset({s})] - f[frozenset({t})] + f[none] for t in others
        ]
        gains = []
        for order in itertools.permutations(members):
            before = frozenset(order[: order.index(s)])
            gains.append(f[before | {s}] - f[before])
        result[s] = (
            f[everyone] - f[everyone - {s}],
            f[frozenset({s})] - f[none],
            sum(interactions),
            sum(gains) / math.factorial(len(members)),
        )
    return result, f[everyone] - f[none]


@given(ablatables)
@SMALL
def test_attribution_equals_the_formulas(ablatable):
    got = measured(ablatable)
    for lane, row in enumerate(ablatable):
        members = np.flatnonzero(row).tolist()
        per_slot, total = literal(lane, members)
        assert got.total_improvement[lane] == pytest.approx(total, abs=1e-9)
        assert got.committed_accuracy[lane] == pytest.approx(truth(lane, []), abs=1e-9)
        for slot in range(len(row)):
            values = (got.contribution, got.solo, got.interaction, got.shapley)
            if slot not in members:
                assert all(np.isnan(value[lane, slot]) for value in values)
                continue
            for value, expected in zip(values[:3], per_slot[slot], strict=False):
                assert value[lane, slot] == pytest.approx(expected, abs=1e-9)
            if len(members) <= 4:
                assert got.shapley[lane, slot] == pytest.approx(per_slot[slot][3], abs=1e-9)
            else:
                assert np.isnan(got.shapley[lane, slot])


def test_a_golden_of_two_seeds():
    """60 % bare, 70 with seed 0, 65 with seed 2, 90 with both: they help each other by 15 points."""
    ablatable = np.array([[True, False, True]])
    accuracy = {(): 60.0, (0,): 70.0, (2,): 65.0, (0, 2): 90.0}
    got = measured(ablatable, f=lambda lane, kept: accuracy[tuple(sorted(int(s) for s in kept))])
    np.testing.assert_allclose(got.contribution, [[25, np.nan, 20]])
    np.testing.assert_allclose(got.solo, [[10, np.nan, 5]])
    np.testing.assert_allclose(got.interaction, [[15, np.nan, 15]])
    np.testing.assert_allclose(got.shapley, [[17.5, np.nan, 12.5]])
    np.testing.assert_allclose(got.total_improvement, [30])


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5, 8])
def test_shapley_values_share_out_exactly_the_total_improvement(seeds):
    """Efficiency: the sum over seeds is `f(N) - f({})`, for exact values and for sampled orders alike."""
    ablatable = np.roll(np.tile(np.arange(9) < seeds, (3, 1)), 1, axis=1)
    got = measured(ablatable, final=True)
    np.testing.assert_allclose(np.nansum(got.shapley, axis=1), got.total_improvement, atol=1e-9)


@pytest.mark.parametrize("seeds", [3, 6])
def test_shapley_values_of_a_sum_are_its_terms(seeds):
    """Additivity: where seeds do not interact each gets what it adds, whatever the order."""
    worth = np.array([3.0, -1.0, 7.0, 0.0, 2.5, 11.0])[:seeds]
    ablatable = np.ones((2, seeds), dtype=np.bool_)
    got = measured(ablatable, final=True, f=lambda lane, kept: 40 + sum(worth[int(s)] for s in kept))
    for value in (got.shapley, got.contribution, got.solo):
        np.testing.assert_allclose(value, np.tile(worth, (2, 1)), atol=1e-9)
    np.testing.assert_allclose(got.interaction, 0, atol=1e-9)


def test_equal_seeds_get_equal_shapley_values():
    ablatable = np.ones((1, 4), dtype=np.bool_)
    got = measured(ablatable, f=lambda lane, kept: 10.0 + len(kept) ** 2)
    np.testing.assert_allclose(got.shapley, 4.0)


def test_sampled_orders_are_antithetic_and_a_lanes_own():
    ablatable = np.ones((3, 6), dtype=np.bool_)
    ablatable[1, 2:] = False
    variants = plan(ablatable, final=True)
    orders = variants.orders
    assert orders is not None
    assert orders.lane.tolist() == [0] * SAMPLED_ORDERS + [2] * SAMPLED_ORDERS
    half = SAMPLED_ORDERS // 2
    assert (np.sort(orders.slot, axis=1) == np.arange(6)).all()
    np.testing.assert_array_equal(orders.slot[:half], orders.slot[half:SAMPLED_ORDERS, ::-1])
    assert (orders.slot[:SAMPLED_ORDERS] != orders.slot[SAMPLED_ORDERS:]).any()
    alone = plan_variants(ablatable[2:], np.ones(1, dtype=np.bool_), rng=streams(3)[2:])
    np.testing.assert_array_equal(alone.keep, variants.keep[variants.lane == 2])


def test_no_chance_is_used_before_the_end_or_for_few_seeds():
    ablatable = np.arange(6)[None] < np.array([[6], [4]])
    rng = streams(2)
    before = [stream.bit_generator.state["state"]["counter"].tolist() for stream in rng]
    assert plan_variants(ablatable, np.array([False, True]), rng=rng).orders is None
    assert [stream.bit_generator.state["state"]["counter"].tolist() for stream in rng] == before


def test_the_order_in_which_variants_were_measured_does_not_matter():
    ablatable = np.array([[True, True, False], [True, True, True]])
    variants = plan(ablatable)
    accuracy = np.arange(len(variants.lane), dtype=np.float64)
    shuffle = seeding.generator("shuffle").permutation(len(accuracy))
    one = attribute(ablatable, np.array([50.0, 60.0]), variants, accuracy)
    other = attribute(
        ablatable,
        np.array([50.0, 60.0]),
        Variants(variants.lane[shuffle], variants.keep[shuffle]),
        accuracy[shuffle],
    )
    for name in Attribution.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_what_was_not_measured_is_unknown_and_the_total_falls_back_to_the_largest_removal_cost():
    ablatable = np.array([[True, True]])
    only_off = Variants(np.zeros(2, dtype=np.int64), np.array([[True, False], [False, True]]))
    got = attribute(ablatable, np.array([50.0]), only_off, np.array([45.0, 42.0]))
    assert got.contribution.tolist() == [[8.0, 5.0]]
    assert got.total_improvement.tolist() == [8.0]
    for value in (got.solo, got.interaction, got.shapley, got.committed_accuracy):
        assert np.isnan(value).all()
    nothing = Variants(np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.bool_))
    assert np.isnan(attribute(ablatable, np.array([50.0]), nothing, np.zeros(0)).total_improvement).all()


def test_a_host_without_ablatable_seeds_has_improved_by_nothing():
    got = measured(np.zeros((2, 3), dtype=np.bool_))
    assert got.total_improvement.tolist() == [0, 0]
    assert got.committed_accuracy.tolist() == [truth(0, []), truth(1, [])]
    assert np.isnan(got.contribution).all()


def test_permanent_seeds_stay_in_the_committed_network_although_they_are_ablated():
    ablatable = np.array([[True, True, True, False]])
    permanent = np.array([[False, True, False, True]])
    got = measured(ablatable, permanent=permanent)
    assert got.committed_accuracy.tolist() == [truth(0, [1])]
    assert got.total_improvement[0] == pytest.approx(truth(0, [0, 1, 2]) - truth(0, []))
    # Of five ablatable seeds no other question has the committed pair's complement as its answer.
    five, kept = np.ones((1, 5), dtype=np.bool_), np.array([[True, True, True, False, False]])
    assert measured(five, permanent=kept).committed_accuracy.tolist() == [truth(0, [0, 1, 2])]


def test_too_many_slots_are_refused():
    with pytest.raises(InvariantViolation, match="33 slots"):
        plan(np.ones((1, 33), dtype=np.bool_))


def test_the_table_forgets_lanes_and_comes_back_from_its_state():
    table = AttributionTable(3, 2)
    assert np.isnan(table.total_improvement).all()
    got = measured(np.ones((3, 2), dtype=np.bool_))
    table.record(got)
    table.reset(np.array([1]))
    np.testing.assert_array_equal(np.isnan(table.shapley), [[False] * 2, [True] * 2, [False] * 2])
    assert np.isnan(table.committed_accuracy).tolist() == [False, True, False]
    assert table.total_improvement[2] == got.total_improvement[2]
    other, state = AttributionTable(3, 2), table.state_dict()
    other.load_state_dict(state)
    table.reset(np.arange(3))  # the state is a copy
    np.testing.assert_array_equal(other.shapley, state["shapley"])
    np.testing.assert_array_equal(other.total_improvement, state["total_improvement"])
    np.testing.assert_array_equal(other.committed_accuracy, state["committed_accuracy"])
    with pytest.raises(ValueError, match="shapley"):
        AttributionTable(3, 4).load_state_dict(state)
