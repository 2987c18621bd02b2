"""Charges and bonuses of operations; a refused operation is never rewarded as done."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.lifecycle import SeedStage
from tests.rewards.steps import decided, held, parts, refused, step

COUNT_BONUS = 3.0 * math.tanh(1.0 / 3.0)


def charge(outcome, mode="shaped", **changes):
    return parts(mode, outcome, **changes)["action"]


def at(stage, op, **changes):
    """An operation on a slot in some stage that leaves it there."""
    return step(stage_before=stage, stage=stage, op=op, **changes)


def test_waiting_is_free():
    assert charge(held()) == 0.0


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(SeedStage.DORMANT, -0.15), (SeedStage.HOLDING, -0.45), (SeedStage.FOSSILIZED, -0.45)],
)
def test_germinate(stage, expected):
    assert charge(at(stage, Op.GERMINATE)) == pytest.approx(expected)


def test_set_alpha_target():
    assert charge(held(op=Op.SET_ALPHA_TARGET)) == pytest.approx(-0.005)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(SeedStage.GERMINATED, 0.0), (SeedStage.TRAINING, -0.1), (SeedStage.BLENDING, 0.0)],
)
def test_advance(stage, expected):
    assert charge(at(stage, Op.ADVANCE)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("contribution", "age", "expected"),
    [
        (-0.6, 9, 0.15),
        (-0.5, 9, 0.1),
        (-0.1, 9, 0.1),
        (0.0, 9, -0.3),
        (2.0, 9, -0.4),
        (12.0, 9, -0.9),
        (100.0, 9, -0.9),
        (np.nan, 9, 0.0),
        (-0.6, 4, -0.3),  # an epoch too young
        (2.0, 2, -0.9),  # three epochs too young
    ],
)
def test_prune(contribution, age, expected):
    outcome = decided(Op.PRUNE, contribution_before=contribution, age_before=age)
    assert charge(outcome) == pytest.approx(expected - 0.005)


def test_a_seed_must_have_hurt_for_a_while():
    outcome = decided(Op.PRUNE, contribution_before=-2.0, age_before=2)
    assert charge(outcome, shaped={"prune_young_age": 0}) == pytest.approx(0.1 - 0.005)
    older = decided(Op.PRUNE, contribution_before=-2.0, age_before=3)
    assert charge(older, shaped={"prune_young_age": 0}) == pytest.approx(0.15 - 0.005)


def test_a_refused_prune():
    assert charge(at(SeedStage.FOSSILIZED, Op.PRUNE)) == pytest.approx(-1.005)
    assert charge(at(SeedStage.TRAINING, Op.PRUNE, age_before=2)) == pytest.approx(-0.905), "too young"
    assert charge(refused(Op.PRUNE, contribution_before=-9.0)) == pytest.approx(-0.005), (
        "its ramp was under way"
    )
    assert charge(at(SeedStage.DORMANT, Op.PRUNE)) == pytest.approx(-0.005)


@pytest.mark.parametrize(
    ("contribution", "improvement", "epochs", "expected"),
    [
        (1.0, 2.0, 5, 0.6 + COUNT_BONUS),
        (4.0, 2.0, 9, 0.9 + COUNT_BONUS),
        (4.0, 2.0, 1, (0.9 + COUNT_BONUS) / 5),
        (4.0, 0.0, 5, 0.9 + COUNT_BONUS),
        (4.0, np.nan, 5, 0.9 + COUNT_BONUS),
        (0.9, 2.0, 9, -0.2),
        (-3.0, 2.0, 9, -0.2),
        (np.nan, 2.0, 9, -0.2),
        (0.0, -1.0, 9, -0.7),
        (4.0, -0.2, 9, -0.54),  # no ransom yet
        (4.0, -1.0, 9, -1.0),  # a ransom: 0.5 + 0.2 + 0.3
        (0.1, -1.0, 9, -0.7),  # worth too little to be one
        (4.0, -20.0, 9, -1.8),  # bounded
    ],
)
def test_fossilize(contribution, improvement, epochs, expected):
    outcome = decided(
        Op.FOSSILIZE,
        contribution_before=contribution,
        improvement_before=improvement,
        epochs_before=epochs,
    )
    assert charge(outcome) == pytest.approx(expected - 0.01)
    assert charge(outcome, mode="escrow") == pytest.approx(expected - 0.01)


@pytest.mark.parametrize("stage", [SeedStage.HOLDING, SeedStage.TRAINING, SeedStage.DORMANT])
def test_a_refused_fossilize(stage):
    """The trap: a seed in HOLDING with a contribution, whose FOSSILIZE its gate refused."""
    known = {"contribution_before": 9.0, "improvement_before": 9.0, "epochs_before": 9}
    assert charge(at(stage, Op.FOSSILIZE, **known)) == pytest.approx(-1.01)


@given(
    st.sampled_from([op for op in Op if op != Op.WAIT]),
    st.sampled_from(list(SeedStage)),
    st.floats(-50, 50) | st.just(np.nan),
    st.floats(-50, 50) | st.just(np.nan),
    st.integers(0, 30),
    st.sampled_from(["shaped", "escrow", "basic", "basic_plus", "simplified", "minimal", "sparse"]),
)
def test_a_refused_action_never_earns_more_than_waiting(op, stage, contribution, improvement, age, mode):
    known = {
        "contribution": contribution,
        "contribution_before": contribution,
        "progress": improvement,
        "progress_before": improvement,
        "improvement": improvement,
        "improvement_before": improvement,
        "age": age + 1,
        "age_before": age,
        "epochs_before": 5,
        "epochs_in_stage": 6,
        "alpha": 1.0,
        "alpha_before": 1.0,
        "seed_parameters": 100,
        "parameters_before": 100,
    }
    waited = parts(mode, at(stage, Op.WAIT, **known))
    tried = parts(mode, at(stage, op, **known))
    for name, paid in tried.items():
        assert paid <= waited[name], name
