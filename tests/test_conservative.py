"""Conservative mode: every trigger, entered once, left with hysteresis, undone exactly."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.config_safety import TRIGGER_NAMES, SafetyKeys
from esper_simic.conservative import (
    SLOW_STEPS,
    Averages,
    Conservative,
    Effects,
    Signals,
    batch_size,
    effects,
    observe,
    quiet,
    raised,
    with_loss,
    with_operations,
)
from esper_simic.safety_facts import (
    ConservativeModeEntered,
    ConservativeModeLeft,
    ConservativeTriggersAdded,
)

KEYS = SafetyKeys(conservative_quiet_steps=3, conservative_quiet_s=10)

RAISED = {
    "high_error_rate": Signals(error_rate=0.11),
    "memory_pressure": Signals(memory_fraction=0.91),
    "circuit_breaker_open": Signals(breaker_open=True, breakers_closed=False),
    "slo_violation": Signals(slo_violated=True),
    "training_instability": Signals(loss_ratio=2.1),
}
AT_THRESHOLD = {
    "high_error_rate": Signals(error_rate=0.1),
    "memory_pressure": Signals(memory_fraction=0.9),
    "circuit_breaker_open": Signals(breakers_closed=False),
    "training_instability": Signals(loss_ratio=2.0),
}
BELOW_LEAVING = {
    "high_error_rate": Signals(error_rate=0.09),
    "memory_pressure": Signals(memory_fraction=0.81),
    "training_instability": Signals(loss_ratio=1.8, grad_norm=9.0),
}


@pytest.mark.parametrize("name", TRIGGER_NAMES)
def test_each_trigger_enters_the_mode_by_itself(name):
    mode, facts = observe(KEYS, Conservative(), RAISED[name], 7.0)
    assert facts == [ConservativeModeEntered(triggers=(name,), entries=1)]
    assert mode == Conservative(active=True, triggers=(name,), entries=1, entered_s=7.0)


@pytest.mark.parametrize("name", TRIGGER_NAMES)
def test_each_trigger_can_be_switched_off(name):
    others = tuple(other for other in TRIGGER_NAMES if other != name)
    keys = SafetyKeys(conservative_mode_triggers=others)
    assert observe(keys, Conservative(), RAISED[name], 0.0) == (Conservative(), [])
    assert quiet(keys, RAISED[name])


@pytest.mark.parametrize("signals", [Signals(out_of_memory=True), Signals(grad_norm=10.1)])
def test_the_other_faces_of_two_triggers(signals):
    assert len(raised(KEYS, signals)) == 1


@pytest.mark.parametrize("name", AT_THRESHOLD)
def test_at_the_threshold_nothing_is_entered_and_nothing_is_left(name):
    assert raised(KEYS, AT_THRESHOLD[name]) == ()
    assert not quiet(KEYS, AT_THRESHOLD[name])


@pytest.mark.parametrize("name", BELOW_LEAVING)
def test_below_the_threshold_for_leaving_it_is_quiet(name):
    assert quiet(KEYS, BELOW_LEAVING[name])


def test_a_second_trigger_only_adds_its_name():
    mode, _ = observe(KEYS, Conservative(), RAISED["memory_pressure"], 0.0)
    mode, facts = observe(KEYS, mode, RAISED["memory_pressure"], 1.0)
    assert facts == []
    mode, facts = observe(KEYS, mode, RAISED["training_instability"], 2.0)
    assert facts == [ConservativeTriggersAdded(triggers=("training_instability",))]
    assert mode.triggers == ("memory_pressure", "training_instability")
    assert mode.entries == 1
    assert mode.entered_s == 0.0
    assert effects(KEYS, mode.active) == Effects(batch_factor=0.5, timeout_factor=1.5, lr_factor=0.5)


def test_it_is_left_after_enough_quiet_updates_and_seconds():
    mode, _ = observe(KEYS, Conservative(), RAISED["memory_pressure"], 0.0)
    for now_s in (1.0, 2.0, 3.0, 4.0, 10.9):
        mode, facts = observe(KEYS, mode, Signals(), now_s)
        assert facts == []
        assert mode.active
    mode, facts = observe(KEYS, mode, Signals(), 11.0)
    assert facts == [ConservativeModeLeft(triggers=("memory_pressure",), seconds=11.0, steps=6)]
    assert mode == Conservative(entries=1)
    assert effects(KEYS, mode.active) == Effects()


def test_seconds_alone_are_not_enough():
    mode, _ = observe(KEYS, Conservative(), RAISED["memory_pressure"], 0.0)
    for now_s in (1.0, 100.0):
        mode, _ = observe(KEYS, mode, Signals(), now_s)
    assert mode.active
    mode, _ = observe(KEYS, mode, Signals(), 101.0)
    assert not mode.active


@pytest.mark.parametrize("noise", [AT_THRESHOLD["memory_pressure"], RAISED["slo_violation"]])
def test_anything_that_is_not_quiet_begins_the_wait_anew(noise):
    mode, _ = observe(KEYS, Conservative(), RAISED["memory_pressure"], 0.0)
    for now_s in (1.0, 2.0, 20.0):
        before = mode
        mode, _ = observe(KEYS, before, noise, now_s)
        assert mode.quiet_steps == 0
        mode, _ = observe(KEYS, mode, Signals(), now_s)
        assert (mode.quiet_steps, mode.quiet_since_s) == (1, now_s)
    mode, _ = observe(KEYS, mode, Signals(), 29.0)
    mode, _ = observe(KEYS, mode, Signals(), 29.9)
    assert mode.active
    mode, _ = observe(KEYS, mode, Signals(), 30.0)
    assert not mode.active


SIGNALS = st.builds(
    Signals,
    error_rate=st.floats(0, 1),
    memory_fraction=st.floats(0, 1.2),
    out_of_memory=st.booleans(),
    breaker_open=st.booleans(),
    breakers_closed=st.booleans(),
    slo_violated=st.booleans(),
    loss_ratio=st.floats(0, 4),
    grad_norm=st.floats(0, 200) | st.just(float("inf")),
)


@given(
    st.lists(SIGNALS | st.just(Signals()), max_size=30),
    st.sampled_from([8, 16, 32, 64, 128, 256]),
)
def test_however_it_goes_effects_never_compound_and_are_undone(sequence, configured):
    mode, entries = Conservative(), 0
    for now_s, signals in enumerate(sequence):
        before = mode
        mode, facts = observe(KEYS, before, signals, float(now_s))
        entries += sum(isinstance(fact, ConservativeModeEntered) for fact in facts)
        assert mode.entries == entries
        assert mode.active == bool(mode.triggers)
        assert len(set(mode.triggers)) == len(mode.triggers)
        factors = effects(KEYS, mode.active)
        if mode.active:
            assert batch_size(configured, factors.batch_factor) == max(8, configured // 2)
            assert factors.lr_factor == 0.5
        else:
            assert factors == Effects()
            assert batch_size(configured, factors.batch_factor) == configured
        if facts and before.active:
            assert before.active != mode.active or mode.triggers != before.triggers
        again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(mode)), Conservative)
        assert repr(again) == repr(mode)


@given(st.sampled_from([8, 16, 32, 64, 128, 256]), st.floats(0.001, 1))
def test_every_batch_is_a_power_of_two_in_range_and_not_larger(configured, factor):
    size = batch_size(configured, factor)
    assert size in {8, 16, 32, 64, 128, 256}
    assert size <= configured
    assert size == 8 or configured * factor / 2 < size <= configured * factor
    assert batch_size(configured, 1.0) == configured


# -- averages ----------------------------------------------------------------------------------------------------------


def fold(losses, good=0.5):
    averages = Averages()
    for loss in losses:
        averages = with_loss(averages, loss, good)
    return averages


@given(st.lists(st.floats(0, 5), min_size=1, max_size=20))
def test_the_first_averages_are_plain_means(losses):
    averages = fold(losses)
    assert averages.fast == pytest.approx(sum(losses) / len(losses))
    assert averages.slow == pytest.approx(averages.fast)


def test_a_critic_that_begins_at_0_is_not_unstable():
    losses = [3.0 * 0.995**n for n in range(2000)]
    averages = Averages()
    for loss in losses:
        averages = with_loss(averages, loss, 0.5)
        assert averages.loss_ratio(0.5) <= 2.0


def test_a_loss_that_rises_to_three_times_the_usual_is():
    averages = fold([1.0] * 1500)
    ratios = []
    for _ in range(60):
        averages = with_loss(averages, 3.0, 0.5)
        ratios.append(averages.loss_ratio(0.5))
    assert ratios[0] < 2.0, "a single loss is noise"
    assert max(ratios) > 2.0


def test_below_a_good_loss_nothing_is_unstable():
    averages = fold([0.01] * 1000 + [0.4] * 100)
    assert averages.loss_ratio(0.5) < 1.0


def test_one_monstrous_loss_is_seen_and_soon_forgotten():
    averages = with_loss(fold([0.5] * 1500), 1e20, 0.5)
    assert averages.loss_ratio(0.5) > 2.0
    assert averages.slow < 0.51
    for _ in range(100):
        averages = with_loss(averages, 0.5, 0.5)
    assert averages.loss_ratio(0.5) < 1.8


def test_the_count_of_losses_is_bounded():
    assert fold([0.1] * (SLOW_STEPS + 50)).losses == SLOW_STEPS


def test_the_error_rate_is_a_share_of_recent_operations():
    averages = Averages()
    for _ in range(2000):
        averages = with_operations(averages, 1, 4)
    assert averages.error_rate == pytest.approx(0.25)
    for _ in range(500):
        averages = with_operations(averages, 0, 4)
    assert averages.error_rate < 0.01


def test_one_error_at_the_start_is_no_rate():
    averages = with_operations(Averages(), 1, 1)
    assert averages.error_rate == 1 / 20
