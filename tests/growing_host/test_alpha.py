"""Ramps: the ends are exact, the way is monotone, the curves are their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import ALPHA_CURVES, ALPHA_TARGETS, TEMPO_EPOCHS, Style
from esper_simic.growing_host.alpha import (
    COMPOSITION_OF_STYLE,
    CURVE_OF_STYLE,
    LINEAR,
    AlphaMode,
    Composition,
    curve_for,
    mode_of_ramp,
    ramp,
    shape,
)

WEIGHTS = (0.0, *ALPHA_TARGETS)
CURVES = range(len(ALPHA_CURVES))


def literal_curve(name, u):
    """One curve at one point, by its formula."""
    if name == "LINEAR":
        return u
    if name == "COSINE":
        return 0.5 * (1 - math.cos(math.pi * u))
    k = {"SIGMOID_GENTLE": 6, "SIGMOID": 12, "SIGMOID_SHARP": 24}[name]

    def logistic(x):
        return 1 / (1 + math.exp(-k * (x - 0.5)))

    return (logistic(u) - logistic(0)) / (logistic(1) - logistic(0))


def way(start, target, curve, total, beyond=3):
    """Alpha after 0, 1, ... epochs of one ramp."""
    done = np.arange(total + beyond + 1)
    fixed = [np.full(len(done), value) for value in (start, target, curve)]
    return ramp(fixed[0], fixed[1], fixed[2], done, np.full(len(done), total))


@given(st.sampled_from(CURVES), st.floats(0, 1))
def test_curves_against_their_formulas(curve, u):
    value = shape(np.array([curve]), np.array([u]))[0]
    assert value == pytest.approx(literal_curve(ALPHA_CURVES[curve], u), abs=1e-12)
    mirrored = shape(np.array([curve]), np.array([1 - u]))[0]
    assert value + mirrored == pytest.approx(1.0), "every curve is symmetric about its middle"


@pytest.mark.parametrize("curve", CURVES, ids=ALPHA_CURVES)
def test_the_ends_of_a_curve_are_exact_and_nothing_lies_beyond(curve):
    assert shape(np.full(4, curve), np.array([-1.0, 0.0, 1.0, 2.0])).tolist() == [0.0, 0.0, 1.0, 1.0]


@given(
    st.sampled_from(WEIGHTS),
    st.sampled_from(WEIGHTS),
    st.sampled_from(CURVES),
    st.one_of(st.sampled_from(TEMPO_EPOCHS), st.integers(1, 60)),
)
def test_a_ramp_starts_where_alpha_is_is_monotone_and_snaps_to_its_target(start, target, curve, total):
    alphas = way(start, target, curve, total)
    assert alphas[0] == start
    assert (alphas[total:] == target).all()
    steps = np.diff(alphas) * (1 if target >= start else -1)
    assert (steps >= 0).all()
    assert (alphas >= min(start, target)).all()
    assert (alphas <= max(start, target)).all()
    literal = [
        start + (target - start) * literal_curve(ALPHA_CURVES[curve], done / total) for done in range(total)
    ]
    np.testing.assert_allclose(alphas[:total], literal, atol=1e-12)


@pytest.mark.parametrize("curve", CURVES, ids=ALPHA_CURVES)
@pytest.mark.parametrize("total", TEMPO_EPOCHS)
def test_a_first_ramp_rises_in_every_epoch(curve, total):
    assert (np.diff(way(0.0, 1.0, curve, total, beyond=0)) > 0).all()


def test_a_ramp_of_no_epochs_is_over_at_once():
    assert way(0.2, 0.7, LINEAR, 0).tolist() == [0.7] * 4


def test_each_seed_has_its_own_ramp():
    curves = np.array([LINEAR, ALPHA_CURVES.index("SIGMOID"), LINEAR])
    alphas = ramp(np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.5]), curves, np.full(3, 1), np.full(3, 5))
    assert alphas[[0, 2]] == pytest.approx([0.2, 0.9])
    assert alphas[1] == pytest.approx(literal_curve("SIGMOID", 0.2))


def test_the_four_styles():
    meaning = {
        style.name: (Composition(COMPOSITION_OF_STYLE[style]).name, ALPHA_CURVES[CURVE_OF_STYLE[style]])
        for style in Style
    }
    assert meaning == {
        "LINEAR_ADD": ("ADD", "LINEAR"),
        "LINEAR_MULTIPLY": ("MULTIPLY", "LINEAR"),
        "SIGMOID_ADD": ("ADD", "SIGMOID"),
        "GATED_GATE": ("GATE", "LINEAR"),
    }


@pytest.mark.parametrize("composition", Composition)
def test_a_gate_forces_its_ramp_to_be_linear_and_nothing_else_does(composition):
    taken = curve_for(np.full(len(CURVES), composition), np.arange(len(CURVES)))
    assert taken.tolist() == ([LINEAR] * len(CURVES) if composition is Composition.GATE else list(CURVES))


@pytest.mark.parametrize(
    ("start", "target", "epochs", "mode"),
    [
        (0.0, 1.0, 3, AlphaMode.UP),
        (1.0, 0.5, 3, AlphaMode.DOWN),
        (0.0, 1.0, 0, AlphaMode.HOLD),
        (1.0, 0.0, 0, AlphaMode.HOLD),
        (0.7, 0.7, 8, AlphaMode.HOLD),
    ],
)
def test_the_mode_a_ramp_begins_in(start, target, epochs, mode):
    assert mode_of_ramp(np.array([start]), np.array([target]), np.array([epochs])).tolist() == [mode]
