"""BASIC: named parts, shaping that cannot be farmed, bonuses that are bounded and earned."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.config_rewards import RewardConfig
from esper_simic.lifecycle import BLENDED, SeedStage
from esper_simic.rewards import BASIC_PARTS, Outcome, basic, fossil_bonus, potential

WEIGHTS = RewardConfig()
STAGES = list(SeedStage)


def outcome(**changes):
    """One lane with one dormant slot in which nothing happens."""
    nothing = Outcome(
        stage_before=np.array([[SeedStage.DORMANT]]),
        epochs_before=np.array([[0]]),
        stage=np.array([[SeedStage.DORMANT]]),
        epochs_in_stage=np.array([[0]]),
        alpha=np.array([[0.0]]),
        seed_parameters=np.array([[0]]),
        host_parameters=75,
        fossilized=np.array([[False]]),
        contribution=np.array([[np.nan]]),
        progress=np.array([[np.nan]]),
        accuracy=np.array([10.0]),
        terminated=np.array([False]),
    )
    arrays: dict[str, Any] = {name: np.array(value) for name, value in changes.items()}
    return dataclasses.replace(nothing, **arrays)


@pytest.mark.parametrize(
    ("stage", "epochs", "expected"),
    [
        (SeedStage.DORMANT, 9, 0.0),
        (SeedStage.GERMINATED, 1, 1.3),
        (SeedStage.TRAINING, 2, 2.6),
        (SeedStage.BLENDING, 3, 4.4),
        (SeedStage.HOLDING, 100, 7.5),
        (SeedStage.FOSSILIZED, 100, 8.0),
        (SeedStage.PRUNED, 1, 0.0),
        (SeedStage.EMBARGOED, 5, 0.0),
        (SeedStage.RESETTING, 1, 0.0),
    ],
)
def test_potentials(stage, epochs, expected):
    assert potential(np.array([[stage]]), np.array([[epochs]]), WEIGHTS) == pytest.approx([expected])


def test_nothing_happens_nothing_is_paid():
    parts = basic(outcome(), WEIGHTS, gamma=0.99)
    assert tuple(parts) == BASIC_PARTS
    assert all(part.tolist() == [0.0] for part in parts.values())


@given(
    st.lists(
        st.tuples(st.sampled_from(STAGES), st.integers(0, 30), st.sampled_from(STAGES), st.integers(0, 30)),
        min_size=1,
        max_size=25,
    ),
    st.floats(0.9, 0.999),
)
def test_discounted_shaping_telescopes_to_nothing(path, gamma):
    """Whatever stages two slots run through from empty ones, an episode's discounted shaping sums to 0."""
    states = [((SeedStage.DORMANT, SeedStage.DORMANT), (0, 0))]
    states += [((a, b), (m, n)) for a, m, b, n in path]
    total = 0.0
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        step = outcome(
            stage_before=[before[0]],
            epochs_before=[before[1]],
            stage=[after[0]],
            epochs_in_stage=[after[1]],
            alpha=[[0.0, 0.0]],
            seed_parameters=[[0, 0]],
            fossilized=[[False, False]],
            contribution=[[np.nan, np.nan]],
            progress=[[np.nan, np.nan]],
            terminated=[t == len(path) - 1],
        )
        total += gamma**t * basic(step, WEIGHTS, gamma=gamma)["shaping"][0]
    assert total == pytest.approx(0.0, abs=1e-9)


def test_shaping_uses_the_gamma_it_is_given():
    held = outcome(
        stage_before=[[SeedStage.HOLDING]],
        epochs_before=[[50]],
        stage=[[SeedStage.HOLDING]],
        epochs_in_stage=[[51]],
    )
    assert basic(held, WEIGHTS, gamma=0.9)["shaping"] == pytest.approx([0.3 * (0.9 - 1) * 7.5])


@given(st.sampled_from(STAGES), st.floats(0, 1), st.integers(0, 1000))
def test_rent_is_alpha_times_parameters_relative_to_the_host(stage, alpha, parameters):
    step = outcome(stage=[[stage]], alpha=[[alpha]], seed_parameters=[[parameters]])
    expected = -WEIGHTS.rent_weight * alpha * parameters / 75 if BLENDED[stage] else 0.0
    assert basic(step, WEIGHTS, gamma=0.99)["rent"] == pytest.approx([expected])


@pytest.mark.parametrize(
    ("contribution", "progress", "expected"),
    [
        (4.0, 4.0, 0.3 + 0.5 * 4.0),
        (2.0, 6.0, 0.3 + 0.5 * 3.0),
        (30.0, 30.0, 5.0),  # bounded
        (4.0, -1.0, 0.3),
        (4.0, 0.0, 0.3),
        (0.0, 9.0, 0.0),
        (-2.0, 9.0, 0.0),
        (np.nan, 9.0, 0.0),
    ],
)
def test_fossil_bonus(contribution, progress, expected):
    assert fossil_bonus(np.array(contribution), np.array(progress), WEIGHTS) == pytest.approx(expected)


def test_only_a_fossilize_that_happened_is_paid():
    """The trap: a seed in HOLDING with a contribution, whose FOSSILIZE was refused."""
    held = {"stage_before": [[SeedStage.HOLDING]], "contribution": [[8.0]], "progress": [[8.0]]}
    refused = outcome(stage=[[SeedStage.HOLDING]], **held)
    happened = outcome(stage=[[SeedStage.FOSSILIZED]], fossilized=[[True]], **held)
    assert basic(refused, WEIGHTS, gamma=0.99)["fossil_bonus"].tolist() == [0.0]
    assert basic(happened, WEIGHTS, gamma=0.99)["fossil_bonus"] == pytest.approx([0.3 + 0.5 * 8.0])


def test_terminal_parts_are_paid_at_the_horizon_only():
    grown = {
        "stage": [[SeedStage.FOSSILIZED]],
        "alpha": [[1.0]],
        "seed_parameters": [[150]],
        "accuracy": [42.0],
    }
    before = basic(outcome(**grown), WEIGHTS, gamma=0.99)
    at_end = basic(outcome(**grown, terminated=[True]), WEIGHTS, gamma=0.99)
    assert before["terminal_accuracy"].tolist() == before["terminal_parameters"].tolist() == [0.0]
    assert at_end["terminal_accuracy"] == pytest.approx([0.05 * 42.0])
    assert at_end["terminal_parameters"] == pytest.approx([-0.1 * 150 / 75])


def test_of_two_networks_with_equal_accuracy_the_smaller_one_is_worth_more():
    def worth(parameters):
        step = outcome(
            stage=[[SeedStage.FOSSILIZED]], alpha=[[1.0]], seed_parameters=[[parameters]], terminated=[True]
        )
        return sum(part[0] for part in basic(step, WEIGHTS, gamma=0.99).values())

    assert worth(11) > worth(22)
