"""What masks promise, steps keep: random legal and illegal actions against the rules written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_simic.actions import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLUEPRINTS,
    CHOICE_HEADS,
    HEADS,
    OP,
    RELEVANT_HEADS,
    SLOT,
    MaskLayout,
    Op,
    Style,
    head_sizes,
)
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host import masks
from esper_simic.growing_host.controllers import RandomController, waiting
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.grafts import seeds_in_validation
from esper_simic.growing_host.slots import NO_BLUEPRINT, SlotTable
from esper_simic.lifecycle import BLENDED, TRANSITIONS, Event, SeedStage
from esper_simic.rewards import fossil_bonus

LANES = 4
SLOTS = 3
LAYOUT = MaskLayout(SLOTS)
SMALL = EnvironmentConfig(
    max_epochs=1000,
    training_epochs_min=1,
    train_batches=1,
    train_batch_size=4,
    validation_samples=10,
    prune_age_min=2,
    embargo_epochs=1,
)
EVENTS = {
    Op.GERMINATE: Event.GERMINATE,
    Op.ADVANCE: Event.ADVANCE,
    Op.FOSSILIZE: Event.FOSSILIZE,
    Op.PRUNE: Event.PRUNE,
}


def fresh(config=SMALL, lanes=LANES, seed=0):
    hosts = GrowingHosts(lanes, config, gamma=0.99)
    hosts.start(np.arange(lanes), [seed + lane for lane in range(lanes)], [0] * lanes)
    return hosts


def promised(view, lane, action):
    """What the packed mask says about an action: each relevant choice is legal."""
    op = Op(action[OP])
    if not view.mask[lane, LAYOUT.op][op]:
        return False
    if not view.mask[lane, LAYOUT.op_slot].reshape(len(Op), SLOTS)[op, action[SLOT]]:
        return False
    return all(
        view.mask[lane, LAYOUT.choices(head)][action[HEADS.index(head)]]
        for head in CHOICE_HEADS
        if head in RELEVANT_HEADS[op]
    )


def ruled(hosts, lane, op, slot, config):
    """The rules of each operation, literally, without gates."""
    stages = [SeedStage(int(stage)) for stage in hosts.slots.stage[lane]]
    stage = stages[slot]
    live = {SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING}
    match Op(op):
        case Op.WAIT:
            return True
        case Op.GERMINATE:
            blocked = {
                SeedStage.GERMINATED,
                SeedStage.TRAINING,
                SeedStage.PRUNED,
                SeedStage.EMBARGOED,
                SeedStage.RESETTING,
            }
            seeds = sum(s in live | {SeedStage.FOSSILIZED} for s in stages)
            room = seeds < (config.max_seeds or len(stages))
            return stage is SeedStage.DORMANT and room and not blocked.intersection(stages)
        case Op.ADVANCE:
            return stage in {SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING}
        case Op.FOSSILIZE:
            return stage is SeedStage.HOLDING
        case Op.PRUNE:
            still = hosts.slots.ramp_done[lane, slot] >= hosts.slots.ramp_total[lane, slot]
            return stage in live and hosts.slots.age[lane, slot] >= config.prune_age_min and still
        case Op.SET_ALPHA_TARGET:
            return False


def gated(hosts, lane, op, slot, config):
    """The permissive gates, literally."""
    slots = hosts.slots
    sound = (
        not slots.exploding[lane, slot] and slots.gradient_health[lane, slot] >= config.gradient_health_min
    )
    if op is Op.FOSSILIZE:
        return not slots.exploding[lane, slot] and np.isfinite(slots.contribution[lane, slot])
    if op is Op.ADVANCE and slots.stage[lane, slot] == SeedStage.TRAINING:
        return sound and slots.epochs_in_stage[lane, slot] >= config.training_epochs_min
    if op is Op.ADVANCE and slots.stage[lane, slot] == SeedStage.BLENDING:
        return slots.alpha[lane, slot] == 1.0
    return True


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    mask_gates=st.booleans(),
    max_seeds=st.sampled_from([None, 1, 2]),
    epochs=st.integers(1, 25),
    legal_share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_masks_agree_with_rules_and_with_what_steps_accept(seed, mask_gates, max_seeds, epochs, legal_share):
    config = SMALL.model_copy(update={"mask_gates": mask_gates, "max_seeds": max_seeds})
    hosts, rng, sizes = fresh(config, seed=seed), np.random.default_rng(seed), np.array(head_sizes(SLOTS))
    for _ in range(epochs):
        view = hosts.view()
        for lane in range(LANES):
            table = view.mask[lane, LAYOUT.op_slot].reshape(len(Op), SLOTS)
            for op in Op:
                for slot in range(SLOTS):
                    legal = ruled(hosts, lane, op, slot, config)
                    if mask_gates:
                        legal = legal and gated(hosts, lane, op, slot, config)
                    assert bool(table[op, slot]) == legal, (op, slot)
            assert (view.mask[lane, LAYOUT.op] == table.any(axis=1)).all()
        actions = rng.integers(0, sizes, (LANES, len(HEADS)))
        chosen = RandomController().act(view, rng.random((LANES, len(HEADS))))
        actions = np.where(rng.random((LANES, 1)) < legal_share, chosen, actions)
        expected = [
            promised(view, lane, actions[lane])
            and gated(hosts, lane, Op(actions[lane, OP]), actions[lane, SLOT], config)
            for lane in range(LANES)
        ]
        if mask_gates:
            assert expected == [promised(view, lane, actions[lane]) for lane in range(LANES)]
        before = hosts.slots.stage.copy()
        result = hosts.step(actions)
        assert result.succeeded.tolist() == expected
        check_moves(before, hosts.slots, actions, result.succeeded)


def check_moves(before, slots, actions, succeeded):
    """A slot moved by the action it was given, by time, or not at all."""
    for lane in range(LANES):
        for slot in range(SLOTS):
            reachable = {SeedStage(int(before[lane, slot]))}
            op = Op(actions[lane, OP])
            if succeeded[lane] and actions[lane, SLOT] == slot and op in EVENTS:
                reachable = {TRANSITIONS[reachable.pop(), EVENTS[op]]}
            after = SeedStage(int(slots.stage[lane, slot]))
            stage = reachable.pop()
            assert after in {stage, TRANSITIONS.get((stage, Event.EXPIRE))}
            if after is SeedStage.DORMANT:
                assert slots.blueprint[lane, slot] == NO_BLUEPRINT


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


def test_contribution_and_progress_are_differences_of_measured_accuracies():
    hosts, arrived = grown_to_holding(SMALL)
    germinated = hosts.slots.accuracy_at_germination[arrived, 2]
    fresh_accuracy = fresh(hosts.config, lanes=hosts.lanes).accuracy[arrived]
    np.testing.assert_array_equal(germinated, fresh_accuracy)
    np.testing.assert_allclose(hosts.slots.progress[arrived, 2], hosts.accuracy[arrived] - germinated)
    ablate = hosts.slots.stage == SeedStage.HOLDING
    seeds = seeds_in_validation(hosts.slots.stage, hosts.slots.blueprint, hosts.slots.alpha)
    without = hosts._validator.measure(seeds, ablate).accuracy_without[arrived, 2]
    np.testing.assert_allclose(hosts.slots.contribution[arrived, 2], hosts.accuracy[arrived] - without)


def test_germinating_into_an_occupied_slot_pays_nothing():
    hosts = fresh()
    give(hosts, op=Op.GERMINATE, slot=0)
    waited = fresh()
    give(waited, op=Op.GERMINATE, slot=0)
    refused = give(hosts, op=Op.GERMINATE, slot=0)
    plain = give(waited, op=Op.WAIT)
    assert not refused.succeeded.any()
    for name, part in plain.reward_parts.items():
        assert (refused.reward_parts[name] == part).all(), name


@pytest.mark.parametrize(
    "choice",
    [
        {"blueprint": BLUEPRINTS.index("noop")},
        {"blueprint": BLUEPRINTS.index("lora")},
        {"style": Style.LINEAR_MULTIPLY},
        {"style": Style.GATED_GATE},
        {"alpha_target": ALPHA_TARGETS.index(0.5)},
    ],
)
def test_a_masked_choice_of_a_relevant_head_refuses_the_action(choice):
    hosts = fresh()
    assert not give(hosts, op=Op.GERMINATE, slot=0, **choice).succeeded.any()
    assert (hosts.slots.stage == SeedStage.DORMANT).all()


def test_choices_of_irrelevant_heads_do_not_matter():
    hosts = fresh()
    plain = {"alpha_speed": ALPHA_SPEED_EPOCHS.index(8), "alpha_curve": ALPHA_CURVES.index("COSINE")}
    assert give(hosts, op=Op.GERMINATE, slot=0, **plain).succeeded.all()
    nonsense = {"blueprint": 0, "style": Style.GATED_GATE, "alpha_target": 0}
    assert give(hosts, op=Op.ADVANCE, slot=0, **nonsense).succeeded.all()


def test_set_alpha_target_is_never_legal():
    hosts = fresh()
    for op in (Op.GERMINATE, Op.ADVANCE, Op.ADVANCE, Op.WAIT, Op.WAIT, Op.WAIT, Op.ADVANCE):
        assert not hosts.view().mask[:, LAYOUT.op][:, Op.SET_ALPHA_TARGET].any()
        give(hosts, op=op, slot=0)


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
    hosts._act(actions, np.arange(8) == lane)
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


def test_a_move_the_table_lacks_is_a_contradiction():
    table = SlotTable(1, 1)
    with pytest.raises(InvariantViolation, match="DORMANT was given ADVANCE"):
        table.advance((np.array([0]), np.array([0])))


def test_per_head_masks_offer_some_slot_always():
    hosts = fresh()
    give(hosts, op=Op.GERMINATE, slot=1)
    lane_masks = masks.per_head(hosts.view().mask, SLOTS)[0]
    assert [len(mask) for mask in lane_masks] == list(head_sizes(SLOTS))
    assert lane_masks[SLOT].tolist() == [0, 1, 0]
    nothing = np.zeros((1, LAYOUT.size), dtype=np.int8)
    assert masks.per_head(nothing, SLOTS)[0][SLOT].tolist() == [1, 1, 1]
