"""The action space of growth control: eight factored heads, their masks and their causal relevance.

An action is one choice per head, in the order of `HEADS`. The operation is chosen first; which of the other heads
matter is decided by it (`RELEVANT_HEADS`), and only those enter log-probabilities, entropies and losses.

A state's legal choices travel as one flat 0/1 vector, the *packed mask*: operations, then for each operation its own
slots, then the choices of each other head (`MaskLayout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class Op(IntEnum):
    """What a controller can do in one epoch."""

    WAIT = 0
    GERMINATE = 1
    SET_ALPHA_TARGET = 2
    PRUNE = 3
    FOSSILIZE = 4
    ADVANCE = 5


class Style(IntEnum):
    """How a seed is blended in: ramp and composition."""

    LINEAR_ADD = 0
    LINEAR_MULTIPLY = 1
    SIGMOID_ADD = 2
    GATED_GATE = 3


BLUEPRINTS: Final = (
    "noop",
    "conv_light",
    "attention",
    "norm",
    "depthwise",
    "bottleneck",
    "conv_small",
    "conv_heavy",
    "lora",
    "lora_large",
    "mlp_small",
    "mlp",
    "flex_attention",
)
TEMPO_EPOCHS: Final = (3, 5, 8)
ALPHA_TARGETS: Final = (0.5, 0.7, 1.0)
ALPHA_SPEED_EPOCHS: Final = (0, 3, 5, 8)
ALPHA_CURVES: Final = ("LINEAR", "COSINE", "SIGMOID_GENTLE", "SIGMOID", "SIGMOID_SHARP")

HEADS: Final = ("slot", "blueprint", "style", "tempo", "alpha_target", "alpha_speed", "alpha_curve", "op")
SLOT, BLUEPRINT, STYLE, TEMPO, ALPHA_TARGET, ALPHA_SPEED, ALPHA_CURVE, OP = range(len(HEADS))

CHOICE_HEADS: Final = ("blueprint", "style", "tempo", "alpha_target", "alpha_speed", "alpha_curve")
"""The heads whose choices do not depend on the number of slots, in `HEADS` order."""

CHOICES: Final = {
    "blueprint": len(BLUEPRINTS),
    "style": len(Style),
    "tempo": len(TEMPO_EPOCHS),
    "alpha_target": len(ALPHA_TARGETS),
    "alpha_speed": len(ALPHA_SPEED_EPOCHS),
    "alpha_curve": len(ALPHA_CURVES),
    "op": len(Op),
}

RELEVANT_HEADS: Final[dict[Op, frozenset[str]]] = {
    Op.WAIT: frozenset({"op"}),
    Op.GERMINATE: frozenset({"op", "slot", "blueprint", "style", "tempo", "alpha_target"}),
    Op.SET_ALPHA_TARGET: frozenset({"op", "slot", "style", "alpha_target", "alpha_speed", "alpha_curve"}),
    Op.PRUNE: frozenset({"op", "slot", "alpha_speed", "alpha_curve"}),
    Op.FOSSILIZE: frozenset({"op", "slot"}),
    Op.ADVANCE: frozenset({"op", "slot"}),
}


def head_sizes(slots: int) -> tuple[int, ...]:
    """Number of choices of each head, in `HEADS` order: the `nvec` of the `MultiDiscrete` action space."""
    return tuple(slots if head == "slot" else CHOICES[head] for head in HEADS)


@dataclass(frozen=True, slots=True)
class MaskLayout:
    """Where each mask lies in the packed mask of a host with `slots` slots."""

    slots: int

    @property
    def op(self) -> slice:
        """`[6]`: operations with at least one legal target."""
        return slice(0, len(Op))

    @property
    def op_slot(self) -> slice:
        """`[6 * slots]`, to be viewed as `[6, slots]`: legal slots of each operation (WAIT: all ones)."""
        return slice(len(Op), len(Op) * (1 + self.slots))

    def choices(self, head: str) -> slice:
        """`[CHOICES[head]]`: legal choices of one of `CHOICE_HEADS`."""
        start = self.op_slot.stop
        for name in CHOICE_HEADS:
            if name == head:
                return slice(start, start + CHOICES[name])
            start += CHOICES[name]
        raise KeyError(head)

    @property
    def size(self) -> int:
        """Length of the packed mask."""
        return len(Op) * (1 + self.slots) + sum(CHOICES[head] for head in CHOICE_HEADS)
