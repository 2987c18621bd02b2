"""The lifecycle is a table; gates are predicates over whole arrays."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper_simic.config import EnvironmentConfig
from esper_simic.lifecycle import (
    BLENDED,
    BLOCKS_GERMINATION,
    COMPUTING,
    GATE_OF_MOVE,
    GATES,
    LIVE,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    TRANSITIONS,
    Event,
    Gate,
    SeedStage,
    Vitals,
    expired,
    gate_g0,
    moves_itself,
    open_gates,
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


def test_every_decision_that_leads_on_has_its_gate():
    onward = {Event.GERMINATE, Event.ADVANCE, Event.FOSSILIZE}
    assert set(GATE_OF_MOVE) == {move for move in TRANSITIONS if move[1] in onward}


def test_alpha_is_led_in_blending_and_holding_only_and_leads_back():
    retargets = {stage: after for (stage, event), after in TRANSITIONS.items() if event is Event.RETARGET}
    assert retargets == {SeedStage.BLENDING: SeedStage.BLENDING, SeedStage.HOLDING: SeedStage.BLENDING}


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


STRICT = EnvironmentConfig(gates="strict")
PERMISSIVE = EnvironmentConfig()
BOTH = pytest.mark.parametrize("rules", [PERMISSIVE, STRICT], ids=["permissive", "strict"])
NEVER = float("nan")

READY = {
    SeedStage.GERMINATED: {},
    SeedStage.TRAINING: {
        "epochs_in_stage": 10,
        "gradient_health": 0.7,
        "improvement": 0.5,
        "gradient_ratio": 0.1,
    },
    SeedStage.BLENDING: {"epochs_in_stage": 10, "alpha": 1.0, "alpha_target": 1.0},
    SeedStage.HOLDING: {"contribution": 1.0, "gradient_health": 0.0},
}
"""What just suffices in each stage for both forms of its gate; a vanished gradient is no ill health at the end."""


def vitals(stage, **changes):
    """One seed about which nothing is known but what is given."""
    values = {
        "stage": stage,
        "epochs_in_stage": 0,
        "gradient_health": NEVER,
        "exploding": False,
        "gradient_ratio": NEVER,
        "improvement": NEVER,
        "alpha": 0.0,
        "alpha_target": 0.0,
        "ramping": False,
        "contribution": NEVER,
    }
    return Vitals(**{name: np.array([value]) for name, value in (values | changes).items()})


def opens(stage, rules, **changes):
    event = Event.FOSSILIZE if stage is SeedStage.HOLDING else Event.ADVANCE
    return open_gates(vitals(stage, **(READY[stage] | changes)), event, rules).tolist() == [True]


def test_g0_asks_for_an_identity_and_a_known_blueprint():
    true, false = np.array([True]), np.array([False])
    assert gate_g0(true, true).all()
    assert not gate_g0(true, false).any()
    assert not gate_g0(false, true).any()


@BOTH
def test_g4_always_opens_and_no_move_asks_it(rules):
    nothing = vitals(SeedStage.DORMANT)
    assert GATES[Gate.G4](nothing, rules).all()
    assert Gate.G4 not in GATE_OF_MOVE.values()
    assert {gate.name: gate.value for gate in Gate} == {"G0": 1, "G1": 2, "G2": 3, "G3": 4, "G4": 5, "G5": 6}


@BOTH
@pytest.mark.parametrize("stage", READY)
def test_what_just_suffices_opens_both_forms(stage, rules):
    assert opens(stage, rules)


SHORT = [
    (SeedStage.TRAINING, {"epochs_in_stage": 9}),
    (SeedStage.TRAINING, {"gradient_health": 0.69}),
    (SeedStage.TRAINING, {"gradient_health": NEVER}),  # never measured: closed, not open
    (SeedStage.TRAINING, {"exploding": True}),
    (SeedStage.BLENDING, {"alpha": 0.99}),
    (SeedStage.BLENDING, {"ramping": True}),
    (SeedStage.BLENDING, {"alpha": 0.7, "alpha_target": 0.7}),  # blended in partly, for good
    (SeedStage.HOLDING, {"contribution": NEVER}),
    (SeedStage.HOLDING, {"gradient_health": NEVER}),
    (SeedStage.HOLDING, {"exploding": True}),
]


@BOTH
@pytest.mark.parametrize(("stage", "change"), SHORT)
def test_what_falls_short_closes_both_forms(stage, change, rules):
    assert not opens(stage, rules, **change)


STRICTER = [
    (SeedStage.TRAINING, {"improvement": 0.49}),
    (SeedStage.TRAINING, {"improvement": NEVER}),
    (SeedStage.TRAINING, {"gradient_ratio": 0.099}),
    (SeedStage.TRAINING, {"gradient_ratio": NEVER}),
    (SeedStage.BLENDING, {"epochs_in_stage": 9}),
    (SeedStage.HOLDING, {"contribution": 0.99}),
    (SeedStage.HOLDING, {"contribution": -3.0}),  # permissive asks that it was measured, not what it was
]


@pytest.mark.parametrize(("stage", "change"), STRICTER)
def test_what_only_the_strict_form_asks_for(stage, change):
    assert opens(stage, PERMISSIVE, **change)
    assert not opens(stage, STRICT, **change)


def test_g2_stays_closed_without_a_measurement_even_when_nothing_is_asked_for():
    rules = EnvironmentConfig(
        gates="strict", gradient_health_min=0, gradient_ratio_min=0, improvement_min=0, training_epochs_min=1
    )
    for name in ("gradient_health", "gradient_ratio", "improvement"):
        assert not opens(SeedStage.TRAINING, rules, **{name: NEVER})


@given(
    st.sampled_from(SeedStage),
    st.sampled_from([Event.ADVANCE, Event.FOSSILIZE]),
    st.fixed_dictionaries(
        {
            "epochs_in_stage": st.integers(0, 20),
            "exploding": st.booleans(),
            "ramping": st.booleans(),
            "alpha_target": st.sampled_from([0.0, 0.5, 1.0]),
            **{
                name: st.sampled_from([NEVER, 0.0, 0.3, 0.7, 1.0, 2.0])
                for name in ("gradient_health", "gradient_ratio", "improvement", "alpha", "contribution")
            },
        }
    ),
)
def test_strict_never_opens_where_permissive_is_closed_nor_either_where_no_move_is(stage, event, known):
    seed = vitals(stage, **known)
    strict, permissive = (open_gates(seed, event, rules).all() for rules in (STRICT, PERMISSIVE))
    assert permissive or not strict
    assert (stage, event) in TRANSITIONS or not permissive


@pytest.mark.parametrize("flag", ["auto_forward_g1", "auto_forward_g2", "auto_forward_g3"])
def test_each_flag_moves_its_own_stage(flag):
    stages = np.array([s.value for s in SeedStage])
    moved = {
        "auto_forward_g1": SeedStage.GERMINATED,
        "auto_forward_g2": SeedStage.TRAINING,
        "auto_forward_g3": SeedStage.BLENDING,
    }
    assert stages[moves_itself(stages, EnvironmentConfig.model_validate({flag: True}))].tolist() == [
        moved[flag]
    ]
    assert not moves_itself(stages, EnvironmentConfig()).any()


def test_a_horizon_in_which_no_seed_can_finish_is_refused():
    with pytest.raises(ValidationError, match="no seed can finish with strict gates"):
        EnvironmentConfig(gates="strict", max_epochs=20)
    EnvironmentConfig(gates="strict", max_epochs=21)


def test_importing_the_package_and_the_lifecycle_loads_no_torch():
    code = "import sys, esper_simic, esper_simic.lifecycle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
