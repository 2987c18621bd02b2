"""Series made short: nothing is lost from the buckets, smoothing is what its formula says, ticks are round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.curves import TIME_STEPS_S, Curve, Points, Thinned, rates, smoothed, ticks, time_ticks

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
SERIES = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=200)


def curve_of(series, buckets_max: int = 8) -> Curve:
    curve = Curve(buckets_max)
    for x, y in series:
        curve.add(x, y)
    return curve


@given(SERIES)
def test_buckets_are_runs_of_consecutive_points(series) -> None:
    curve = curve_of(series)
    points = curve.points()
    assert len(points) <= 8
    assert curve.stride < max(2, len(series)), "no coarser than it must be"
    runs = [series[start : start + curve.stride] for start in range(0, len(series), curve.stride)]
    assert points.count.tolist() == [len(run) for run in runs]
    for index, run in enumerate(runs):
        values = [y for _, y in run]
        assert points.x[index] == pytest.approx(np.mean([x for x, _ in run]), abs=1e-6)
        assert points.y[index] == pytest.approx(np.mean(values), abs=1e-6)
        assert (points.low[index], points.high[index]) == (min(values), max(values))


def test_a_curve_of_a_million_points_stays_small_and_keeps_its_extremes() -> None:
    curve = Curve()
    for index in range(100_000):
        curve.add(index, 1e9 if index == 77_777 else math.sin(index / 5000))
    points = curve.points()
    assert 128 < len(points) <= 256
    assert points.high.max() == 1e9
    assert points.count.sum() == 100_000


def test_what_is_no_number_is_counted_and_left_out() -> None:
    curve = curve_of([(1.0, 2.0), (2.0, math.nan), (math.inf, 3.0), (3.0, 4.0)])
    assert curve.skipped == 2
    assert curve.points().y.tolist() == [2.0, 4.0]


def test_an_empty_curve_has_no_points() -> None:
    assert len(Curve().points()) == 0


@given(st.integers(0, 500), st.integers(1, 9))
def test_thinned_keeps_every_kth_from_the_first(count: int, items_max: int) -> None:
    thinned: Thinned[int] = Thinned(items_max)
    for item in range(count):
        thinned.add(item)
    assert list(thinned) == list(range(0, count, thinned.stride))
    assert len(thinned) <= items_max
    assert thinned.count == count
    assert len(thinned) * 2 >= min(count, items_max), "no thinner than it must be"


def literal_smoothed(points: Points, bandwidth: float) -> list[float]:
    found = []
    for x in points.x:
        top = bottom = 0.0
        for x_i, y_i, n_i in zip(points.x, points.y, points.count, strict=True):
            weight = n_i * math.exp(-(((x - x_i) / bandwidth) ** 2) / 2)
            top, bottom = top + weight * y_i, bottom + weight
        found.append(top / bottom)
    return found


@given(SERIES.filter(bool), st.floats(1e-3, 1e6))
def test_smoothing_is_the_weighted_mean_of_the_neighbours(series, bandwidth: float) -> None:
    points = curve_of(series).points()
    found = smoothed(points, bandwidth)
    assert found == pytest.approx(np.array(literal_smoothed(points, bandwidth)), rel=1e-6, abs=1e-6)
    assert (found >= points.y.min() - 1e-6).all()
    assert (found <= points.y.max() + 1e-6).all()


def test_a_bucket_weighs_as_much_as_it_has_points() -> None:
    x = np.zeros(2)
    y, count = np.array([0.0, 1.0]), np.array([1.0, 3.0])
    assert smoothed(Points(x, y, y, y, count), 1.0).tolist() == [0.75, 0.75]


def test_smoothing_does_not_lag_and_without_a_bandwidth_does_nothing() -> None:
    line = curve_of([(float(x), 3.0 * x) for x in range(8)]).points()
    assert smoothed(line, 1.0)[2:-2] == pytest.approx(line.y[2:-2], rel=0.02)
    assert smoothed(line, 0.0).tolist() == line.y.tolist()
    assert smoothed(line, 1e9) == pytest.approx(np.full(8, line.y.mean()))


def test_rates_are_growth_over_time() -> None:
    time_s, done = np.array([0.0, 10.0, 20.0]), np.array([0.0, 100.0, 400.0])
    middle, rate = rates(time_s, done, 4)
    assert rate.tolist() == [10.0, 10.0, 30.0, 30.0]
    assert middle.tolist() == [25.0, 75.0, 175.0, 325.0]
    assert (rate * 5.0).sum() == 400.0


@pytest.mark.parametrize("time_s", [[], [1.0], [2.0, 2.0]])
def test_where_no_time_passed_there_is_no_rate(time_s: list[float]) -> None:
    middle, rate = rates(np.array(time_s), np.arange(len(time_s), dtype=np.float64), 4)
    assert (len(middle), len(rate)) == (0, 0)


@given(NUMBERS, st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_numbers_within_the_range(low: float, width: float, wanted: int) -> None:
    high = low + width
    if not high > low:
        return
    found = ticks(low, high, wanted)
    assert wanted / 2 - 1 <= len(found) <= 2 * wanted + 1
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 1:
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - round_one) for round_one in (1, 2, 5, 10)) < 1e-2 * mantissa


def test_ticks_by_hand() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.3, 1.1) == pytest.approx([-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(5, 5) == [5]
    assert time_ticks(300) == [0, 60, 120, 180, 240, 300]
    assert time_ticks(0) == [0]


@given(st.floats(1.0, 3e7))
def test_ticks_of_time_are_what_clocks_show(seconds: float) -> None:
    found = time_ticks(seconds)
    assert found[0] == 0
    assert 2 <= len(found) <= 13 or seconds < 10
    assert len(found) < 2 or found[1] in TIME_STEPS_S
