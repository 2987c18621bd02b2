"""The other terms of SHAPED: every number of the definition, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.actions import Op
from esper_simic.errors import ContractError
from esper_simic.lifecycle import OCCUPIED, SeedStage
from esper_simic.rewards import PARTS, Rewards, total
from tests.rewards.steps import config, decided, held, parts, refused, step


def part(name, *outcomes, **changes):
    return parts("shaped", *outcomes, **changes)[name]


def test_nothing_happens_nothing_is_paid():
    found = parts("shaped", step())
    assert tuple(found) == PARTS["shaped"]
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(("epochs", "expected"), [(1, -0.15), (2, -0.2), (6, -0.4), (30, -0.4)])
def test_blending_into_a_host_that_gets_worse_is_warned_of(epochs, expected):
    blending = {"stage": SeedStage.BLENDING, "epochs_in_stage": epochs}
    assert part("blending_warning", held(**blending, improvement=-0.1)) == pytest.approx(expected)
    assert part("blending_warning", held(**blending, improvement=0.0)) == 0.0
    assert part("blending_warning", held(**blending)) == 0.0, "unknown"
    assert part("blending_warning", held(epochs_in_stage=epochs, improvement=-0.1)) == 0.0, "HOLDING"


@pytest.mark.parametrize(
    ("interaction", "expected"),
    [(2.0, 0.1 * math.tanh(1.0)), (100.0, 0.1), (0.0, 0.0), (-3.0, 0.0), (np.nan, 0.0)],
)
def test_synergy(interaction, expected):
    assert part("synergy", held(interaction=interaction)) == pytest.approx(expected)
    fossil = {"stage_before": SeedStage.FOSSILIZED, "stage": SeedStage.FOSSILIZED}
    assert part("synergy", held(**fossil, interaction=interaction)) == 0.0


def test_rent_by_hand():
    """alpha 0.5 * 100 + 0.0039 * 1000 = 53.9 a slot; two slots; ln(1 + 107.8 / 1000) / 2."""
    outcome = held(alpha=[0.5, 0.5])
    assert part("rent", outcome) == pytest.approx(-0.5 * math.log(1.1078))
    assert part("rent", held(alpha=1.0, seed_parameters=10**6)) == pytest.approx(-1.5), "bounded"


@pytest.mark.parametrize("stage", list(SeedStage))
def test_only_blended_seeds_pay_rent(stage):
    paid = part("rent", held(stage=stage, alpha=1.0))
    blended = stage in {SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED}
    assert paid == (pytest.approx(-0.5 * math.log(1.1039)) if blended else 0.0)


def test_a_tiny_host_counts_as_one_of_200_parameters():
    outcome = held(host_parameters=75, seed_parameters=20)
    assert part("rent", outcome) == pytest.approx(-0.5 * math.log(1 + (20 + 0.0039 * 75) / 200))
    moved = held(host_parameters=75, parameters_before=20, alpha_before=0.5)
    assert part("alpha_shock", moved) == pytest.approx(-0.1958 * 0.25 * 20 / 200)


def test_alpha_shock_counts_what_the_seed_was_when_alpha_moved():
    assert part("alpha_shock", held(alpha_before=0.7)) == pytest.approx(-0.1958 * 0.09 * 100 / 1000)
    assert part("alpha_shock", decided(Op.PRUNE)) == pytest.approx(-0.1958 * 0.1), "cut off at once"
    assert part("alpha_shock", held(alpha_before=0.0, parameters_before=10**6)) == pytest.approx(-1.0), (
        "bounded"
    )
    assert part("alpha_shock", held()) == 0.0


def test_occupancy():
    stages = [SeedStage.GERMINATED, SeedStage.HOLDING, SeedStage.FOSSILIZED, SeedStage.EMBARGOED]
    outcome = step(stage=stages, stage_before=stages)
    assert part("occupancy", outcome) == pytest.approx(-0.01 * 2 - 0.002)
    assert part("occupancy", held()) == 0.0, "the first slot is free"
    fossil = {"stage_before": SeedStage.FOSSILIZED, "stage": SeedStage.FOSSILIZED}
    assert part("occupancy", held(**fossil)) == pytest.approx(-0.002)


def test_seeds_that_the_environment_had_to_prune():
    outcome = step(stage=[SeedStage.PRUNED] * 3, auto_pruned=[True, True, False])
    assert part("auto_prune", outcome) == pytest.approx(-0.4)


def test_terminal_accuracy():
    assert part("terminal_accuracy", step(accuracy=42.0, terminated=True)) == pytest.approx(2.1)
    assert part("terminal_accuracy", step(accuracy=42.0)) == 0.0


def test_a_germination_is_paid_at_once_with_its_timing_discount():
    """In the first epoch the base 1 counts 0.4: 0.3 * (0.99 * (0.4 + 0.3) - 0); from epoch 10 on it counts 1."""
    born = {"stage": SeedStage.GERMINATED, "epochs_in_stage": 1, "age": 1}
    assert part("shaping", step(**born, epoch=1)) == pytest.approx(0.3 * 0.99 * 0.7)
    assert part("shaping", step(**born, epoch=6)) == pytest.approx(0.3 * 0.99 * 1.0)
    assert part("shaping", step(**born, epoch=11)) == pytest.approx(0.3 * 0.99 * 1.3)
    assert part("shaping", step(**born, epoch=30)) == pytest.approx(0.3 * 0.99 * 1.3)


def test_a_prune_forfeits_the_potential():
    outcome = decided(Op.PRUNE, epochs_before=4)
    assert part("shaping", outcome) == pytest.approx(-0.3 * (5.5 + 1.2))
    early = decided(Op.PRUNE, epochs_before=4, age_before=19)
    assert part("shaping", early) == pytest.approx(-0.3 * (5.5 + 1.2 - 0.6)), "germinated in epoch 0"


@pytest.mark.parametrize(("epoch", "age"), [(5, 2), (30, 9)])
def test_a_seed_that_never_was_blended_gives_back_at_the_end_what_it_was_paid(epoch, age):
    """Its bonus over gamma^age: the discounted sum of what it was paid is 0."""
    germinated = step(stage=SeedStage.GERMINATED, epochs_in_stage=1, age=1, epoch=epoch)
    waits = [
        step(
            stage_before=SeedStage.GERMINATED,
            stage=SeedStage.GERMINATED,
            epochs_before=n,
            epochs_in_stage=n + 1,
            age_before=n,
            age=n + 1,
            epoch=epoch + n,
            terminated=n + 1 == age,
        )
        for n in range(1, age)
    ]
    paid = [part("shaping", one) for one in (germinated, *waits)]
    assert paid[0] > 0
    assert sum(0.99**t * one for t, one in enumerate(paid)) == pytest.approx(0.0, abs=1e-12)


def boosted(interaction, **changes):
    return held(**{"interaction": interaction, "improvement": 3.0, "age": 10} | changes)


@pytest.mark.parametrize(("waits", "discount"), [(0, 1.0), (1, 0.99), (4, 0.99**4)])
def test_hindsight_credits_partners_when_the_seed_is_fossilised(waits, discount):
    """0.2 tanh(0.1 * 2 * 3) gamma^delay; a partner pruned in between is credited all the same."""
    ahead = [boosted(2.0), *[boosted(np.nan)] * waits]
    fossilised = decided(Op.FOSSILIZE, improvement_before=3.0)
    assert part("hindsight", *ahead, fossilised) == pytest.approx(0.2 * math.tanh(0.6) * discount)
    assert part("hindsight", *ahead) == 0.0, "not before"
    assert part("hindsight", *ahead, refused(Op.FOSSILIZE, improvement_before=3.0)) == 0.0, (
        "it did not happen"
    )
    assert part("hindsight", *ahead, fossilised, held(stage=SeedStage.FOSSILIZED)) == 0.0, "once"


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_hindsight_is_bounded_and_asks_for_both(interaction, improvement):
    credit = part("hindsight", boosted(interaction), decided(Op.FOSSILIZE, improvement_before=improvement))
    assert 0.0 <= credit <= 0.2
    if interaction <= 0 or improvement <= 0:
        assert credit == 0.0


def test_a_new_seed_in_the_slot_inherits_no_boost():
    emptied = [decided(Op.PRUNE), step()]
    fossilised = decided(Op.FOSSILIZE, improvement_before=3.0)
    assert part("hindsight", boosted(2.0), *emptied, fossilised) == 0.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(SeedStage)),
            st.floats(0, 1),
            st.integers(0, 10**6),
            st.floats(-50, 50) | st.just(np.nan),
            st.floats(-50, 50) | st.just(np.nan),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(list(Op)),
    st.booleans(),
    st.sampled_from(["shaped", "escrow"]),
)
def test_whatever_happens_the_reward_is_a_number_and_its_costs_are_bounded(seeds, op, succeeded, mode):
    stage, alpha, parameters, contribution, improvement = zip(*seeds, strict=True)
    outcome = step(
        stage_before=stage,
        stage=stage,
        alpha=alpha,
        seed_parameters=parameters,
        parameters_before=parameters,
        contribution=contribution,
        contribution_before=contribution,
        progress=contribution[::-1],
        improvement=improvement[0],
        improvement_before=improvement[0],
        op=op,
        succeeded=succeeded,
    )
    found = parts(mode, outcome)
    assert np.isfinite(list(found.values())).all()
    assert -1.5 <= found["rent"] <= 0
    assert -1.0 <= found["alpha_shock"] <= 0
    assert -0.3 * len(seeds) <= found["indecision"] <= 0
    assert found["occupancy"] <= 0
    occupied = OCCUPIED[np.array(stage)].sum()
    assert found["occupancy"] >= -0.01 * occupied - 0.002 * occupied


def test_lanes_share_nothing():
    rng = np.random.default_rng(5)
    lanes, slots = 16, 3
    fields = {
        "stage_before": rng.choice(list(SeedStage), (lanes, slots)),
        "stage": rng.choice(list(SeedStage), (lanes, slots)),
        "alpha": rng.random((lanes, slots)),
        "seed_parameters": rng.integers(1, 300, (lanes, slots)),
        "contribution": rng.normal(0, 3, (lanes, slots)),
        "progress": rng.normal(0, 3, (lanes, slots)),
        "contribution_before": rng.normal(0, 3, (lanes, slots)),
        "progress_before": rng.normal(0, 3, (lanes, slots)),
        "interaction": rng.normal(0, 3, (lanes, slots)),
        "age": rng.integers(0, 20, (lanes, slots)),
        "age_before": rng.integers(0, 19, (lanes, slots)),
        "op": rng.integers(0, len(Op), lanes),
        "target": rng.integers(0, slots, lanes),
        "succeeded": rng.random(lanes) < 0.7,
        "improvement": rng.normal(0, 3, lanes),
        "improvement_before": rng.normal(0, 3, lanes),
        "accuracy": rng.random(lanes) * 100,
        "loss": rng.random(lanes) * 3,
        "loss_before": rng.random(lanes) * 3,
        "committed_accuracy": rng.random(lanes) * 100,
        "terminated": rng.random(lanes) < 0.3,
    }
    whole = {"epochs_before": 1, "epochs_in_stage": 2, "fossilized": False, "loss_scale": 2.3}

    def outcome(rows):
        return step(**whole, **{name: value[rows] for name, value in fields.items()})

    for mode in PARTS:
        together = Rewards(lanes, slots, config(mode), 0.99)
        alone = [Rewards(1, slots, config(mode), 0.99) for _ in range(lanes)]
        for _ in range(3):
            paid = total(together.parts(outcome(slice(None))))
            each = [total(one.parts(outcome([lane])))[0] for lane, one in enumerate(alone)]
            np.testing.assert_allclose(paid, each, rtol=1e-12, atol=1e-12)


def test_a_step_needs_a_host():
    with pytest.raises(ContractError, match="a host with parameters"):
        step(host_parameters=0)
