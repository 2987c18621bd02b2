"""What is legal now: packed masks, and which actions are accepted.

One table of legal (operation, slot) pairs is made from the lifecycle and, with `mask_gates`, the gates. The packed
mask and the acceptance of an action both come from it, so a mask never promises what a step refuses.

This version blends by ADD with LINEAR or SIGMOID ramps to alpha 1, and prunes at once: the other styles, alpha
targets, speeds and curves are masked, and SET_ALPHA_TARGET with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

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
)
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.alpha import SUPPORTED_STYLES
from esper_simic.growing_host.slots import SlotTable
from esper_simic.lifecycle import (
    BLOCKS_GERMINATION,
    LIVE,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    Bools,
    Event,
    SeedStage,
    gate_g1,
    gate_g2,
    gate_g3,
    gate_g5,
)

RELEVANT: Final = np.array([[head in RELEVANT_HEADS[op] for head in HEADS] for op in Op])
"""`[operations, heads]` true where the head matters to the operation."""


@dataclass(frozen=True, slots=True)
class Legality:
    """What E hosts with S slots may do now.

    | field | shape | meaning |
    |---|---|---|
    | `op_slot` | `[E, 6, S]` | legal slots of each operation by lifecycle (and gates, if they are masked); WAIT: all |
    | `gates` | `[E, 6, S]` | what passes its gate; an accepted action passes both |
    | `choices` | head to `[E, CHOICES[head]]` | legal choices of the other heads |
    """

    op_slot: Bools
    gates: Bools
    choices: dict[str, Bools]


def legality(slots: SlotTable, config: EnvironmentConfig) -> Legality:
    """Find out what is legal.

    Args:
        slots: The hosts' slots.
        config: Minimum ages, gates, blueprints, bound on seeds.
    """
    by_lifecycle = _by_lifecycle(slots, config)
    gates = np.ones_like(by_lifecycle)
    gates[:, Op.ADVANCE] = _advance_gate(slots, config)
    gates[:, Op.FOSSILIZE] = gate_g5(slots.contribution, slots.gradient_health, slots.exploding)
    op_slot = by_lifecycle & gates if config.mask_gates else by_lifecycle
    return Legality(op_slot, gates, _choices(np.asarray(op_slot[:, Op.GERMINATE].any(axis=1)), config))


def _by_lifecycle(slots: SlotTable, config: EnvironmentConfig) -> Bools:
    stage = slots.stage
    lanes, count = stage.shape
    table = np.zeros((lanes, len(Op), count), dtype=np.bool_)
    table[:, Op.WAIT] = True
    seeds_max = count if config.max_seeds is None else config.max_seeds
    room = (OCCUPIED[stage].sum(axis=1) < seeds_max) & ~BLOCKS_GERMINATION[stage].any(axis=1)
    table[:, Op.GERMINATE] = (NEXT_STAGE[stage, Event.GERMINATE] != NO_MOVE) & room[:, None]
    table[:, Op.ADVANCE] = NEXT_STAGE[stage, Event.ADVANCE] != NO_MOVE
    table[:, Op.FOSSILIZE] = NEXT_STAGE[stage, Event.FOSSILIZE] != NO_MOVE
    table[:, Op.PRUNE] = LIVE[stage] & (slots.age >= config.prune_age_min) & ~slots.ramping
    return table


def _advance_gate(slots: SlotTable, config: EnvironmentConfig) -> Bools:
    """The gate in front of each slot's next stage."""
    g2 = gate_g2(
        slots.epochs_in_stage,
        slots.gradient_health,
        slots.exploding,
        training_epochs_min=config.training_epochs_min,
        gradient_health_min=config.gradient_health_min,
    )
    g3 = gate_g3(slots.alpha, slots.alpha_target, slots.ramping)
    after_training = np.where(slots.stage == SeedStage.TRAINING, g2, g3)
    return np.where(slots.stage == SeedStage.GERMINATED, gate_g1(slots.stage), after_training)


def _choices(can_germinate: Bools, config: EnvironmentConfig) -> dict[str, Bools]:
    lanes = len(can_germinate)
    choices = {head: np.zeros((lanes, CHOICES[head]), dtype=np.bool_) for head in CHOICE_HEADS}
    choices["blueprint"][:, [BLUEPRINTS.index(name) for name in config.blueprints]] = True
    for style in SUPPORTED_STYLES:
        choices["style"][:, style] = can_germinate
    choices["style"][:, Style.SIGMOID_ADD] = True
    choices["tempo"][:] = True
    choices["alpha_target"][:, ALPHA_TARGETS.index(1.0)] = True
    choices["alpha_speed"][:, ALPHA_SPEED_EPOCHS.index(0)] = True
    choices["alpha_curve"][:, ALPHA_CURVES.index("LINEAR")] = True
    return choices


def pack(legal: Legality) -> NDArray[np.int8]:
    """The packed mask, `[E, MaskLayout(S).size]` int8."""
    lanes, _, count = legal.op_slot.shape
    layout = MaskLayout(count)
    packed = np.zeros((lanes, layout.size), dtype=np.int8)
    packed[:, layout.op] = legal.op_slot.any(axis=2)
    packed[:, layout.op_slot] = legal.op_slot.reshape(lanes, -1)
    for head, allowed in legal.choices.items():
        packed[:, layout.choices(head)] = allowed
    return packed


def accepted(legal: Legality, actions: NDArray[np.int64]) -> Bools:
    """Which actions happen: legal for their slot, past their gate, and legal in every head that matters to them.

    Args:
        legal: What is legal.
        actions: `[E, 8]` in the order of `actions.HEADS`, each in its range.

    Returns:
        `[E]` bool.
    """
    lanes = np.arange(len(actions))
    op, slot = actions[:, OP], actions[:, SLOT]
    allowed = legal.op_slot[lanes, op, slot] & legal.gates[lanes, op, slot]
    for index, head in enumerate(HEADS):
        if head in legal.choices:
            allowed &= legal.choices[head][lanes, actions[:, index]] | ~RELEVANT[op, index]
    return np.asarray(allowed)


def per_head(packed: NDArray[np.int8], slots: int) -> tuple[tuple[NDArray[np.int8], ...], ...]:
    """Masks as `MultiDiscrete.sample(mask)` takes them: for each lane, for each head, its legal choices.

    Which slots are legal depends on the operation; the slot head's mask is their union over the operations that need
    a slot (all slots where none is legal), so a sample from these masks may still be refused.
    """
    layout = MaskLayout(slots)
    by_op = packed[:, layout.op_slot].reshape(len(packed), len(Op), slots)
    union = by_op[:, 1:].max(axis=1)
    union[union.max(axis=1) == 0] = 1
    columns = {head: packed[:, layout.choices(head)] for head in CHOICE_HEADS}
    columns |= {"slot": union, "op": packed[:, layout.op]}
    return tuple(zip(*(columns[head] for head in HEADS), strict=True))
