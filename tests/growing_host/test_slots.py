"""The slots of many hosts against the rules written out slot by slot, over random episodes and in told stories."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import ALPHA_CURVES, ALPHA_SPEED_EPOCHS, ALPHA_TARGETS, TEMPO_EPOCHS, Style
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import AlphaMode, Composition
from esper_simic.growing_host.slot_fields import FIELDS, SEED_FIELDS, SlotFields
from esper_simic.growing_host.slots import NO_BLUEPRINT, SlotTable
from esper_simic.growing_host.training import GradientReport
from esper_simic.lifecycle import LIVE, OCCUPIED, TRANSITIONS, Event, SeedStage
from tests.growing_host.literal_slots import Episode

CONFIG = EnvironmentConfig(alpha_control="full", prune_age_min=2, embargo_epochs=2, training_epochs_min=2)
HERE = (np.array([0]), np.array([0]))
HALF, MOST, FULL = range(len(ALPHA_TARGETS))
AT_ONCE, FAST, MEDIUM, SLOW = range(len(ALPHA_SPEED_EPOCHS))
LINEAR = ALPHA_CURVES.index("LINEAR")

RULES = st.fixed_dictionaries(
    {
        "gates": st.sampled_from(["permissive", "strict"]),
        "alpha_control": st.sampled_from(["plain", "full", "full"]),
        "mask_gates": st.booleans(),
        "max_seeds": st.sampled_from([None, 1, 2]),
        "prune_age_min": st.integers(0, 4),
        "embargo_epochs": st.integers(0, 3),
        "training_epochs_min": st.integers(1, 3),
        "blending_epochs_min": st.integers(0, 5),
        "improvement_min": st.just(0.2),
        "auto_forward_g1": st.booleans(),
        "auto_forward_g2": st.booleans(),
        "auto_forward_g3": st.booleans(),
    }
)


@settings(max_examples=50)
@given(rules=RULES, seed=st.integers(0, 10**6), legal_share=st.sampled_from([0.7, 0.95, 1.0]))
def test_random_episodes_go_by_the_rules(rules, seed, legal_share):
    episode = Episode(CONFIG.model_copy(update=rules), seed=seed)
    for _ in range(30):
        before = episode.table.stage.copy()
        episode.step(episode.random_action(legal_share))
        compare(episode)
        check_laws(episode.table, before, episode.removed)


def compare(episode):
    """Every field that the literal rules know."""
    table = episode.table
    for lane, host in enumerate(episode.hosts):
        assert {slot for where, slot in episode.removed if where == lane} == set(host.removed)
        for slot, here in enumerate(host.slots):
            at = lane, slot
            assert SeedStage(int(table.stage[at])).name == here.stage
            assert (table.epochs_in_stage[at], table.age[at]) == (here.epochs, here.age)
            assert AlphaMode(int(table.alpha_mode[at])).name == here.mode
            assert Composition(int(table.composition[at])).name == here.composition
            assert ALPHA_CURVES[table.alpha_curve[at]] == here.curve
            assert table.alpha[at] == pytest.approx(here.alpha, abs=1e-12)
            assert table.alpha_target[at] == here.target
            assert table.prune_scheduled[at] == here.doomed
            np.testing.assert_allclose(table.gradient_ratio[at], here.ratio, rtol=1e-12)
            np.testing.assert_equal(table.contribution[at], here.contribution)


def check_laws(table, before, removed):
    """What holds after every step, whatever was done."""
    occupied = OCCUPIED[table.stage]
    for name, (_, empty) in SEED_FIELDS.items():
        np.testing.assert_equal(getattr(table, name)[~occupied], np.array(empty), err_msg=name)
    assert (table.ramping == (table.ramp_done < table.ramp_total)).all()
    assert not (table.frozen & ~(table.stage == SeedStage.BLENDING)).any()
    assert (table.frozen >= table.prune_scheduled).all()
    assert ((table.alpha >= 0) & (table.alpha <= 1)).all()
    assert (table.alpha[np.isin(table.stage, (SeedStage.GERMINATED, SeedStage.TRAINING))] == 0).all()
    kept = np.isin(table.stage, (SeedStage.HOLDING, SeedStage.FOSSILIZED))
    assert (table.alpha[kept] == 1.0).all(), "only what is blended in wholly is held or kept"
    gone = {(int(e), int(s)) for e, s in np.argwhere(LIVE[before] & ~occupied)}
    assert gone <= removed, "a seed that left its slot was told to the caller"
    for at in removed:
        assert not occupied[at]
    steps = {(before[at], table.stage[at]) for at in np.ndindex(table.stage.shape)}
    assert all(reachable(SeedStage(int(a)), SeedStage(int(b))) for a, b in steps)


def reachable(old, new):
    """Within one step: a decision (or a gate that a seed passes alone), and then a dwell time that ends."""
    frontier = {old}
    for _ in range(3):
        frontier |= {after for (stage, _), after in TRANSITIONS.items() if stage in frontier}
    return new in frontier


@settings(max_examples=30)
@given(flags=st.tuples(st.booleans(), st.booleans(), st.booleans()), seed=st.integers(0, 10**6))
def test_an_auto_forward_is_an_advance_given_in_the_first_step_its_gate_is_open(flags, seed):
    """A host whose seeds go alone, beside one that is advanced by hand whenever that is legal, then germinates."""
    names = ("auto_forward_g1", "auto_forward_g2", "auto_forward_g3")
    alone = Episode(
        CONFIG.model_copy(update=dict(zip(names, flags, strict=True))), lanes=1, slots=1, seed=seed
    )
    by_hand = Episode(CONFIG, lanes=1, slots=1, seed=seed)
    for episode in (alone, by_hand):
        germinate(episode.table)
        here = episode.hosts[0].slots[0]
        episode.hosts[0].enter(here, "GERMINATED")
        here.curve, here.tempo, here.target = "LINEAR", 5, 1.0
    for _ in range(25):
        for episode in (alone, by_hand):
            legal = episode.legality()
            actions = np.zeros((1, 8), dtype=np.int64)
            actions[:, 7] = 5 * legal.op_slot[:, 5, 0]  # ADVANCE where it is legal, else WAIT
            assert episode.step(actions).all()
        for name in FIELDS:
            np.testing.assert_equal(getattr(alone.table, name), getattr(by_hand.table, name), err_msg=name)


def germinate(table, at=HERE, *, style=Style.LINEAR_ADD, tempo=5, target=FULL, parameters=40, epoch=0):
    count = len(at[0])
    table.germinate(
        at,
        blueprint=np.full(count, 1),
        parameters=np.full(count, parameters),
        style=np.full(count, style),
        tempo=np.full(count, TEMPO_EPOCHS.index(tempo)),
        alpha_target=np.full(count, target),
        epoch=np.full(count, epoch),
    )


def retarget(table, *, style=Style.LINEAR_ADD, target=FULL, speed=AT_ONCE, curve=LINEAR, parameters=40):
    one = {"style": style, "alpha_target": target, "alpha_speed": speed, "alpha_curve": curve}
    table.retarget(HERE, parameters=np.array([parameters]), **{k: np.array([v]) for k, v in one.items()})


def prune(table, *, speed=AT_ONCE, curve=LINEAR):
    return table.prune(HERE, alpha_speed=np.array([speed]), alpha_curve=np.array([curve]))


def grown(stage, **choices):
    """One host with one seed that has just come to a stage, its ramp over."""
    table = SlotTable(1, 1)
    table.record_accuracy(np.array([0]), np.array([12.0]))
    germinate(table, **choices)
    for _ in range(
        [SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING].index(stage)
    ):
        table.advance(HERE)
        while table.ramping.any():
            table.tick(CONFIG)
    return table


def ticks(table, count, config=CONFIG):
    """Stage, alpha and mode after each of some ticks."""
    seen = []
    for _ in range(count):
        table.tick(config)
        seen.append((SeedStage(int(table.stage[0, 0])).name, table.alpha[0, 0], int(table.alpha_mode[0, 0])))
    return seen


@pytest.mark.parametrize(("target", "alpha"), [(HALF, 0.5), (MOST, 0.7), (FULL, 1.0)])
@pytest.mark.parametrize("tempo", TEMPO_EPOCHS)
def test_the_first_ramp_takes_the_tempo_and_leads_to_the_target_given_at_germination(tempo, target, alpha):
    table = grown(SeedStage.TRAINING, tempo=tempo, target=target)
    assert table.alpha_target[0, 0] == alpha, "a choice is visible before it takes effect"
    table.advance(HERE)
    rising = [a for _, a, _ in ticks(table, tempo + 1)]
    assert rising == pytest.approx([alpha * min(done / tempo, 1) for done in range(1, tempo + 2)])
    assert rising[tempo - 1] == alpha
    assert table.alpha_mode[0, 0] == AlphaMode.HOLD


def test_a_scheduled_prune_comes_down_frozen_and_goes_when_it_lands():
    table = grown(SeedStage.HOLDING)
    removed = prune(table, speed=FAST)
    assert len(removed[0]) == 0
    assert table.stage[0, 0] == SeedStage.BLENDING
    assert table.frozen.all()
    seen, told = [], []
    for _ in range(5):
        told.append(len(table.tick(CONFIG).removed[0]))
        seen.append((SeedStage(int(table.stage[0, 0])).name, round(table.alpha[0, 0], 9)))
    assert seen[:3] == [("BLENDING", round(2 / 3, 9)), ("BLENDING", round(1 / 3, 9)), ("PRUNED", 0.0)]
    assert told == [0, 0, 1, 0, 0]
    assert [stage for stage, _ in seen[3:]] == ["EMBARGOED", "EMBARGOED"]
    assert table.blueprint[0, 0] == NO_BLUEPRINT


@pytest.mark.parametrize("speed", [FAST, MEDIUM, SLOW])
def test_a_prune_takes_the_epochs_of_its_speed(speed):
    table = grown(SeedStage.BLENDING)
    prune(table, speed=speed)
    landed = [len(table.tick(CONFIG).removed[0]) for _ in range(10)]
    assert landed.index(1) + 1 == ALPHA_SPEED_EPOCHS[speed]


@pytest.mark.parametrize(
    ("stage", "speed"),
    [
        (SeedStage.GERMINATED, SLOW),
        (SeedStage.TRAINING, SLOW),
        (SeedStage.BLENDING, AT_ONCE),
        (SeedStage.HOLDING, AT_ONCE),
    ],
)
def test_a_prune_without_alpha_or_without_epochs_is_at_once(stage, speed):
    table = grown(stage)
    lanes, slots = prune(table, speed=speed)
    assert (lanes.tolist(), slots.tolist()) == ([0], [0])
    assert table.stage[0, 0] == SeedStage.PRUNED
    assert [stage for stage, *_ in ticks(table, 4)] == ["EMBARGOED", "EMBARGOED", "RESETTING", "DORMANT"]


def test_holding_goes_back_to_blending_for_a_partial_target_and_comes_again():
    table = grown(SeedStage.HOLDING)
    retarget(table, target=HALF, speed=FAST)
    assert table.stage[0, 0] == SeedStage.BLENDING
    assert table.frozen.all()
    assert [mode for *_, mode in ticks(table, 3)] == [AlphaMode.DOWN, AlphaMode.DOWN, AlphaMode.HOLD]
    assert table.alpha[0, 0] == 0.5
    retarget(table, target=FULL, speed=FAST)
    assert not table.frozen.any()
    assert [mode for *_, mode in ticks(table, 3)] == [AlphaMode.UP, AlphaMode.UP, AlphaMode.HOLD]
    table.advance(HERE)
    assert table.stage[0, 0] == SeedStage.HOLDING


def test_holding_that_is_led_to_where_it_is_stays_and_may_change_its_composition():
    table = grown(SeedStage.HOLDING)
    epochs = table.epochs_in_stage[0, 0]
    retarget(table, style=Style.GATED_GATE, target=FULL, speed=SLOW, parameters=99)
    assert table.stage[0, 0] == SeedStage.HOLDING
    assert table.epochs_in_stage[0, 0] == epochs
    assert (table.alpha[0, 0], table.alpha_mode[0, 0]) == (1.0, AlphaMode.HOLD)
    assert (table.composition[0, 0], table.parameters[0, 0]) == (Composition.GATE, 99)


def test_a_retarget_in_blending_does_not_begin_the_stage_anew():
    table = grown(SeedStage.BLENDING, target=HALF)
    epochs = table.epochs_in_stage[0, 0]
    retarget(table, target=FULL, speed=FAST)
    assert table.epochs_in_stage[0, 0] == epochs > 0


def test_a_gated_seed_ramps_linearly_whatever_curve_was_wished():
    table = grown(SeedStage.HOLDING)
    sharp = ALPHA_CURVES.index("SIGMOID_SHARP")
    retarget(table, style=Style.GATED_GATE, target=HALF, speed=MEDIUM, curve=sharp)
    assert [a for _, a, _ in ticks(table, 5)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    prune(table, speed=MEDIUM, curve=sharp)
    assert [a for _, a, _ in ticks(table, 5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("move", [retarget, prune], ids=["retarget", "prune"])
def test_alpha_that_moves_is_not_led_elsewhere(move):
    table = grown(SeedStage.TRAINING)
    table.advance(HERE)
    table.tick(CONFIG)
    with pytest.raises(InvariantViolation, match="still moves"):
        move(table)
    table.remove(HERE)
    assert table.stage[0, 0] == SeedStage.PRUNED, "a governor may remove a seed at any time"


def test_a_change_at_once_is_seen_as_a_change():
    """What alpha was a tick ago is what it was before the action, too."""
    table = grown(SeedStage.HOLDING)
    table.tick(CONFIG)
    retarget(table, target=HALF, speed=AT_ONCE)
    table.tick(CONFIG)
    assert (table.alpha_before[0, 0], table.alpha[0, 0]) == (1.0, 0.5)
    table.tick(CONFIG)
    assert (table.alpha_before[0, 0], table.alpha[0, 0]) == (0.5, 0.5)


def test_a_move_the_table_lacks_is_a_contradiction():
    table = SlotTable(1, 1)
    with pytest.raises(InvariantViolation, match="DORMANT was given ADVANCE"):
        table.advance(HERE)
    with pytest.raises(InvariantViolation, match="FOSSILIZED was given PRUNE"):
        kept = grown(SeedStage.HOLDING)
        kept.fossilize(HERE)
        prune(kept)


def test_accuracies_are_noted_when_something_begins():
    table = grown(SeedStage.GERMINATED, epoch=7)
    assert table.accuracy_at_germination[0, 0] == table.accuracy_at_stage[0, 0] == 12.0
    assert table.germinated_at[0, 0] == 7
    nothing = np.full((1, 1), np.nan)
    table.record_validation(np.array([15.0]), nothing, nothing, nothing)
    table.advance(HERE)
    table.record_validation(np.array([17.5]), nothing, nothing, nothing)
    assert table.vitals().improvement[0, 0] == 2.5
    assert table.accuracy_at_germination[0, 0] == 12.0


def test_contributions_are_kept_where_they_were_not_measured():
    table = grown(SeedStage.HOLDING)
    unknown = np.full((1, 1), np.nan)
    for accuracy, worth in ((20.0, 3.0), (21.0, 4.0)):
        table.record_validation(np.array([accuracy]), np.full((1, 1), worth), np.full((1, 1), 2.0), unknown)
    assert (table.contribution[0, 0], table.contribution_velocity[0, 0]) == (4.0, 1.0)
    assert (table.progress[0, 0], table.solo[0, 0], table.interaction[0, 0]) == (9.0, 2.0, 0.0)
    table.record_validation(np.array([25.0]), np.full((1, 1), 5.0), unknown, np.full((1, 1), -1.5))
    assert (table.solo[0, 0], table.interaction[0, 0]) == (2.0, -1.5)
    table.tick(CONFIG)
    table.record_validation(np.array([30.0]), unknown, unknown, unknown)
    assert (table.contribution[0, 0], table.progress[0, 0], table.interaction[0, 0]) == (5.0, 13.0, -1.5)
    assert table.epochs_since_contribution[0, 0] == 1


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        (0.0, [np.nan, 3.0, 3.0, -4.0]),  # the last change alone, kept where nothing was measured
        (0.75, [np.nan, 3.0, 3.0, 0.75 * 3.0 + 0.25 * -4.0]),
    ],
)
def test_the_velocity_of_a_contribution_is_averaged_from_its_first_change_on(ema, expected):
    table = grown(SeedStage.HOLDING)
    seen = []
    for worth in (2.0, 5.0, np.nan, 1.0):
        each = np.full((1, 1), worth)
        table.record_validation(np.array([20.0]), each, each, each, velocity_ema=ema)
        seen.append(table.contribution_velocity[0, 0])
    assert seen == pytest.approx(expected, nan_ok=True)
    table.remove(HERE)
    assert np.isnan(table.contribution_velocity[0, 0]), "another seed in this slot begins anew"


def report(seed_norm, host_norm):
    flags = np.zeros((1, 1), dtype=np.bool_)
    return GradientReport(
        layer_norm=np.array([[0.6, 0.8]]) * host_norm,
        seed_norm=np.full((1, 1), seed_norm),
        health=np.ones((1, 1)),
        vanishing=flags,
        exploding=flags,
    )


def test_the_gradient_ratio_is_size_normalised_and_averaged_from_its_first_value_on():
    table = grown(SeedStage.TRAINING, parameters=25)
    ratios = []
    for seed_norm, host_norm in ((0.5, 2.0), (1.0, 2.0), (1.0, 0.0), (0.0, 2.0)):
        table.record_gradients(report(seed_norm, host_norm), host_parameters=100, ema=0.9)
        ratios.append(table.gradient_ratio[0, 0])
    # RMS 0.5/5 against 2/10; then 1/5 against 2/10; then a host without gradient, which says nothing; then 0.
    assert ratios == pytest.approx([0.5, 0.9 * 0.5 + 0.1 * 1.0, 0.55, 0.9 * 0.55])


def test_a_frozen_seed_keeps_what_was_measured_before():
    table = grown(SeedStage.HOLDING)
    table.record_gradients(report(0.5, 1.0), host_parameters=100, ema=0.9)
    retarget(table, target=HALF, speed=FAST)
    table.record_gradients(report(0.0, 1.0), host_parameters=100, ema=0.9)
    assert table.gradient_norm[0, 0] == 0.5


def test_the_whole_state_can_be_taken_out_and_put_back():
    episode = Episode(CONFIG, seed=4)
    for _ in range(20):
        episode.step(episode.random_action(1.0))
    kept, other = episode.table.state(), SlotTable(3, 3)
    other.load_state(kept)
    for name in (*FIELDS, "accuracy"):
        np.testing.assert_equal(getattr(other, name), getattr(episode.table, name), err_msg=name)
        assert getattr(other, name).dtype == getattr(episode.table, name).dtype
    episode.table.tick(CONFIG)
    assert (other.epochs_in_stage == kept["epochs_in_stage"]).all(), "what was taken out is a copy"
    with pytest.raises(InvariantViolation, match="accuracy"):
        other.load_state({name: value for name, value in kept.items() if name != "accuracy"})


def test_a_reset_empties_some_lanes_and_no_others():
    episode, empty = Episode(CONFIG, seed=1), SlotTable(3, 3)
    for _ in range(20):
        episode.step(episode.random_action(1.0))
    before = episode.table.state()
    episode.table.reset(np.array([0, 2]))
    for name in (*FIELDS, "accuracy"):
        np.testing.assert_equal(
            getattr(episode.table, name)[[0, 2]], getattr(empty, name)[[0, 2]], err_msg=name
        )
        np.testing.assert_equal(getattr(episode.table, name)[1], before[name][1], err_msg=name)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_lanes_do_not_touch_each_other(seed):
    """Two hosts side by side do what each does alone."""
    both, chance = SlotTable(2, 1), np.random.default_rng(seed)
    singles = [SlotTable(1, 1), SlotTable(1, 1)]
    for _ in range(15):
        for lane in (0, 1):
            stage = SeedStage(int(both.stage[lane, 0]))
            at = (np.array([lane]), np.array([0]))
            if stage is SeedStage.DORMANT:
                germinate(both, at)
                germinate(singles[lane])
            elif (
                (stage, Event.ADVANCE) in TRANSITIONS and not both.ramping[lane, 0] and chance.random() < 0.5
            ):
                both.advance(at)
                singles[lane].advance(HERE)
        both.tick(CONFIG)
        for lane, single in enumerate(singles):
            single.tick(CONFIG)
            for name in FIELDS:
                np.testing.assert_equal(getattr(both, name)[lane], getattr(single, name)[0], err_msg=name)


def test_every_field_is_declared_and_explained():
    assert set(FIELDS) == set(SlotFields.__annotations__)
    explained = set(re.findall(r"`(\w+)`", inspect.getdoc(SlotFields) or ""))
    assert set(FIELDS) <= explained
