"""The lifecycle is a table; gates are predicates over whole arrays."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.lifecycle import (
    BLENDED,
    BLOCKS_GERMINATION,
    COMPUTING,
    LIVE,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    TRANSITIONS,
    Event,
    SeedStage,
    expired,
    gate_g0,
    gate_g1,
    gate_g2,
    gate_g3,
    gate_g5,
)


def test_stage_numbers_are_those_of_the_wire():
    assert {stage.name: stage.value for stage in SeedStage} == {
        "DORMANT": 1,
        "GERMINATED": 2,
        "TRAINING": 3,
        "BLENDING": 4,
        "HOLDING": 6,
        "FOSSILIZED": 7,
        "PRUNED": 8,
        "EMBARGOED": 9,
        "RESETTING": 10,
    }


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("stage", SeedStage)
def test_the_array_is_the_table(stage, event):
    assert NEXT_STAGE[stage, event] == TRANSITIONS.get((stage, event), NO_MOVE)


def test_a_fossil_never_moves_again():
    assert not any(stage is SeedStage.FOSSILIZED for stage, _ in TRANSITIONS)


def test_every_stage_is_reached_and_every_pruned_slot_comes_back():
    reached, frontier = {SeedStage.DORMANT}, {SeedStage.DORMANT}
    while frontier:
        frontier = {new for (old, _), new in TRANSITIONS.items() if old in frontier} - reached
        reached |= frontier
    assert reached == set(SeedStage)
    stage = SeedStage.PRUNED
    for _ in range(3):
        stage = TRANSITIONS[stage, Event.EXPIRE]
    assert stage is SeedStage.DORMANT


def test_what_can_be_pruned_is_what_is_live():
    assert [s for s in SeedStage if LIVE[s]] == [s for s in SeedStage if (s, Event.PRUNE) in TRANSITIONS]


def test_sets_of_stages():
    assert [s for s in SeedStage if COMPUTING[s]] == [
        SeedStage.TRAINING,
        SeedStage.BLENDING,
        SeedStage.HOLDING,
        SeedStage.FOSSILIZED,
    ]
    assert [s for s in SeedStage if BLENDED[s]] == [s for s in SeedStage if COMPUTING[s]][1:]
    assert [s for s in SeedStage if OCCUPIED[s]] == [
        SeedStage.GERMINATED,
        *(s for s in SeedStage if COMPUTING[s]),
    ]
    assert [s for s in SeedStage if BLOCKS_GERMINATION[s]] == [
        SeedStage.GERMINATED,
        SeedStage.TRAINING,
        SeedStage.PRUNED,
        SeedStage.EMBARGOED,
        SeedStage.RESETTING,
    ]


@given(st.sampled_from(SeedStage), st.integers(0, 20), st.integers(0, 10))
def test_dwell_times(stage, epochs, embargo):
    dwell = {SeedStage.PRUNED: 1, SeedStage.EMBARGOED: embargo, SeedStage.RESETTING: 1}
    due = expired(np.array([stage]), np.array([epochs]), embargo)
    assert due.tolist() == [stage in dwell and epochs >= dwell[stage]]


def test_g0_and_g1():
    true, false = np.array([True]), np.array([False])
    assert gate_g0(true, true).all()
    assert not gate_g0(true, false).any()
    assert not gate_g0(false, true).any()
    assert gate_g1(np.array([SeedStage.GERMINATED, SeedStage.TRAINING])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("epochs", "health", "exploding", "opens"),
    [
        (10, 0.7, False, True),
        (9, 1.0, False, False),
        (10, 0.69, False, False),
        (10, np.nan, False, False),  # never measured: closed, not open
        (10, 1.0, True, False),
    ],
)
def test_g2(epochs, health, exploding, opens):
    gate = gate_g2(
        np.array([epochs]),
        np.array([health]),
        np.array([exploding]),
        training_epochs_min=10,
        gradient_health_min=0.7,
    )
    assert gate.tolist() == [opens]


def test_g2_stays_closed_without_a_measurement_even_when_no_health_is_asked_for():
    gate = gate_g2(
        np.array([10]), np.array([np.nan]), np.array([False]), training_epochs_min=1, gradient_health_min=0.0
    )
    assert not gate.any()


@pytest.mark.parametrize(
    ("alpha", "target", "ramping", "opens"),
    [(1.0, 1.0, False, True), (0.99, 1.0, False, False), (1.0, 1.0, True, False), (0.7, 0.7, False, False)],
)
def test_g3(alpha, target, ramping, opens):
    assert gate_g3(np.array([alpha]), np.array([target]), np.array([ramping])).tolist() == [opens]


@pytest.mark.parametrize(
    ("contribution", "health", "exploding", "opens"),
    [
        (0.0, 0.7, False, True),
        (-3.0, 0.7, False, True),  # the permissive gate asks that it was measured, not what it was
        (5.0, 0.0, False, True),  # cut off by a later seed that is blended in wholly
        (np.nan, 1.0, False, False),
        (5.0, np.nan, False, False),
        (5.0, 1.0, True, False),
    ],
)
def test_g5(contribution, health, exploding, opens):
    assert gate_g5(np.array([contribution]), np.array([health]), np.array([exploding])).tolist() == [opens]


def test_importing_the_package_and_the_lifecycle_loads_no_torch():
    code = "import sys, esper_simic, esper_simic.lifecycle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
