"""Statistics against the textbook, against slow literal truths, and against what must hold for all values."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from esper_simic.comparison import (
    Estimate,
    Interval,
    bootstrap_interval,
    improvement_of,
    interquartile_mean,
    interquartile_mean_of,
    mean_interval,
    mean_of,
    paired,
    pareto_front,
    resample_counts,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
WHOLE = st.integers(-5, 5).map(float)
"""Few different values: ties."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Student's interval


def test_interval_is_students() -> None:
    values = np.random.default_rng(1).normal(3, 2, 20).tolist()
    expected = stats.t.interval(0.95, 19, loc=np.mean(values), scale=stats.sem(values))
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values))


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    chance = np.random.default_rng(2)
    intervals = [mean_interval(chance.normal(1, 5, 8).tolist()) for _ in range(4000)]
    covered = sum(found.low <= 1.0 <= found.high for found in intervals)
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_above_means_the_intervals_do_not_touch() -> None:
    assert Interval(3, 2.1, 4).above(Interval(1, 0, 2))
    assert not Interval(3, 2.0, 4).above(Interval(1, 0, 2))


@pytest.mark.parametrize(
    ("low", "high", "origin", "sign"),
    [(1, 2, 0, 1), (-2, -1, 0, -1), (-1, 1, 0, 0), (0, 1, 0, 0), (0.6, 0.9, 0.5, 1), (0.1, 0.4, 0.5, -1)],
)
def test_the_sign_of_an_estimate_is_that_of_its_whole_interval(low, high, origin, sign) -> None:
    assert Estimate((low + high) / 2, low, high).sign(origin) == sign


# Interquartile mean


def literal_interquartile_mean(values: list[float]) -> float:
    ordered = sorted(values)
    cut = len(values) // 4
    middle = ordered[cut : len(values) - cut]
    return float(sum(map(Fraction, middle)) / len(middle))


@given(st.lists(NUMBERS, min_size=1, max_size=40))
def test_interquartile_mean_is_the_mean_of_the_middle_half(values: list[float]) -> None:
    found = interquartile_mean(values)
    assert found == pytest.approx(literal_interquartile_mean(values), abs=1e-6)
    assert found == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-6)
    assert min(values) - 1e-6 <= found <= max(values) + 1e-6
    assert interquartile_mean([-value for value in values]) == pytest.approx(-found, abs=1e-6)


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([7.0]) == 7.0
    assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0, "a quarter of three is none"
    assert interquartile_mean([100.0, 2.0, 4.0, -100.0]) == 3.0


@given(st.lists(NUMBERS, min_size=4, max_size=40), st.floats(0, 1e6))
def test_an_outlier_does_not_move_it(values: list[float], by: float) -> None:
    further = sorted(values)
    further[-1] += by
    assert interquartile_mean(further) == pytest.approx(interquartile_mean(values), abs=1e-6)


# Replicates


@st.composite
def drawn(draw: st.DrawFn, elements: st.SearchStrategy[float] = NUMBERS):
    """Values, and replicates of them as indices."""
    n = draw(st.integers(1, 12))
    values = draw(hnp.arrays(np.float64, n, elements=elements))
    replicates = draw(hnp.arrays(np.int64, (draw(st.integers(1, 4)), n), elements=st.integers(0, n - 1)))
    return values, replicates


def counts_of(replicates: np.ndarray) -> np.ndarray:
    n = replicates.shape[1]
    return np.array([[int((row == index).sum()) for index in range(n)] for row in replicates])


@given(drawn())
def test_statistics_of_counts_are_those_of_the_values_drawn(case) -> None:
    values, replicates = case
    counts = counts_of(replicates)
    for row, mean, middle in zip(
        replicates, mean_of(values, counts), interquartile_mean_of(values, counts), strict=True
    ):
        resample = values[row].tolist()
        assert mean == pytest.approx(np.mean(resample), abs=1e-6)
        assert middle == pytest.approx(literal_interquartile_mean(resample), abs=1e-6)


def literal_improvement(ours: list[float], theirs: list[float]) -> float:
    score = {True: 1.0, False: 0.0}
    won = [1 / 2 if x == y else score[x > y] for x, y in itertools.product(ours, theirs)]
    return sum(won) / len(won)


@given(drawn(WHOLE), st.data())
def test_improvement_counts_all_pairs_of_a_replicate(case, data: st.DataObject) -> None:
    ours, replicates = case
    theirs = data.draw(hnp.arrays(np.float64, len(ours), elements=WHOLE))
    found = improvement_of(ours, theirs, counts_of(replicates))
    for row, probability in zip(replicates, found, strict=True):
        assert probability == pytest.approx(literal_improvement(ours[row].tolist(), theirs[row].tolist()))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**32))
def test_a_stratum_is_drawn_from_within_itself(sizes: list[int], seed: int) -> None:
    counts = resample_counts(sizes, 5, rng(seed))
    assert counts.shape == (5, sum(sizes))
    assert (counts >= 0).all()
    stops = np.cumsum(sizes)
    for start, stop in zip(stops - sizes, stops, strict=True):
        assert (counts[:, start:stop].sum(axis=1) == stop - start).all()


def test_every_value_is_drawn_equally_often() -> None:
    counts = resample_counts([5, 3], 40_000, rng())
    assert counts.mean(axis=0) == pytest.approx(np.ones(8), abs=0.03)
    assert counts.var(axis=0)[:5] == pytest.approx(np.full(5, 1 - 1 / 5), abs=0.03), "binomial, n = 5"


# Bootstrap intervals


def test_interval_is_the_percentile_bootstrap() -> None:
    values = rng(3).exponential(2, 30)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=rng(4)
    ).confidence_interval
    found = bootstrap_interval([values.tolist()], rng=rng(5), statistic=mean_of, replicates=40_000)
    width = reference.high - reference.low
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.02 * width)


def test_interval_covers_the_interquartile_mean_about_as_often_as_it_says() -> None:
    """Of a skewed law with outliers, whose interquartile mean is known by a large sample."""
    truth = interquartile_mean(rng(6).lognormal(0, 1, 400_000).tolist())
    found = [
        bootstrap_interval([rng(1000 + trial).lognormal(0, 1, 40).tolist()], rng=rng(trial), replicates=400)
        for trial in range(600)
    ]
    covered = sum(one.low <= truth <= one.high for one in found) / 600
    assert 0.91 <= covered <= 0.98


def test_the_same_chance_gives_the_same_interval_and_blocks_of_replicates_change_nothing(monkeypatch) -> None:
    values = rng(7).normal(size=50).tolist()
    whole = bootstrap_interval([values], rng=rng(8))
    assert bootstrap_interval([values], rng=rng(8)) == whole
    assert bootstrap_interval([values], rng=rng(9)) != whole
    monkeypatch.setattr("esper_simic.comparison._BLOCK", 170)
    blockwise = bootstrap_interval([values], rng=rng(8))
    assert (blockwise.low, blockwise.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


@given(st.lists(NUMBERS, min_size=2, max_size=20), st.floats(0.1, 10), st.floats(-100, 100))
def test_another_unit_is_another_unit_of_the_interval(
    values: list[float], scale: float, shift: float
) -> None:
    before = bootstrap_interval([values], rng=rng(), replicates=50)
    after = bootstrap_interval([[scale * x + shift for x in values]], rng=rng(), replicates=50)
    assert before.low <= before.high
    expected = [scale * x + shift for x in (before.value, before.low, before.high)]
    assert [after.value, after.low, after.high] == pytest.approx(expected, abs=1e-4)


def test_what_distinguishes_runs_does_not_widen_the_interval() -> None:
    runs = [rng(run).normal(100.0 * run, 1, 20).tolist() for run in range(5)]
    stratified = bootstrap_interval(runs, rng=rng(), statistic=mean_of)
    pooled = bootstrap_interval([[value for run in runs for value in run]], rng=rng(), statistic=mean_of)
    assert stratified.value == pytest.approx(pooled.value)
    assert stratified.high - stratified.low < 1.0 < 20.0 < pooled.high - pooled.low


@pytest.mark.parametrize("strata", [[], [[1.0]], [[1.0, 2.0], []], [[1.0, float("nan")]]])
def test_what_has_no_interval_is_refused(strata: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="needs"):
        bootstrap_interval(strata, rng=rng())


# Paired comparisons


def test_how_hard_a_seed_is_cancels_out() -> None:
    hardness = rng(10).normal(0, 100, 40)
    better = paired((hardness + 1.0).tolist(), hardness.tolist(), rng=rng())
    assert better.mean.value == pytest.approx(1.0)
    assert (better.mean.low, better.mean.high) == pytest.approx((1.0, 1.0))
    assert better.interquartile_mean.sign() == 1
    assert better.probability.value == pytest.approx(0.5, abs=0.05), "of episodes on different seeds"


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=20))
def test_a_comparison_turned_round_says_the_opposite(outcomes: list[tuple[float, float]]) -> None:
    ours, theirs = [list(side) for side in zip(*outcomes, strict=True)]
    one, other = (
        paired(ours, theirs, rng=rng(), replicates=50),
        paired(theirs, ours, rng=rng(), replicates=50),
    )
    assert one.seeds == len(outcomes)
    assert other.mean.value == pytest.approx(-one.mean.value, abs=1e-6)
    assert other.interquartile_mean.value == pytest.approx(-one.interquartile_mean.value, abs=1e-6)
    assert other.probability.value == pytest.approx(1 - one.probability.value)
    differences = [ours - theirs for ours, theirs in outcomes]
    assert one.interquartile_mean.value == pytest.approx(literal_interquartile_mean(differences), abs=1e-6)
    assert one.probability.value == pytest.approx(literal_improvement(ours, theirs))


def test_all_above_is_certain_and_equal_is_even() -> None:
    assert paired([3.0, 4.0], [1.0, 2.0], rng=rng()).probability == Estimate(1.0, 1.0, 1.0)
    assert paired([1.0, 1.0], [1.0, 1.0], rng=rng()).probability == Estimate(0.5, 0.5, 0.5)


def test_a_paired_interval_covers_the_difference_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(600):
        chance = rng(trial)
        hardness = chance.normal(0, 3, 30)
        ours, theirs = hardness + chance.normal(0.5, 1, 30), hardness + chance.normal(0, 1, 30)
        found = paired(ours.tolist(), theirs.tolist(), rng=chance, replicates=300).mean
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 600 <= 0.98


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ([1.0], [1.0], "at least 2"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "paired by seed"),
        ([1.0, np.inf], [1.0, 2.0], "finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(ours, theirs, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        paired(ours, theirs, rng=rng())


# Pareto front


@given(st.lists(st.tuples(WHOLE, WHOLE), max_size=30))
def test_the_front_is_what_nobody_dominates(points: list[tuple[float, float]]) -> None:
    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    front = pareto_front([gain for gain, _ in points], [cost for _, cost in points])
    assert front.tolist() == [not any(dominates(other, point) for other in points) for point in points]
    on_it = {point for point, is_on in zip(points, front, strict=True) if is_on}
    assert not points or on_it
    by_cost = sorted(on_it, key=lambda point: point[1])
    assert by_cost == sorted(on_it), "more accuracy costs more, all along the front"


def test_every_point_has_a_gain_and_a_cost() -> None:
    with pytest.raises(ValueError, match="a gain and a cost"):
        pareto_front([1.0], [])
