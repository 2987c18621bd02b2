"""The slots of many hosts: what is in them, and how they move.

All fields are arrays `[E, S]` (lanes, slots). `SlotTable` is their only writer. A move goes through
`lifecycle.NEXT_STAGE`; a move that the table lacks is a contradiction, because masks are made from the same table.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import BLUEPRINTS, TEMPO_EPOCHS
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import ramp
from esper_simic.growing_host.training import GradientReport
from esper_simic.lifecycle import (
    COMPUTING,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    Event,
    Floats,
    Integers,
    SeedStage,
    expired,
)

NO_BLUEPRINT: Final = len(BLUEPRINTS)
"""Value of `SlotTable.blueprint` where a slot is empty."""


class SlotTable:
    """Everything known about the slots of E hosts.

    | field | meaning (`[E, S]` each) |
    |---|---|
    | `stage`, `epochs_in_stage` | `SeedStage`, ticks since it was entered |
    | `age` | ticks since germination |
    | `blueprint`, `parameters` | index into `actions.BLUEPRINTS`, parameter count of the seed |
    | `style`, `tempo_epochs` | how it is blended in: `Style`, length of the ramp |
    | `alpha`, `alpha_before` | weight of the seed now and one tick ago |
    | `alpha_target`, `ramp_done`, `ramp_total` | where the ramp leads, ticks done and in all (0: none) |
    | `accuracy_at_germination` | percent |
    | `contribution`, `contribution_before` | accuracy points, last and last but one measured; NaN: never |
    | `progress` | accuracy points since germination, when `contribution` was measured |
    | `epochs_since_contribution` | ticks since then; -1: never |
    | `gradient_norm`, `gradient_health`, `gradient_health_before` | last epoch's, NaN where never measured |
    | `vanishing`, `exploding` | what the last epoch's gradients did |
    """

    def __init__(self, lanes: int, slots: int) -> None:
        shape = (lanes, slots)
        self.stage = np.full(shape, SeedStage.DORMANT, dtype=np.int8)
        self.epochs_in_stage = np.zeros(shape, dtype=np.int64)
        self.age = np.zeros(shape, dtype=np.int64)
        self.blueprint = np.full(shape, NO_BLUEPRINT, dtype=np.int64)
        self.parameters = np.zeros(shape, dtype=np.int64)
        self.style = np.zeros(shape, dtype=np.int64)
        self.tempo_epochs = np.zeros(shape, dtype=np.int64)
        self.alpha = np.zeros(shape)
        self.alpha_before = np.zeros(shape)
        self.alpha_target = np.zeros(shape)
        self.ramp_done = np.zeros(shape, dtype=np.int64)
        self.ramp_total = np.zeros(shape, dtype=np.int64)
        self.accuracy_at_germination = np.zeros(shape)
        self.contribution = np.full(shape, np.nan)
        self.contribution_before = np.full(shape, np.nan)
        self.progress = np.full(shape, np.nan)
        self.epochs_since_contribution = np.full(shape, -1, dtype=np.int64)
        self.gradient_norm = np.zeros(shape)
        self.gradient_health = np.full(shape, np.nan)
        self.gradient_health_before = np.full(shape, np.nan)
        self.vanishing = np.zeros(shape, dtype=np.bool_)
        self.exploding = np.zeros(shape, dtype=np.bool_)

    @property
    def ramping(self) -> NDArray[np.bool_]:
        """`[E, S]` true while alpha still moves."""
        return self.ramp_done < self.ramp_total

    def reset(self, lanes: Integers) -> None:
        """Empty every slot of some lanes."""
        self.stage[lanes] = SeedStage.DORMANT
        self.epochs_in_stage[lanes] = 0
        self._forget_seed(np.index_exp[lanes])

    def germinate(
        self,
        at: tuple[Integers, Integers],
        blueprint: Integers,
        parameters: Integers,
        style: Integers,
        tempo: Integers,
    ) -> None:
        """Put seeds into empty slots.

        Args:
            at: Lanes and slots, `[n]` each, every lane at most once.
            blueprint: `[n]` index into `actions.BLUEPRINTS`.
            parameters: `[n]` parameter counts of the seeds.
            style: `[n]` values of `Style`.
            tempo: `[n]` index into `actions.TEMPO_EPOCHS`.
        """
        self.move(at, Event.GERMINATE)
        self.blueprint[at] = blueprint
        self.parameters[at] = parameters
        self.style[at] = style
        self.tempo_epochs[at] = np.asarray(TEMPO_EPOCHS)[tempo]

    def advance(self, at: tuple[Integers, Integers]) -> None:
        """Move seeds one stage on; entering BLENDING starts the ramp to alpha 1."""
        self.move(at, Event.ADVANCE)
        blending = self.stage[at] == SeedStage.BLENDING
        entering = (at[0][blending], at[1][blending])
        self.alpha_target[entering] = 1.0
        self.ramp_total[entering] = self.tempo_epochs[entering]

    def prune(self, at: tuple[Integers, Integers]) -> None:
        """Remove seeds at once; their slots stay closed for a while."""
        self.move(at, Event.PRUNE)
        self._forget_seed(at)

    def move(self, at: tuple[Integers, Integers], event: Event) -> None:
        """Apply one event to some slots.

        Raises:
            InvariantViolation: The lifecycle has no such move from one of the slots' stages.
        """
        successor = NEXT_STAGE[self.stage[at], event]
        if (successor == NO_MOVE).any():
            stage = SeedStage(int(self.stage[at][successor == NO_MOVE][0]))
            raise InvariantViolation(
                f"a slot in {stage.name} was given {event.name}, which the lifecycle lacks"
            )
        self.stage[at] = successor
        self.epochs_in_stage[at] = 0

    def tick(self, embargo_epochs: int) -> None:
        """Let one epoch pass: dwell times end, seeds age, ramps rise."""
        self.epochs_in_stage += self.stage != SeedStage.DORMANT
        self.age += OCCUPIED[self.stage]
        due = expired(self.stage, self.epochs_in_stage, embargo_epochs)
        while due.any():
            lanes, slots = np.nonzero(due)
            self.move((lanes, slots), Event.EXPIRE)
            due = expired(self.stage, self.epochs_in_stage, embargo_epochs)
        self.epochs_since_contribution += self.epochs_since_contribution >= 0
        np.copyto(self.alpha_before, self.alpha)
        rising = self.ramping
        if rising.any():
            self.ramp_done[rising] += 1
            self.alpha[rising] = ramp(self.style[rising], self.ramp_done[rising], self.ramp_total[rising])

    def record_gradients(self, report: GradientReport) -> None:
        """Note how sound the gradients of computing seeds were in the epoch that has just passed."""
        computing = COMPUTING[self.stage]
        self.gradient_health_before[computing] = self.gradient_health[computing]
        self.gradient_health[computing] = report.health[computing]
        self.gradient_norm[computing] = report.seed_norm[computing]
        self.vanishing[computing] = report.vanishing[computing]
        self.exploding[computing] = report.exploding[computing]

    def record_contributions(self, accuracy: Floats, accuracy_without: Floats) -> None:
        """Note what seeds were worth in the validation that has just passed.

        Args:
            accuracy: `[E]` percent.
            accuracy_without: `[E, S]` percent with that seed off; NaN where not measured.
        """
        measured = np.isfinite(accuracy_without)
        everyone = accuracy[:, None]
        self.contribution_before[measured] = self.contribution[measured]
        self.contribution[measured] = (everyone - accuracy_without)[measured]
        self.progress[measured] = (everyone - self.accuracy_at_germination)[measured]
        self.epochs_since_contribution[measured] = 0

    def _forget_seed(self, at: tuple[Integers | slice, ...]) -> None:
        self.blueprint[at] = NO_BLUEPRINT
        for cleared in (
            self.age,
            self.parameters,
            self.style,
            self.tempo_epochs,
            self.alpha,
            self.alpha_before,
            self.alpha_target,
            self.ramp_done,
            self.ramp_total,
            self.accuracy_at_germination,
            self.gradient_norm,
        ):
            cleared[at] = 0
        for unmeasured in (
            self.contribution,
            self.contribution_before,
            self.progress,
            self.gradient_health,
            self.gradient_health_before,
        ):
            unmeasured[at] = np.nan
        self.epochs_since_contribution[at] = -1
        self.vanishing[at] = False
        self.exploding[at] = False
