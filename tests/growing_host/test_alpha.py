"""Ramps: the ends are exact, the way is monotone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import TEMPO_EPOCHS, Style
from esper_simic.growing_host.alpha import SUPPORTED_STYLES, linear, ramp, sigmoid


@pytest.mark.parametrize("total", TEMPO_EPOCHS)
@pytest.mark.parametrize("style", SUPPORTED_STYLES)
def test_ends_are_exact_and_the_way_rises(style, total):
    alphas = [float(ramp(np.array(style), np.array(done), np.array(total))) for done in range(total + 3)]
    assert alphas[0] == 0.0
    assert alphas[total:] == [1.0, 1.0, 1.0]
    assert all(a < b for a, b in itertools.pairwise(alphas[: total + 1]))


@given(st.floats(0, 1))
def test_curves_against_their_formulas(u):
    def logistic(x):
        return 1 / (1 + math.exp(-12 * (x - 0.5)))

    literal = (logistic(u) - logistic(0)) / (logistic(1) - logistic(0))
    assert linear(np.array(u)) == u
    assert sigmoid(np.array(u)) == pytest.approx(literal, abs=1e-12)
    assert sigmoid(np.array(u)) + sigmoid(np.array(1 - u)) == pytest.approx(1.0)


def test_each_slot_has_its_own_curve():
    styles = np.array([Style.LINEAR_ADD, Style.SIGMOID_ADD])
    alphas = ramp(styles, np.array([1, 1]), np.array([5, 5]))
    assert alphas[0] == pytest.approx(0.2)
    assert 0 < alphas[1] < 0.05
