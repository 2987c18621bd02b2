"""What seeds are credited with, in SHAPED: every number of the definition, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.lifecycle import SeedStage
from esper_simic.rewards.contribution import credited, harmonic_mean
from tests.rewards.steps import WEIGHTS, decided, held, parts, refused, step

SHAPED = WEIGHTS.shaped
POINTS = st.floats(-50, 50)


def attribution(outcome, **changes):
    return parts("shaped", outcome, **changes)["attribution"]


@pytest.mark.parametrize(
    ("contribution", "progress", "expected"),
    [
        (-2.0, 6.0, -2.0),  # c < 0: the whole harm
        (-2.0, -6.0, -2.0),
        (4.0, np.nan, 2.0),  # progress unknown: half
        (4.0, 0.0, 0.0),  # no progress
        (4.0, -1.0, 0.0),
        (6.0, 3.0, 4.0),  # 2 * 3 * 6 / 9
        (3.0, 3.0, 3.0),
        (2.0, 8.0, 2.0),  # c < p: c
        (np.nan, 8.0, 0.0),
    ],
)
def test_a_held_seed_is_attributed(contribution, progress, expected):
    assert attribution(held(contribution=contribution, progress=progress, improvement=5.0)) == pytest.approx(
        expected
    )


def test_the_minimum_is_another_form_of_the_mean():
    outcome = held(contribution=6.0, progress=3.0, improvement=5.0)
    assert attribution(outcome, shaped={"attribution_formula": "minimum"}) == pytest.approx(3.0)


@given(POINTS, POINTS)
def test_credit_never_exceeds_the_contribution_nor_twice_the_progress(contribution, progress):
    found = float(credited(np.array(contribution), np.array(progress), SHAPED))
    assert found <= max(contribution, 0.0) + 1e-9 or contribution < 0
    assert found <= max(2 * progress, 0.0) + 1e-9 or contribution < 0


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_harmonic_mean_lies_between_its_sides(a, b):
    mean = float(harmonic_mean(np.array(a), np.array(b)))
    assert min(a, b) - 1e-9 <= mean <= max(a, b) + 1e-9


@pytest.mark.parametrize(
    ("improvement", "expected"),
    [
        (np.nan, 2.0),
        (0.0, 2.0),
        (-0.1, 2.0 / (1 + math.exp(0.3))),  # 1 / (1 + e^(-3 d))
        (-0.5, 2.0 / (1 + math.exp(1.5))),
        (-1000.0, 0.0),
    ],
)
def test_a_gain_is_discounted_where_all_seeds_together_make_the_host_worse(improvement, expected):
    outcome = held(contribution=2.0, progress=8.0, improvement=improvement)
    assert attribution(outcome) == pytest.approx(expected, abs=1e-12)


def test_a_loss_is_not_discounted():
    assert attribution(held(contribution=-2.0, progress=8.0, improvement=-3.0, age=20)) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("age", "factor"), [(20, 0.4), (18, 0.52), (15, 0.7), (11, 0.94), (10, 1.0), (3, 1.0)]
)
def test_seeds_of_the_first_ten_epochs_are_discounted_by_their_germination(age, factor):
    """In epoch 20 a seed of age 20 germinated in epoch 0: 0.4; from epoch 10 on: 1."""
    outcome = held(contribution=2.0, progress=8.0, improvement=3.0, age=age)
    assert attribution(outcome) == pytest.approx(2.0 * factor)


def test_without_a_warm_up_no_seed_is_discounted():
    outcome = held(contribution=2.0, progress=8.0, improvement=3.0, age=20)
    assert attribution(outcome, shaped={"timing_discount_epochs": 0}) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("stage", "gained", "expected"),
    [
        (SeedStage.TRAINING, 5.0, 0.0),
        (SeedStage.BLENDING, 5.0, 1.5),  # 0.3 a point
        (SeedStage.HOLDING, 5.0, 1.5),
        (SeedStage.BLENDING, -5.0, 0.0),
        (SeedStage.FOSSILIZED, 5.0, 0.0),
    ],
)
def test_without_a_counterfactual_the_stage_s_improvement_stands_in(stage, gained, expected):
    assert attribution(held(stage=stage, stage_improvement=gained)) == pytest.approx(expected)


def test_a_fossil_is_attributed_nothing():
    outcome = held(
        stage_before=SeedStage.FOSSILIZED, stage=SeedStage.FOSSILIZED, contribution=9.0, progress=9.0
    )
    assert attribution(outcome) == 0.0


def test_pruning_pays_back_what_the_seed_was_worth():
    known = {"progress_before": 8.0, "improvement_before": 3.0}
    assert attribution(decided(Op.PRUNE, contribution_before=2.0, **known)) == pytest.approx(-2.0)
    assert attribution(decided(Op.PRUNE, contribution_before=-2.0, **known)) == pytest.approx(2.0)


def test_a_prune_that_is_scheduled_counts_when_it_is_decided():
    led_down = decided(
        Op.PRUNE,
        stage=SeedStage.BLENDING,
        seed_parameters=100,
        alpha=0.8,
        age=10,
        contribution_before=2.0,
        progress_before=8.0,
        improvement_before=3.0,
        contribution=1.5,
        progress=8.0,
        improvement=2.0,
    )
    assert attribution(led_down) == pytest.approx(-2.0)


def test_a_refused_prune_changes_no_sign():
    outcome = refused(Op.PRUNE, contribution_before=2.0, progress_before=8.0, contribution=2.0, progress=8.0)
    assert attribution(outcome) == pytest.approx(2.0)


@pytest.mark.parametrize(("improvement", "expected"), [(3.0, 2.0), (np.nan, 2.0), (-0.1, 0.0)])
def test_fossilising_is_attributed_once_more_unless_the_seeds_harm(improvement, expected):
    outcome = decided(
        Op.FOSSILIZE, contribution_before=2.0, progress_before=8.0, improvement_before=improvement
    )
    assert attribution(outcome) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("contribution", "improvement", "expected"),
    [
        (1.0, -5.0, 0.0),  # not above 1
        (6.0, 1.0, -0.1 * 1 / 5),  # c / d = 6
        (10.0, 1.0, -0.1),
        (40.0, 1.0, -0.3),  # 0.7 by the ratio, bounded
        (4.0, 1.0, 0.0),  # c / d below 5
        (4.0, 0.1, -0.3 * 0.4),  # d no more than 0.1
        (4.0, -2.0, -0.3 * 0.4),
        (30.0, 0.0, -0.3),
        (4.0, np.nan, 0.0),
        (np.nan, 0.0, 0.0),
    ],
)
def test_ratio_penalty(contribution, improvement, expected):
    outcome = held(contribution=contribution, progress=9.0, improvement=improvement)
    assert parts("shaped", outcome)["ratio_penalty"] == pytest.approx(expected)


def test_the_ratio_penalty_of_a_pruned_seed_stays_a_penalty():
    outcome = decided(Op.PRUNE, contribution_before=10.0, progress_before=9.0, improvement_before=1.0)
    assert parts("shaped", outcome)["ratio_penalty"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, 0.0), (2, -0.1), (3, -0.15), (5, -0.25), (6, -0.3), (60, -0.3)]
)
def test_indecision_grows_from_the_second_epoch_of_holding(epochs, expected):
    worthy = held(contribution=2.0, progress=8.0, improvement=3.0, epochs_in_stage=epochs)
    assert parts("shaped", worthy)["indecision"] == pytest.approx(expected)


@pytest.mark.parametrize("contribution", [0.0, -1.0, np.nan])
def test_a_worthless_seed_may_be_left_waiting(contribution):
    outcome = held(contribution=contribution, progress=8.0, improvement=3.0, epochs_in_stage=9)
    assert parts("shaped", outcome)["indecision"] == 0.0


def test_every_operation_but_a_decision_that_happened_is_indecision():
    worthy = {"contribution": 2.0, "progress": 8.0, "improvement": 3.0, "epochs_in_stage": 9}
    for op in (Op.WAIT, Op.SET_ALPHA_TARGET, Op.FOSSILIZE, Op.PRUNE):
        assert parts("shaped", refused(op, **worthy))["indecision"] == pytest.approx(-0.3)
    two = {name: [value, value] for name, value in worthy.items() if name != "improvement"}
    beside = step(
        stage_before=SeedStage.HOLDING,
        stage=[SeedStage.HOLDING, SeedStage.FOSSILIZED],
        fossilized=[False, True],
        op=Op.FOSSILIZE,
        target=1,
        succeeded=True,
        improvement=3.0,
        **two,
    )
    assert parts("shaped", beside)["indecision"] == 0.0, "one decision an epoch is all a lane can make"


def test_terms_of_seeds_are_summed_over_the_slots_whatever_slot_the_action_names():
    for target in (0, 1):
        outcome = held(contribution=[2.0, 3.0], progress=[8.0, 8.0], improvement=5.0, target=target)
        assert attribution(outcome) == pytest.approx(5.0)
