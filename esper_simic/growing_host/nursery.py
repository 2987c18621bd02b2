"""What actions do to seeds: every move of the lifecycle together with the parameters and momentum that belong to it.

A seed's stage is `SlotTable`'s, its numbers are `ParameterBank`'s. Both are changed here, in one call, or not at all:
nobody else creates or removes a seed in either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import (
    ALPHA_CURVE,
    ALPHA_SPEED,
    ALPHA_TARGET,
    BLUEPRINT,
    BLUEPRINTS,
    OP,
    SLOT,
    STYLE,
    TEMPO,
    Op,
)
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.alpha import COMPOSITION_OF_STYLE, Composition
from esper_simic.growing_host.blueprints import Blueprint, blueprint, probe
from esper_simic.growing_host.compositions import (
    gate_parameter_count,
    initial_gate,
    initial_seed,
    seed_parameter_count,
)
from esper_simic.growing_host.parameters import ParameterBank
from esper_simic.growing_host.slots import At, SlotTable
from esper_simic.lifecycle import LIVE, Bools, Integers, SeedStage


class Nursery:
    """Carries out what masks have accepted.

    Args:
        slots: The slots of E hosts.
        bank: Their parameters.
    """

    def __init__(self, slots: SlotTable, bank: ParameterBank) -> None:
        self._slots, self._bank = slots, bank
        self._kind = bank.spec.kind

    def takes(self) -> Bools:
        """`[S, 13]` true where a blueprint takes the kind of features that the slot meets."""
        fits = np.zeros((len(self._bank.places), len(BLUEPRINTS)), dtype=np.bool_)
        for index, name in enumerate(BLUEPRINTS):
            fits[:, index] = name != "noop" and self._kind in blueprint(name).kinds
        return fits

    def act(
        self,
        actions: NDArray[np.int64],
        succeeded: Bools,
        *,
        epoch: Integers,
        chance: Sequence[np.random.Generator],
    ) -> None:
        """Carry out the accepted actions.

        Args:
            actions: `[E, 8]` in the order of `actions.HEADS`.
            succeeded: `[E]` true where the action was accepted.
            epoch: `[E]` epochs of the episode so far.
            chance: Each lane's stream for the starts of seeds.
        """
        op = actions[:, OP]

        def targets(wanted: Op) -> At:
            lanes = np.flatnonzero(succeeded & (op == wanted))
            return lanes, actions[lanes, SLOT]

        self._germinate(targets(Op.GERMINATE), actions, epoch, chance)
        self._prune(targets(Op.PRUNE), actions)
        self._retarget(targets(Op.SET_ALPHA_TARGET), actions, chance)
        self._slots.advance(targets(Op.ADVANCE))
        self._slots.fossilize(targets(Op.FOSSILIZE))

    def tick(self, config: EnvironmentConfig) -> None:
        """Let one epoch pass; what a scheduled prune has brought down to 0 goes."""
        self._forget(self._slots.tick(config).removed)

    def clear(self, lanes: NDArray[np.int64]) -> Bools:
        """Remove everything but fossils from some lanes, whatever it does.

        Returns:
            `[E, S]` true where a live seed was.
        """
        chosen = np.zeros(len(self._slots.stage), dtype=np.bool_)
        chosen[lanes] = True
        live = np.asarray(LIVE[self._slots.stage] & chosen[:, None])
        self._slots.remove(_where(live))
        # A copy that was put back may hold seeds that are long gone.
        self._forget(_where((self._slots.stage != SeedStage.FOSSILIZED) & chosen[:, None]))
        return live

    def _germinate(
        self,
        at: At,
        actions: NDArray[np.int64],
        epoch: Integers,
        chance: Sequence[np.random.Generator],
    ) -> None:
        lanes, slots = at
        counts = np.zeros(len(lanes), dtype=np.int64)
        for position, (lane, slot) in enumerate(zip(lanes.tolist(), slots.tolist(), strict=True)):
            chosen = blueprint(BLUEPRINTS[actions[lane, BLUEPRINT]])
            composition = Composition(int(COMPOSITION_OF_STYLE[actions[lane, STYLE]]))
            shape = self._bank.places[slot].shape
            probe(chosen, *shape, self._kind)
            row = initial_seed(chosen, composition, shape.channels, chance[lane], self._kind)
            self._bank.create_seed(lane, slot, row)
            counts[position] = len(row)
        self._slots.germinate(
            at,
            blueprint=actions[lanes, BLUEPRINT],
            parameters=counts,
            style=actions[lanes, STYLE],
            tempo=actions[lanes, TEMPO],
            alpha_target=actions[lanes, ALPHA_TARGET],
            epoch=epoch[lanes],
        )

    def _prune(self, at: At, actions: NDArray[np.int64]) -> None:
        lanes = at[0]
        removed = self._slots.prune(
            at, alpha_speed=actions[lanes, ALPHA_SPEED], alpha_curve=actions[lanes, ALPHA_CURVE]
        )
        self._forget(removed)

    def _retarget(self, at: At, actions: NDArray[np.int64], chance: Sequence[np.random.Generator]) -> None:
        lanes, slots = at
        counts = np.zeros(len(lanes), dtype=np.int64)
        for position, (lane, slot) in enumerate(zip(lanes.tolist(), slots.tolist(), strict=True)):
            chosen = blueprint(BLUEPRINTS[self._slots.blueprint[lane, slot]])
            composition = Composition(int(COMPOSITION_OF_STYLE[actions[lane, STYLE]]))
            counts[position] = self._recompose(lane, slot, chosen, composition, chance[lane])
        self._slots.retarget(
            at,
            style=actions[lanes, STYLE],
            alpha_target=actions[lanes, ALPHA_TARGET],
            alpha_speed=actions[lanes, ALPHA_SPEED],
            alpha_curve=actions[lanes, ALPHA_CURVE],
            parameters=counts,
        )

    def _recompose(
        self,
        lane: int,
        slot: int,
        chosen: Blueprint,
        composition: Composition,
        chance: np.random.Generator,
    ) -> int:
        """Give a seed the gate that its new composition needs, or take away the one it had; its parameter count."""
        channels = self._bank.slot_channels[slot]
        was_gated = self._slots.composition[lane, slot] == Composition.GATE
        is_gated = composition is Composition.GATE
        if is_gated != was_gated:
            gate = initial_gate(channels, chance) if is_gated else np.zeros(gate_parameter_count(channels))
            offset = chosen.parameter_count(channels, self._kind)
            self._bank.append_gate(lane, slot, offset, gate)
        return seed_parameter_count(chosen, composition, channels, self._kind)

    def _forget(self, at: At) -> None:
        for lane, slot in zip(*at, strict=True):
            self._bank.remove_seed(int(lane), int(slot))


def _where(chosen: Bools) -> At:
    lanes, slots = np.nonzero(chosen)
    return lanes, slots
