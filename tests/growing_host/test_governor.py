"""The governor: scripted panics, laws over loss curves, and a slow literal truth with one deque a lane."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import BLUEPRINT, BLUEPRINTS, HEADS, OP, SLOT, Op
from esper_simic.config import GovernorConfig, parse
from esper_simic.errors import ConfigError, InvariantViolation
from esper_simic.growing_host.governor import (
    ROLLBACK_PART,
    Governor,
    PanicReason,
    Veto,
    preflight,
    settle,
)
from esper_simic.lifecycle import SeedStage

CONFIG = GovernorConfig()
SMALL = settings(max_examples=80, deadline=None, derandomize=True)
NONE, NOT_FINITE, LOBOTOMY, DIVERGED = PanicReason


def reasons(losses, *, classes=10, config=CONFIG, accuracy=50.0, tokens=False):
    """The reason after each epoch of one lane."""
    governor = Governor(1, classes, config, tokens=tokens)
    verdicts = [governor.watch(np.array([loss]), np.array([accuracy])) for loss in losses]
    for verdict in verdicts:
        assert verdict.panic.tolist() == [verdict.reason[0] != PanicReason.NONE]
    return [PanicReason(int(verdict.reason[0])) for verdict in verdicts]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_panics_at_once_even_in_the_first_epoch(loss):
    assert reasons([loss]) == [NOT_FINITE]
    assert reasons([1.0, loss, 1.0]) == [NONE, NOT_FINITE, NONE]


def test_an_accuracy_that_is_not_finite_panics_too():
    assert reasons([1.0], accuracy=math.nan) == [NOT_FINITE]


@pytest.mark.parametrize(
    ("share_of_guessing", "panics"),
    [(1.0, True), (1.06, True), (0.94, True), (1.07, False), (0.93, False), (4.0, False)],
)
def test_lobotomy_is_a_host_that_had_learned_and_now_guesses(share_of_guessing, panics):
    guessing = math.log(10)
    learned = [0.5 * guessing] * 10
    expected = LOBOTOMY if panics else NONE
    assert reasons([*learned, share_of_guessing * guessing])[-1] == expected


def test_a_host_that_never_learned_may_guess_for_ever():
    guessing = math.log(10)
    assert set(reasons([guessing] * 40)) == {NONE}
    assert set(reasons([0.61 * guessing] * 20 + [guessing])) == {NONE}


def test_nine_epochs_are_too_few_to_call_it_a_lobotomy():
    guessing = math.log(10)
    assert reasons([0.1] * 9 + [guessing])[-1] == NONE
    assert reasons([0.1] * 10 + [guessing])[-1] == LOBOTOMY


def test_divergence_takes_three_consecutive_epochs_beyond_all_limits():
    assert reasons([1.0] * 10 + [13.0] * 3) == [NONE] * 12 + [DIVERGED]
    assert set(reasons([1.0] * 10 + [13.0, 13.0, 1.0, 13.0, 13.0])) == {NONE}
    assert set(reasons([1.0] * 9 + [13.0] * 3)) == {NONE}  # too few epochs to compare with
    assert set(reasons([1.0] * 10 + [11.9] * 9)) == {NONE}  # not beyond the fixed limit
    assert set(reasons([5.0] * 10 + [14.9] * 9)) == {NONE}  # not beyond three times the mean
    wild = [1.0, 9.0] * 5  # mean 5, deviation 4: 29 is the limit
    assert set(reasons(wild + [28.9] * 9)) == {NONE}
    assert reasons(wild + [29.1] * 3)[-1] == DIVERGED


def test_language_models_have_a_limit_of_their_own():
    losses = [1.0] * 10 + [14.0] * 3
    assert reasons(losses)[-1] == DIVERGED
    assert reasons(losses, tokens=True)[-1] == NONE
    assert reasons([1.0] * 10 + [15.1] * 3, tokens=True)[-1] == DIVERGED


def test_suspect_epochs_do_not_enter_the_window():
    """Else two losses of 40 among eighteen of 1 would lift the limit to 74, and 45 would look usual."""
    assert reasons([1.0] * 18 + [40.0, 40.0, 45.0])[-1] == DIVERGED


def test_only_the_last_twenty_epochs_count():
    guessing = math.log(10)
    assert reasons([0.1] * 30 + [2.0] * 20 + [guessing])[-1] == NONE
    assert reasons([2.0] * 30 + [0.1] * 20 + [guessing])[-1] == LOBOTOMY


def test_every_limit_comes_from_the_configuration():
    config = GovernorConfig(
        loss_max=2, window_epochs=4, samples_min=2, deviations_max=1, mean_ratio_max=1.5, strikes_max=1
    )
    assert reasons([1.0, 1.0, 2.1], config=config) == [NONE, NONE, DIVERGED]
    config = GovernorConfig(samples_min=2, learned_share_max=0.9, guessing_margin=0.2)
    assert reasons([2.0, 2.0, 1.9], config=config)[-1] == LOBOTOMY
    with pytest.raises(ConfigError, match="samples_min 10 would never be reached"):
        parse("environment: {governor: {window_epochs: 5}}")


class Literal:
    """The rules read from the module's documentation, for one lane and the default limits."""

    def __init__(self, classes):
        self.window: deque[float] = deque(maxlen=20)
        self.strikes, self.guessing = 0, math.log(classes)

    def watch(self, loss):
        if not math.isfinite(loss):
            self.strikes = 0
            return PanicReason.NOT_FINITE
        if len(self.window) >= 10:
            mean = sum(self.window) / len(self.window)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in self.window) / len(self.window))
            beyond = loss > 12 and loss > mean + 6 * deviation and loss > 3 * mean
            self.strikes = self.strikes + 1 if beyond else 0
            if mean < 0.6 * self.guessing and abs(loss - self.guessing) <= 0.065 * self.guessing:
                return PanicReason.LOBOTOMY
            if beyond:
                return PanicReason.DIVERGED if self.strikes >= 3 else PanicReason.NONE
        self.window.append(loss)
        return PanicReason.NONE


# Sequences in which calm stretches, guesses, explosions and nonsense alternate.
stretches = st.lists(
    st.tuples(st.sampled_from([0.3, 1.0, 2.3, 13.0, 50.0, math.nan, math.inf]), st.integers(1, 14)),
    min_size=1,
    max_size=8,
).map(lambda parts: [value * (1 + 0.01 * i) for value, length in parts for i in range(length)])


@given(st.lists(stretches, min_size=1, max_size=4))
@SMALL
def test_all_lanes_at_once_equal_the_literal_rules_lane_by_lane(curves):
    epochs = max(map(len, curves))
    curves = [(curve * epochs)[:epochs] for curve in curves]
    governor = Governor(len(curves), 10, CONFIG)
    got = [
        governor.watch(np.array(losses), np.full(len(curves), 40.0)).reason.tolist()
        for losses in zip(*curves, strict=True)
    ]
    for lane, curve in enumerate(curves):
        literal = Literal(10)
        assert [row[lane] for row in got] == [literal.watch(loss) for loss in curve]


@given(
    st.sampled_from([2, 3, 10, 64]),
    st.floats(1.0, 1.5),
    st.floats(0.0, 0.99),
    st.floats(0.5, 40.0),
    st.floats(0.0, 0.02),
    st.lists(st.floats(-0.1, 0.1), min_size=60, max_size=60),
)
@SMALL
def test_healthy_curves_never_panic(classes, start, floor, epochs_to_learn, overfitting, noise):
    """Guessing at first, learning at any speed to any level, 10 % noise, overfitting by up to 2 % an epoch."""
    guessing = math.log(classes)
    losses = [
        guessing
        * (floor + (start - floor) * math.exp(-t / epochs_to_learn))
        * (1 + overfitting) ** max(0, t - 40)
        * (1 + wobble)
        for t, wobble in enumerate(noise)
    ]
    assert set(reasons(losses, classes=classes)) == {NONE}


@given(st.lists(st.floats(2.46, 11.9), min_size=1, max_size=60))
@SMALL
def test_below_the_fixed_limit_and_off_the_guessing_loss_nothing_is_ever_a_panic(losses):
    assert set(reasons(losses)) == {NONE}


def test_a_lanes_history_is_its_own_and_reset_forgets_only_its_lanes():
    governor = Governor(2, 10, CONFIG)
    percent = np.full(2, 50.0)
    for _ in range(10):
        governor.watch(np.array([0.5, 2.0]), percent)
    guess = np.full(2, math.log(10))
    assert governor.watch(guess, percent).reason.tolist() == [LOBOTOMY, NONE]
    governor.reset(np.array([0]))
    assert governor.watch(guess, percent).reason.tolist() == [NONE, NONE]
    window = governor.state_dict()["window"]
    assert np.isfinite(window).sum(axis=1).tolist() == [1, 12]


def test_reset_takes_back_strikes():
    governor = Governor(1, 10, CONFIG)
    percent = np.full(1, 50.0)
    for loss in [1.0] * 10 + [13.0] * 2:
        governor.watch(np.array([loss]), percent)
    governor.reset(np.array([0]))
    for name, fresh in Governor(1, 10, CONFIG).state_dict().items():
        np.testing.assert_array_equal(governor.state_dict()[name], fresh)
    for loss in [1.0] * 10 + [13.0] * 2:
        assert not governor.watch(np.array([loss]), percent).panic[0]


def test_a_verdict_is_healthy_only_within_all_limits():
    governor = Governor(1, 10, CONFIG)
    verdicts = [
        governor.watch(np.array([loss]), np.array([50.0])) for loss in [1.0] * 10 + [13.0, 1.0, math.nan]
    ]
    assert [bool(verdict.healthy[0]) for verdict in verdicts] == [True] * 10 + [False, True, False]


@given(stretches, st.integers(0, 40))
@SMALL
def test_a_governor_goes_on_exactly_from_its_state(losses, cut):
    whole = Governor(1, 10, CONFIG)
    percent = np.full(1, 50.0)
    expected = [whole.watch(np.array([loss]), percent).reason.tolist() for loss in losses]
    first, second = Governor(1, 10, CONFIG), Governor(1, 10, CONFIG)
    got = [first.watch(np.array([loss]), percent).reason.tolist() for loss in losses[:cut]]
    second.load_state_dict(first.state_dict())
    first.watch(np.full(1, 99.0), percent)  # the state is a copy
    got += [second.watch(np.array([loss]), percent).reason.tolist() for loss in losses[cut:]]
    assert got == expected
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], value)


def test_another_governors_state_is_refused():
    state = Governor(2, 10, CONFIG).state_dict()
    with pytest.raises(ValueError, match=r"\[2, 20\] where \[3, 20\]"):
        Governor(3, 10, CONFIG).load_state_dict(state)


def test_snapshots_at_the_start_every_fifth_healthy_epoch_and_after_fossilisations():
    governor = Governor(6, 10, CONFIG)
    epoch = np.array([0, 5, 5, 7, 7, 10])
    healthy = np.array([False, True, False, True, False, True])
    fossilised = np.array([False, False, False, True, True, False])
    due = governor.is_snapshot_due(epoch, healthy, fossilised)
    assert due.tolist() == [True, True, False, True, True, True]
    nothing = np.zeros(1, dtype=np.bool_)
    assert [bool(governor.is_snapshot_due(np.array([e]), ~nothing, nothing)[0]) for e in range(11)] == [
        e % 5 == 0 for e in range(11)
    ]


def test_a_governor_that_is_switched_off_does_nothing():
    config = GovernorConfig(enabled=False)
    assert set(reasons([0.1] * 10 + [math.log(10), 90.0, 90.0, 90.0, math.nan], config=config)) == {NONE}
    governor = Governor(1, 10, config)
    yes = np.ones(1, dtype=np.bool_)
    assert not governor.is_snapshot_due(np.zeros(1, dtype=np.int64), yes, yes).any()


D, T, E, F = SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.EMBARGOED, SeedStage.FOSSILIZED


def approve(op, *, blueprint="conv_light", slot=0, stage=(D, D, D), loss=1.0, accuracy=50.0, seeds_max=3):
    action = np.zeros((1, len(HEADS)), dtype=np.int64)
    action[0, [OP, SLOT, BLUEPRINT]] = op, slot, BLUEPRINTS.index(blueprint)
    veto = preflight(
        action,
        loss=np.array([loss]),
        accuracy=np.array([accuracy]),
        stage=np.array([stage]),
        seeds_max=seeds_max,
    )
    return Veto(int(veto[0]))


def test_preflight_vetoes():
    germinate = Op.GERMINATE
    assert approve(germinate) == Veto.APPROVED
    assert approve(germinate, blueprint="noop") == Veto.INCOMPLETE
    assert approve(germinate, slot=1, stage=(D, T, D)) == Veto.SLOT_OCCUPIED
    assert approve(germinate, slot=1, stage=(D, F, D)) == Veto.SLOT_OCCUPIED
    assert approve(germinate, slot=1, stage=(D, E, D)) == Veto.SLOT_OCCUPIED
    assert approve(germinate, stage=(D, T, F), seeds_max=2) == Veto.NO_CAPACITY
    assert approve(germinate, stage=(D, T, E), seeds_max=2) == Veto.APPROVED
    for op in Op:
        for broken in ({"loss": math.nan}, {"accuracy": math.inf}):
            assert approve(op, **broken) == (Veto.APPROVED if op == Op.WAIT else Veto.NOT_FINITE)
        if op != germinate:  # the other operations have no such terms
            assert approve(op, blueprint="noop", stage=(T, T, T), seeds_max=1) == Veto.APPROVED


def test_preflight_judges_every_lane_by_itself():
    actions = np.zeros((3, len(HEADS)), dtype=np.int64)
    actions[:, OP], actions[:, BLUEPRINT], actions[:, SLOT] = Op.GERMINATE, 1, [0, 1, 1]
    vetoes = preflight(
        actions,
        loss=np.array([1.0, 1.0, np.nan]),
        accuracy=np.full(3, 50.0),
        stage=np.array([[T, D], [D, D], [D, D]]),
        seeds_max=2,
    )
    assert vetoes.tolist() == [Veto.SLOT_OCCUPIED, Veto.APPROVED, Veto.NOT_FINITE]


@given(st.lists(st.floats(-5, 30), min_size=1, max_size=40))
@SMALL
def test_an_episode_that_is_rolled_back_is_worth_minus_the_penalty(rewards):
    """Whatever it was paid before; the lane beside it keeps its reward."""
    paid = np.array([math.fsum(rewards[:-1]), 4.0])
    parts = {"shaping": np.array([rewards[-1], 1.0]), "accuracy": np.array([math.nan, 2.0])}
    settled = settle(parts, np.array([True, False]), paid, CONFIG)
    assert paid[0] + sum(part[0] for part in settled.values()) == pytest.approx(-10.0, abs=1e-9)
    assert [part[1] for part in settled.values()] == [1.0, 2.0, 0.0]
    kept = settle(parts, np.array([True, False]), paid, GovernorConfig(forfeit=False, penalty=3))
    assert [part[0] for part in kept.values()] == [0.0, 0.0, -3.0]


def test_settling_refuses_what_would_hide_a_mistake():
    zero, yes = np.zeros(1), np.ones(1, dtype=np.bool_)
    with pytest.raises(InvariantViolation, match="rename it"):
        settle({ROLLBACK_PART: zero}, yes, zero, CONFIG)
    with pytest.raises(InvariantViolation, match="not finite"):
        settle({"shaping": zero}, yes, np.array([math.nan]), CONFIG)
