"""What is legal now: packed masks, and which actions are accepted.

One table of legal (operation, slot) pairs is made from the lifecycle and, with `mask_gates`, the gates. The packed
mask and the acceptance of an action both come from it, so a mask never promises what a step refuses.

| operation | legal for |
|---|---|
| WAIT | always |
| GERMINATE | empty slots, below `max_seeds`, while no slot of the host is in a stage that blocks germination |
| SET_ALPHA_TARGET | seeds in BLENDING and HOLDING whose alpha stands still |
| PRUNE | live seeds of at least `prune_age_min` epochs whose alpha stands still |
| FOSSILIZE | seeds in HOLDING |
| ADVANCE | seeds in GERMINATED, TRAINING and BLENDING that do not move by themselves |

A choice of another head is legal or not whatever the slot, so that heads can be masked one by one: a blueprint is
offered where every slot of the host takes it. Styles and alpha targets are open while a seed may germinate or be
retargeted; else the only ones left are SIGMOID_ADD and 1. Speeds, curves and tempos are always open.

With `alpha_control: plain` less is open: the two ADD styles, target 1, speed 0, the LINEAR curve, no SET_ALPHA_TARGET.
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
    BLUEPRINT,
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
from esper_simic.errors import ConfigError
from esper_simic.growing_host.alpha import COMPOSITION_OF_STYLE, Composition
from esper_simic.growing_host.slots import SlotTable
from esper_simic.lifecycle import (
    BLOCKS_GERMINATION,
    LIVE,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    Bools,
    Event,
    gate_g0,
    moves_itself,
    open_gates,
)

NOOP: Final = BLUEPRINTS.index("noop")
"""A blueprint in name only: no seed germinates from it."""

RELEVANT: Final = np.array([[head in RELEVANT_HEADS[op] for head in HEADS] for op in Op])
"""`[operations, heads]` true where the head matters to the operation."""


def _plain_choices() -> dict[str, Bools]:
    open_ones: dict[str, list[int]] = {
        "style": [style for style in Style if COMPOSITION_OF_STYLE[style] == Composition.ADD],
        "alpha_target": [ALPHA_TARGETS.index(1.0)],
        "alpha_speed": [ALPHA_SPEED_EPOCHS.index(0)],
        "alpha_curve": [ALPHA_CURVES.index("LINEAR")],
    }
    table = {head: np.ones(CHOICES[head], dtype=np.bool_) for head in CHOICE_HEADS}
    for head, chosen in open_ones.items():
        table[head][:] = False
        table[head][chosen] = True
    return table


PLAIN_CHOICES: Final = _plain_choices()
"""Choices of each head `[CHOICES[head]]` that `alpha_control: plain` leaves open."""


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

    @property
    def forced(self) -> Bools:
        """`[E]` true where nothing but waiting is legal: such a step teaches a policy nothing."""
        return np.asarray(~self.op_slot[:, Op.WAIT + 1 :].any(axis=(1, 2)))


def legality(slots: SlotTable, config: EnvironmentConfig, takes: Bools | None = None) -> Legality:
    """Find out what is legal.

    Args:
        slots: The hosts' slots.
        config: Minimum ages, gates, blueprints, bound on seeds.
        takes: `[S, 13]` blueprints that each slot's features allow; all by default.

    Raises:
        ConfigError: No enabled blueprint fits every slot.
    """
    by_lifecycle = _by_lifecycle(slots, config)
    gates = np.ones_like(by_lifecycle)
    vitals = slots.vitals()
    gates[:, Op.ADVANCE] = open_gates(vitals, Event.ADVANCE, config)
    gates[:, Op.FOSSILIZE] = open_gates(vitals, Event.FOSSILIZE, config)
    op_slot = np.asarray(by_lifecycle & gates) if config.mask_gates else by_lifecycle
    shaping = op_slot[:, [Op.GERMINATE, Op.SET_ALPHA_TARGET]].any(axis=(1, 2))
    choices = _choices(np.asarray(shaping), _offered(config, takes))
    if config.alpha_control == "plain":
        choices = {head: allowed & PLAIN_CHOICES[head] for head, allowed in choices.items()}
    return Legality(op_slot, gates, choices)


def _by_lifecycle(slots: SlotTable, config: EnvironmentConfig) -> Bools:
    stage = slots.stage
    lanes, count = stage.shape
    table = np.zeros((lanes, len(Op), count), dtype=np.bool_)
    table[:, Op.WAIT] = True
    seeds_max = count if config.max_seeds is None else config.max_seeds
    room = (OCCUPIED[stage].sum(axis=1) < seeds_max) & ~BLOCKS_GERMINATION[stage].any(axis=1)
    table[:, Op.GERMINATE] = _has(stage, Event.GERMINATE) & room[:, None]
    if config.alpha_control == "full":
        table[:, Op.SET_ALPHA_TARGET] = _has(stage, Event.RETARGET) & ~slots.ramping
    table[:, Op.PRUNE] = LIVE[stage] & (slots.age >= config.prune_age_min) & ~slots.ramping
    table[:, Op.FOSSILIZE] = _has(stage, Event.FOSSILIZE)
    table[:, Op.ADVANCE] = _has(stage, Event.ADVANCE) & ~moves_itself(stage, config)
    return table


def _has(stage: NDArray[np.int8], event: Event) -> Bools:
    return np.asarray(NEXT_STAGE[stage, event] != NO_MOVE)


def _offered(config: EnvironmentConfig, takes: Bools | None) -> Bools:
    """Blueprints `[13]` that are enabled and fit every slot."""
    offered = np.zeros(len(BLUEPRINTS), dtype=np.bool_)
    offered[[BLUEPRINTS.index(name) for name in config.blueprints]] = True
    offered[NOOP] = False
    if takes is not None:
        offered &= takes.all(axis=0)
    if not offered.any():
        raise ConfigError(
            f"none of {', '.join(config.blueprints)} fits every slot of host {config.host!r}",
            "environment.blueprints",
        )
    return offered


def _choices(shaping: Bools, offered: Bools) -> dict[str, Bools]:
    """Legal choices of the heads beside operation and slot.

    Args:
        shaping: `[E]` true where a seed may germinate or be retargeted.
        offered: `[13]` blueprints.
    """
    choices = {head: np.ones((len(shaping), CHOICES[head]), dtype=np.bool_) for head in CHOICE_HEADS}
    choices["blueprint"][:] = offered
    choices["style"][:] = shaping[:, None]
    choices["style"][:, Style.SIGMOID_ADD] = True
    choices["alpha_target"][:] = shaping[:, None]
    choices["alpha_target"][:, ALPHA_TARGETS.index(1.0)] = True
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
    sane = gate_g0(actions[:, BLUEPRINT] != NOOP, np.ones_like(allowed))
    return np.asarray(allowed & (sane | (op != Op.GERMINATE)))


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
