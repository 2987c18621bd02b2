"""What masks promise, steps keep: random legal and illegal actions against the rules written out one by one."""

from __future__ import annotations

import itertools

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
    CHOICES,
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
from esper_simic.errors import ConfigError
from esper_simic.growing_host import masks
from esper_simic.growing_host.slots import SlotTable
from esper_simic.lifecycle import SeedStage
from tests.growing_host.literal_slots import Episode, promised
from tests.growing_host.test_slots import CONFIG, FULL, HERE, RULES, grown, prune, retarget

SLOTS = 3
LAYOUT = MaskLayout(SLOTS)
PLAIN = CONFIG.model_copy(update={"alpha_control": "plain"})
PLAIN_OPEN: dict[str, list[int]] = {
    "style": [Style.LINEAR_ADD, Style.SIGMOID_ADD],
    "alpha_target": [ALPHA_TARGETS.index(1.0)],
    "alpha_speed": [ALPHA_SPEED_EPOCHS.index(0)],
    "alpha_curve": [ALPHA_CURVES.index("LINEAR")],
}


def literal_choices(config, host):
    """Legal choices of the heads beside operation and slot, by their rules."""
    shaping = any(
        host.legal(op, slot) and (not config.mask_gates or host.opens(op, slot))
        for op in (Op.GERMINATE, Op.SET_ALPHA_TARGET)
        for slot in range(len(host.slots))
    )
    legal = {head: list(range(CHOICES[head])) for head in CHOICE_HEADS}
    legal["blueprint"] = [BLUEPRINTS.index(name) for name in BLUEPRINTS if name in config.blueprints]
    if config.alpha_control == "plain":
        legal |= PLAIN_OPEN
    if not shaping:
        legal |= {"style": [Style.SIGMOID_ADD], "alpha_target": [ALPHA_TARGETS.index(1.0)]}
    return legal


@settings(max_examples=50)
@given(rules=RULES, seed=st.integers(0, 10**6), legal_share=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_masks_agree_with_the_rules_and_with_what_steps_accept(rules, seed, legal_share):
    config = CONFIG.model_copy(update=rules)
    episode = Episode(config, seed=seed)
    for _ in range(25):
        legal = episode.legality()
        packed = masks.pack(legal)
        for lane, host in enumerate(episode.hosts):
            table = packed[lane, LAYOUT.op_slot].reshape(len(Op), SLOTS)
            for op, slot in itertools.product(Op, range(SLOTS)):
                wanted = host.legal(op, slot) and (not config.mask_gates or host.opens(op, slot))
                assert bool(table[op, slot]) == wanted, (op, slot)
            assert (packed[lane, LAYOUT.op] == table.any(axis=1)).all()
            for head, choices in literal_choices(config, host).items():
                assert np.flatnonzero(packed[lane, LAYOUT.choices(head)]).tolist() == choices, head
            assert legal.forced[lane] == (not table[1:].any())
        actions = episode.random_action(legal_share)
        expected = [
            promised(packed[lane], SLOTS, actions[lane])
            and host.opens(Op(actions[lane, OP]), int(actions[lane, SLOT]))
            for lane, host in enumerate(episode.hosts)
        ]
        if config.mask_gates:
            assert expected == [promised(packed[lane], SLOTS, actions[lane]) for lane in range(len(expected))]
        assert episode.step(actions).tolist() == expected


@settings(max_examples=30)
@given(rules=RULES, seed=st.integers(0, 10**6), epochs=st.integers(0, 25))
def test_whatever_is_promised_can_be_done_and_choices_that_do_not_matter_do_not(rules, seed, epochs):
    """Every legal (operation, slot) with random legal choices; irrelevant heads hold anything, legal or not."""
    config = CONFIG.model_copy(update=rules | {"mask_gates": True})
    reached = Episode(config, lanes=1, seed=seed)
    for _ in range(epochs):
        reached.step(reached.random_action(1.0))
    legal = reached.legality()
    for op, slot in np.argwhere(legal.op_slot[0]).tolist():
        tables = []
        for noise in (0, 1):
            episode = Episode(config, lanes=1, seed=seed)
            for _ in range(epochs):
                episode.step(episode.random_action(1.0))
            chance, other = np.random.default_rng(seed), np.random.default_rng(seed + noise)
            action = np.array([other.integers(0, size) for size in head_sizes(SLOTS)])
            action[OP], action[SLOT] = op, slot if op != Op.WAIT else action[SLOT]
            for head in CHOICE_HEADS:
                allowed = np.flatnonzero(legal.choices[head][0])
                choice = chance.choice(allowed)
                if head in RELEVANT_HEADS[Op(op)]:
                    action[HEADS.index(head)] = choice
            assert episode.step(action[None]).all()
            tables.append(episode.table.state())
        for name, value in tables[0].items():
            np.testing.assert_equal(value, tables[1][name], err_msg=name)


def test_random_episodes_get_everywhere():
    """The laws above say little if episodes never get to what they speak of."""
    stages, modes, done, forced = set(), set(), set(), 0
    for seed in range(6):
        episode = Episode(CONFIG, seed=seed)
        for _ in range(40):
            forced += int(episode.legality().forced.sum())
            actions = episode.random_action(0.9)
            before = episode.table.stage[np.arange(3), actions[:, SLOT]]
            accepted = episode.step(actions)
            done |= {
                (SeedStage(int(s)), Op(a))
                for s, a in zip(before[accepted], actions[accepted, OP], strict=True)
            }
            stages |= set(episode.table.stage.ravel().tolist())
            modes |= set(episode.table.alpha_mode.ravel().tolist())
    assert stages == {int(stage) for stage in SeedStage}
    assert modes == {0, 1, 2}
    assert forced > 0
    assert {move for move in done if move[1] != Op.WAIT} == {
        (SeedStage.DORMANT, Op.GERMINATE),
        (SeedStage.GERMINATED, Op.ADVANCE),
        (SeedStage.TRAINING, Op.ADVANCE),
        (SeedStage.BLENDING, Op.ADVANCE),
        (SeedStage.HOLDING, Op.FOSSILIZE),
        (SeedStage.BLENDING, Op.SET_ALPHA_TARGET),
        (SeedStage.HOLDING, Op.SET_ALPHA_TARGET),
        *((stage, Op.PRUNE) for stage in (SeedStage.GERMINATED, SeedStage.TRAINING)),
        *((stage, Op.PRUNE) for stage in (SeedStage.BLENDING, SeedStage.HOLDING)),
    }


def op_mask(table, config=CONFIG):
    """Operations that are legal in the only slot of the only host."""
    return [Op(op) for op in np.flatnonzero(masks.legality(table, config).op_slot[0, :, 0]).tolist()]


def test_while_alpha_comes_down_to_a_prune_nothing_but_waiting_is_legal():
    table = grown(SeedStage.HOLDING)
    assert op_mask(table) == [Op.WAIT, Op.SET_ALPHA_TARGET, Op.PRUNE]
    prune(table, speed=1)
    for _ in range(3):
        assert op_mask(table) == [Op.WAIT]
        table.tick(CONFIG)
    assert table.stage[0, 0] == SeedStage.PRUNED
    assert masks.legality(table, CONFIG).forced.all()


def test_a_partial_target_closes_the_way_on_until_it_is_led_to_1():
    table = grown(SeedStage.BLENDING, target=0)
    assert Op.ADVANCE not in op_mask(table)
    retarget(table, target=FULL)
    assert Op.ADVANCE in op_mask(table)


def test_a_young_seed_is_not_pruned():
    config, table = CONFIG.model_copy(update={"prune_age_min": 5}), grown(SeedStage.GERMINATED)
    legal = []
    for _ in range(6):
        legal.append(Op.PRUNE in op_mask(table, config))
        table.tick(config)
    assert legal == [False] * 5 + [True]


def test_max_seeds_counts_the_living_and_the_kept():
    table = SlotTable(1, 3)
    table.stage[0] = [SeedStage.FOSSILIZED, SeedStage.HOLDING, SeedStage.DORMANT]
    for seeds_max, legal in ((None, True), (3, True), (2, False)):
        config = CONFIG.model_copy(update={"max_seeds": seeds_max})
        assert masks.legality(table, config).op_slot[0, Op.GERMINATE].tolist() == [False, False, legal]


def test_a_blueprint_is_offered_where_every_slot_takes_it():
    takes = np.zeros((SLOTS, len(BLUEPRINTS)), dtype=np.bool_)
    takes[:, BLUEPRINTS.index("noop")] = True
    for name, slots in (("norm", [0, 1, 2]), ("attention", [0, 2]), ("lora", [0, 1, 2])):
        takes[slots, BLUEPRINTS.index(name)] = True
    legal = masks.legality(SlotTable(2, SLOTS), EnvironmentConfig(), takes)
    offered = [BLUEPRINTS[index] for index in np.flatnonzero(legal.choices["blueprint"][1])]
    assert offered == ["norm"], "attention fits two slots of three, lora is not enabled, noop is none"
    with pytest.raises(ConfigError, match="fits every slot"):
        masks.legality(SlotTable(2, SLOTS), EnvironmentConfig(blueprints=("attention",)), takes)


def test_noop_is_refused():
    episode = Episode(CONFIG, lanes=1)
    action = episode.random_action(0.0) * 0
    action[0, OP] = Op.GERMINATE
    assert not episode.step(action).any()


@pytest.mark.parametrize("head", PLAIN_OPEN)
def test_plain_control_leaves_one_way_of_blending_open(head):
    for table in (SlotTable(1, 1), grown(SeedStage.HOLDING)):
        legal = masks.legality(table, PLAIN)
        assert set(np.flatnonzero(legal.choices[head][0])) <= set(PLAIN_OPEN[head])
        assert not legal.op_slot[0, Op.SET_ALPHA_TARGET].any()
    assert (
        np.flatnonzero(masks.legality(SlotTable(1, 1), PLAIN).choices[head][0]).tolist() == PLAIN_OPEN[head]
    )


def test_per_head_masks_offer_some_slot_always():
    table = SlotTable(1, SLOTS)
    table.stage[0, 1] = SeedStage.GERMINATED
    lane_masks = masks.per_head(masks.pack(masks.legality(table, CONFIG)), SLOTS)[0]
    assert [len(mask) for mask in lane_masks] == list(head_sizes(SLOTS))
    assert lane_masks[SLOT].tolist() == [0, 1, 0]
    nothing = np.zeros((1, LAYOUT.size), dtype=np.int8)
    assert masks.per_head(nothing, SLOTS)[0][SLOT].tolist() == [1, 1, 1]


def test_what_moves_by_itself_is_not_advanced_by_hand():
    table = grown(SeedStage.GERMINATED)
    config = CONFIG.model_copy(update={"auto_forward_g1": True})
    assert op_mask(table) == [Op.WAIT, Op.ADVANCE]
    assert op_mask(table, config) == [Op.WAIT]
    table.tick(config)
    assert table.stage[HERE] == SeedStage.TRAINING
