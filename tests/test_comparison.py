"""Intervals against the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from esper_simic.comparison import Interval, mean_interval


def test_interval_is_students() -> None:
    values = np.random.default_rng(1).normal(3, 2, 20).tolist()
    expected = stats.t.interval(0.95, 19, loc=np.mean(values), scale=stats.sem(values))
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values))


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.normal(1, 5, 8).tolist()) for _ in range(4000)]
    covered = sum(found.low <= 1.0 <= found.high for found in intervals)
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])


def test_above_means_the_intervals_do_not_touch() -> None:
    assert Interval(3, 2.1, 4).above(Interval(1, 0, 2))
    assert not Interval(3, 2.0, 4).above(Interval(1, 0, 2))
