"""What a step does to whole hosts: moves, parameters and momentum change together; rewards pay what happened."""

from __future__ import annotations

import numpy as np
import pytest

from esper_simic.actions import ALPHA_SPEED_EPOCHS, HEADS, OP, SLOT, MaskLayout, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host import masks
from esper_simic.growing_host.controllers import RandomController, waiting
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.lifecycle import BLENDED, SeedStage
from esper_simic.rewards import fossil_bonus, potential
from supervisor import config_file

LANES = 4
LAYOUT = MaskLayout(3)
SMALL = EnvironmentConfig(
    max_epochs=1000,
    training_epochs_min=1,
    train_batches=1,
    train_batch_size=4,
    validation_samples=10,
    prune_age_min=2,
    embargo_epochs=1,
)


def fresh(config=SMALL, lanes=LANES, seed=0):
    hosts = GrowingHosts(lanes, config, gamma=0.99)
    hosts.start(np.arange(lanes), [seed + lane for lane in range(lanes)], [0] * lanes)
    return hosts


def give(hosts, **choices):
    """One step with the same action in every lane; heads by name, the rest plain."""
    actions = waiting(hosts.view())
    for head, choice in choices.items():
        actions[:, HEADS.index(head)] = choice
    return hosts.step(actions)


def grown_to_holding(config, lanes=8):
    """Hosts with a `conv_light` seed in the last slot, led to HOLDING by actions; and the lanes that got there."""
    hosts = fresh(config.model_copy(update={"train_batch_size": 32, "train_batches": 8}), lanes=lanes)
    for op in (Op.GERMINATE, *[Op.ADVANCE] * 2, *[Op.WAIT] * 2, Op.ADVANCE, *[Op.WAIT] * 6):
        give(hosts, op=op, slot=2)
    arrived = np.flatnonzero(hosts.slots.stage[:, 2] == SeedStage.HOLDING)
    assert len(arrived) >= lanes // 2, "hosts of these seeds no longer reach HOLDING"
    return hosts, arrived


def test_a_fossilize_that_happened_is_paid_by_what_the_controller_could_see():
    hosts, arrived = grown_to_holding(SMALL)
    contribution, progress = hosts.slots.contribution[:, 2].copy(), hosts.slots.progress[:, 2].copy()
    worthy = arrived[contribution[arrived] > 0]
    assert len(worthy)
    result = give(hosts, op=Op.FOSSILIZE, slot=2)
    assert result.succeeded[arrived].all()
    expected = fossil_bonus(contribution, progress, hosts.config.reward)
    np.testing.assert_allclose(result.reward_parts["fossil_bonus"][arrived], expected[arrived])
    assert (result.reward_parts["fossil_bonus"][worthy] > 0).all()
    assert (give(hosts, op=Op.WAIT).reward_parts["fossil_bonus"] == 0).all()


def test_a_refused_fossilize_is_not_rewarded_as_done():
    """The trap: the gate refuses a seed in HOLDING that contributes (gates not masked): no bonus, no potential."""
    config = SMALL.model_copy(update={"mask_gates": False})
    (hosts, arrived), (waited, _) = grown_to_holding(config), grown_to_holding(config)
    for each in (hosts, waited):
        each.slots.exploding[:] = True
        each._legal = masks.legality(each.slots, each.config)
    refused = give(hosts, op=Op.FOSSILIZE, slot=2)
    plain = give(waited, op=Op.WAIT)
    assert (hosts.slots.contribution[arrived, 2] > 0).any()
    assert not refused.succeeded.any()
    assert (hosts.slots.stage[arrived, 2] == SeedStage.HOLDING).all()
    assert (refused.reward_parts["fossil_bonus"] == 0).all()
    for name, part in plain.reward_parts.items():
        assert (refused.reward_parts[name] == part).all(), name


@pytest.mark.parametrize("slot", [0, 1], ids=["occupied", "empty, but another seed is not yet blended"])
def test_a_refused_germinate_is_not_rewarded_as_done(slot):
    """The trap: a germination was paid its potential, whether or not there is a seed."""
    (hosts, waited), first = (fresh(), fresh()), {"op": Op.GERMINATE, "slot": 0}
    for each in (hosts, waited):
        give(each, **first)
        give(each, op=Op.ADVANCE, slot=0)
    refused, plain = give(hosts, op=Op.GERMINATE, slot=slot), give(waited, op=Op.WAIT)
    assert not refused.succeeded.any()
    for name, part in plain.reward_parts.items():
        assert (refused.reward_parts[name] == part).all(), name


def test_a_pruned_slot_stays_closed_and_comes_back_empty():
    config = SMALL.model_copy(update={"embargo_epochs": 5})
    hosts = fresh(config)
    give(hosts, op=Op.GERMINATE, slot=0)
    give(hosts, op=Op.ADVANCE, slot=0)
    assert give(hosts, op=Op.PRUNE, slot=0).succeeded.all()
    seen = [SeedStage(int(hosts.slots.stage[0, 0]))]
    start = hosts.bank.slot_offsets[0]
    end = hosts.bank.slot_offsets[1]
    assert (
        hosts.bank.parameters[:, start:end].abs().sum() == hosts.bank.momentum[:, start:end].abs().sum() == 0
    )
    for _ in range(6):
        assert not hosts.view().mask[:, LAYOUT.op][:, Op.GERMINATE].any()
        give(hosts, op=Op.WAIT)
        seen.append(SeedStage(int(hosts.slots.stage[0, 0])))
    assert seen == [SeedStage.EMBARGOED] * 5 + [SeedStage.RESETTING, SeedStage.DORMANT]
    assert give(hosts, op=Op.GERMINATE, slot=0).succeeded.all()


def test_no_embargo_is_no_wait():
    hosts = fresh(SMALL.model_copy(update={"embargo_epochs": 0, "prune_age_min": 0}))
    give(hosts, op=Op.GERMINATE, slot=0)
    give(hosts, op=Op.PRUNE, slot=0)
    assert (hosts.slots.stage[:, 0] == SeedStage.RESETTING).all()


def test_a_whole_life_momentum_kept_at_fossilisation():
    hosts = fresh(SMALL.model_copy(update={"train_batch_size": 32, "train_batches": 4}), lanes=8)
    stages = []
    for op in (Op.GERMINATE, Op.ADVANCE, Op.ADVANCE, Op.WAIT, Op.WAIT, Op.ADVANCE):
        give(hosts, op=op, slot=2)
        stages.append(hosts.slots.stage[:, 2].copy())
    kept = np.flatnonzero(stages[-1] == SeedStage.HOLDING)
    assert len(kept) >= 4, "hosts of this seed no longer reach HOLDING"
    lane = kept[0]
    assert [s[lane] for s in stages] == [2, 3, 4, 4, 4, 6]
    assert np.isfinite(hosts.slots.contribution[lane, 2])
    assert hosts.parameters_added[lane] == 152
    start = hosts.bank.slot_offsets[2]
    before = hosts.bank.momentum[lane, start : start + 152].clone()
    actions = waiting(hosts.view())
    actions[:, OP], actions[:, SLOT] = Op.FOSSILIZE, 2
    hosts._nursery.act(actions, np.arange(8) == lane, epoch=hosts.epoch, chance=hosts._seed_chance)
    assert hosts.slots.stage[lane, 2] == SeedStage.FOSSILIZED
    assert (hosts.bank.momentum[lane, start : start + 152] == before).all()
    assert before.abs().sum() > 0


def test_a_germinated_seed_computes_nothing():
    grown, bare = fresh(), fresh()
    for _ in range(3):
        give(grown, op=Op.GERMINATE, slot=0)
        give(bare, op=Op.WAIT)
    count = grown.host_spec.parameter_count
    assert (grown.bank.parameters[:, :count] == bare.bank.parameters[:, :count]).all()
    assert (grown.accuracy == bare.accuracy).all()
    assert not BLENDED[grown.slots.stage].any()
    assert np.isnan(grown.slots.gradient_health).all()


def test_gates_open_though_nobody_looks_on():
    """The trap: gradients are measured in every epoch, so no seed waits for ever because telemetry is off."""
    hosts = fresh(SMALL.model_copy(update={"train_batch_size": 32, "train_batches": 8}))
    for op in (Op.GERMINATE, Op.ADVANCE):
        give(hosts, op=op, slot=2)
    assert np.isfinite(hosts.slots.gradient_health[:, 2]).all()
    assert np.isfinite(hosts.slots.gradient_ratio[:, 2]).all()
    give(hosts, op=Op.ADVANCE, slot=2)
    assert (hosts.slots.stage[:, 2] == SeedStage.BLENDING).any()


@pytest.mark.parametrize("speed", [3, 5])
def test_a_scheduled_prune_keeps_the_seed_still_and_clears_it_when_it_lands(speed):
    hosts, arrived = grown_to_holding(SMALL.model_copy(update={"alpha_control": "full"}))
    lane = arrived[0]
    start = hosts.bank.slot_offsets[2]

    def segment(rows):
        return rows[lane, start : start + int(count)].clone()

    count = hosts.slots.parameters[lane, 2]
    before = segment(hosts.bank.parameters)
    give(hosts, op=Op.PRUNE, slot=2, alpha_speed=ALPHA_SPEED_EPOCHS.index(speed))
    for _ in range(speed - 1):
        assert hosts.slots.frozen[lane, 2]
        assert (segment(hosts.bank.parameters) == before).all()
        assert before.abs().sum() > 0
        give(hosts, op=Op.WAIT)
    assert hosts.slots.stage[lane, 2] == SeedStage.PRUNED
    assert segment(hosts.bank.parameters).abs().sum() == segment(hosts.bank.momentum).abs().sum() == 0


def played(hosts, epochs, look=None):
    """Random growth; `look` sees the hosts before every step. Rewards of all steps."""
    rng = np.random.default_rng(4)
    rewards = []
    for _ in range(epochs):
        if look is not None:
            look(hosts)
        actions = RandomController().act(hosts.view(), rng.random((hosts.lanes, len(HEADS))))
        rewards.append(hosts.step(actions).reward)
    return np.array(rewards)


def test_whoever_looks_on_changes_nothing():
    """The trap: what is measured, and so what is decided, depended on whether anybody listened."""

    def look(hosts):
        hosts.observe()
        hosts.state_dict()
        for lane in range(LANES):
            hosts.picture(lane, hosts.accuracy)

    unprunable = SMALL.model_copy(update={"prune_age_min": 1000})
    unseen, seen = fresh(unprunable), fresh(unprunable)
    np.testing.assert_array_equal(played(unseen, 25), played(seen, 25, look))
    assert (unseen.bank.parameters == seen.bank.parameters).all()
    for name, array in unseen.slots.state().items():
        np.testing.assert_array_equal(array, seen.slots.state()[name], err_msg=name)
    assert BLENDED[unseen.slots.stage].any()


def test_no_step_and_no_episode_makes_what_is_kept_of_hosts_anew():
    """Parameters, momentum, statistics and everything known of slots stay where they were allocated."""
    hosts = fresh()

    def places():
        bank = hosts.bank
        tensors = [bank.parameters, bank.momentum]
        tensors += [tensor for each in bank.statistics for tensor in (each.mean, each.variance)]
        arrays = {name: getattr(hosts, name) for name in hosts._ARRAYS}
        arrays |= {name: getattr(hosts.slots, name) for name in hosts.slots.state()}
        return [tensor.data_ptr() for tensor in tensors], {name: id(array) for name, array in arrays.items()}

    before = places()
    played(hosts, 20)
    hosts.start(np.arange(2), [5, 6], [1, 1])
    played(hosts, 3)
    assert places() == before


def test_shaping_uses_the_gamma_that_the_host_was_given():
    """The learner's own; with another one, shaping would change which policy is best."""
    paid, reached = {}, 0.0
    for gamma in (0.9, 0.98):
        hosts = GrowingHosts(1, SMALL, gamma=gamma)
        hosts.start(np.arange(1), [0], [0])
        for op in (Op.GERMINATE, Op.ADVANCE):
            give(hosts, op=op, slot=1)
        paid[gamma] = give(hosts, op=Op.WAIT).reward_parts["shaping"][0]
        reached = potential(hosts.slots.stage, hosts.slots.epochs_in_stage, SMALL.reward)[0]
    # Of w (gamma phi(s') - phi(s)) the two differ by w 0.08 phi(s').
    assert reached > 2
    assert paid[0.98] - paid[0.9] == pytest.approx(SMALL.reward.potential_weight * 0.08 * reached)


@pytest.mark.parametrize(("preset", "horizon", "training"), [("digits", 40, 4), ("digits-spec", 60, 10)])
def test_the_presets_have_the_horizon_and_the_gate_that_they_promise(preset, horizon, training):
    environment = config_file.load(preset).environment
    assert (environment.max_epochs, environment.training_epochs_min) == (horizon, training)
    assert (environment.prune_age_min, environment.embargo_epochs, environment.gates) == (5, 5, "permissive")
    assert (environment.reward.mode, environment.reward.family) == ("basic", "contribution")
