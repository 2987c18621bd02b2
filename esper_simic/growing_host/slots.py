"""The slots of many hosts: what is in them, and how they move.

All fields are arrays `[E, S]` (lanes, slots), but `accuracy`, `[E]`. `SlotTable` is their only writer. A move goes
through `lifecycle.NEXT_STAGE`; a move that the table lacks is a contradiction, because masks are made from the same
table.

A step changes a table in this order: the controller's moves, one `tick`, then what training and validation measured.
A ramp that begins with a move makes its first part in the tick of the same step; one that lands in a tick is seen
there. What a seed leaves behind when it is removed (by a move or in a tick) is told to the caller, who removes its
parameters and its optimiser state in the same transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper_simic.actions import ALPHA_SPEED_EPOCHS, ALPHA_TARGETS, TEMPO_EPOCHS
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import InvariantViolation
from esper_simic.growing_host.alpha import (
    COMPOSITION_OF_STYLE,
    CURVE_OF_STYLE,
    AlphaMode,
    curve_for,
    mode_of_ramp,
    ramp,
)
from esper_simic.growing_host.slot_fields import NO_BLUEPRINT, At, SlotFields
from esper_simic.growing_host.training import VANISHING_NORM, GradientReport
from esper_simic.lifecycle import (
    COMPUTING,
    NEXT_STAGE,
    NO_MOVE,
    OCCUPIED,
    Bools,
    Event,
    Floats,
    Integers,
    SeedStage,
    Vitals,
    expired,
    moves_itself,
    open_gates,
)

__all__ = ["NO_BLUEPRINT", "At", "SlotTable", "Ticked"]


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a tick did that others must follow.

    | field | meaning |
    |---|---|
    | `removed` | lanes and slots of the seeds whose scheduled prune has landed: remove their parameters now |
    """

    removed: At


class SlotTable(SlotFields):
    """The slots of E hosts and all that changes them; its fields are those of `SlotFields`."""

    # -- what is seen ------------------------------------------------------------------------------------------------

    @property
    def ramping(self) -> Bools:
        """`[E, S]` true while alpha still moves."""
        return np.asarray(self.alpha_mode != AlphaMode.HOLD)

    @property
    def frozen(self) -> Bools:
        """`[E, S]` true where the seed's parameters do not move: alpha comes down. The host goes on learning."""
        return np.asarray(self.alpha_mode == AlphaMode.DOWN)

    def vitals(self) -> Vitals:
        """What the gates look at, `[E, S]` each."""
        return Vitals(
            stage=self.stage,
            epochs_in_stage=self.epochs_in_stage,
            gradient_health=self.gradient_health,
            exploding=self.exploding,
            gradient_ratio=self.gradient_ratio,
            improvement=self.accuracy[:, None] - self.accuracy_at_stage,
            alpha=self.alpha,
            alpha_target=self.alpha_target,
            ramping=self.ramping,
            contribution=self.contribution,
        )

    # -- moves -------------------------------------------------------------------------------------------------------

    def germinate(
        self,
        at: At,
        *,
        blueprint: Integers,
        parameters: Integers,
        style: Integers,
        tempo: Integers,
        alpha_target: Integers,
        epoch: Integers,
    ) -> None:
        """Put seeds into empty slots.

        Args:
            at: Where.
            blueprint: `[n]` index into `actions.BLUEPRINTS`.
            parameters: `[n]` parameter counts of the seeds, a gate's included.
            style: `[n]` values of `Style`: composition and curve of the first ramp.
            tempo: `[n]` index into `actions.TEMPO_EPOCHS`: its length.
            alpha_target: `[n]` index into `actions.ALPHA_TARGETS`: where it leads.
            epoch: `[n]` epochs of the episode so far.
        """
        self.move(at, Event.GERMINATE)
        self.germinated_at[at] = epoch
        self.blueprint[at] = blueprint
        self.parameters[at] = parameters
        self.style[at] = style
        self.composition[at] = COMPOSITION_OF_STYLE[style]
        self.alpha_curve[at] = CURVE_OF_STYLE[style]
        self.tempo_epochs[at] = np.asarray(TEMPO_EPOCHS)[tempo]
        self.alpha_target[at] = np.asarray(ALPHA_TARGETS)[alpha_target]
        self.accuracy_at_germination[at] = self.accuracy[at[0]]

    def advance(self, at: At) -> None:
        """Move seeds one stage on; entering BLENDING starts the ramp that the seed was given."""
        self.move(at, Event.ADVANCE)
        blending = self.stage[at] == SeedStage.BLENDING
        entering = (at[0][blending], at[1][blending])
        self._lead_alpha(
            entering, self.alpha_target[entering], self.tempo_epochs[entering], self.alpha_curve[entering]
        )

    def fossilize(self, at: At) -> None:
        """Make seeds part of their hosts for good."""
        self.move(at, Event.FOSSILIZE)

    def retarget(
        self,
        at: At,
        *,
        style: Integers,
        alpha_target: Integers,
        alpha_speed: Integers,
        alpha_curve: Integers,
        parameters: Integers,
    ) -> None:
        """Lead alpha to another target; the composition becomes that of `style`.

        A seed in HOLDING goes back to BLENDING, unless it is led to 1, where it already is.

        Args:
            at: Where; alpha must stand still there.
            style: `[n]` values of `Style`.
            alpha_target: `[n]` index into `actions.ALPHA_TARGETS`.
            alpha_speed: `[n]` index into `actions.ALPHA_SPEED_EPOCHS`; 0 epochs: at once.
            alpha_curve: `[n]` index into `actions.ALPHA_CURVES`; a gated seed takes LINEAR.
            parameters: `[n]` parameter counts of the seeds in the new composition.

        Raises:
            InvariantViolation: Alpha still moves, or the stage has no alpha to lead.
        """
        target = np.asarray(ALPHA_TARGETS)[alpha_target]
        self._require_still(at, Event.RETARGET)
        leaving = (self.stage[at] != SeedStage.HOLDING) | (target < 1.0)
        self.move((at[0][leaving], at[1][leaving]), Event.RETARGET)
        self.style[at] = style
        self.composition[at] = COMPOSITION_OF_STYLE[style]
        self.parameters[at] = parameters
        self._lead_alpha(at, target, np.asarray(ALPHA_SPEED_EPOCHS)[alpha_speed], alpha_curve)

    def prune(self, at: At, *, alpha_speed: Integers, alpha_curve: Integers) -> At:
        """Remove seeds, those that are blended in by leading alpha down to 0 first.

        A seed with `alpha > 0` and a speed of some epochs is scheduled: it goes back to BLENDING, comes down, and is
        removed by the `tick` in which alpha arrives at 0. All others are removed at once.

        Args:
            at: Where; alpha must stand still there.
            alpha_speed: `[n]` index into `actions.ALPHA_SPEED_EPOCHS`.
            alpha_curve: `[n]` index into `actions.ALPHA_CURVES`.

        Returns:
            Lanes and slots of the seeds that were removed at once.

        Raises:
            InvariantViolation: Alpha still moves, or the stage has no seed to prune.
        """
        self._require_still(at, Event.PRUNE)
        epochs = np.asarray(ALPHA_SPEED_EPOCHS)[alpha_speed]
        gentle = (self.alpha[at] > 0) & (epochs > 0)
        scheduled = (at[0][gentle], at[1][gentle])
        self.move(scheduled, Event.RETARGET)
        self.prune_scheduled[scheduled] = True
        self._lead_alpha(scheduled, np.zeros(len(scheduled[0])), epochs[gentle], alpha_curve[gentle])
        at_once = (at[0][~gentle], at[1][~gentle])
        self.remove(at_once)
        return at_once

    def remove(self, at: At) -> None:
        """Remove live seeds now, whatever their alpha does; their slots stay closed for a while."""
        self.move(at, Event.PRUNE)
        self.forget(at)

    def move(self, at: At, event: Event) -> None:
        """Apply one event to some slots.

        Raises:
            InvariantViolation: The lifecycle has no such move from one of the slots' stages.
        """
        before = self.stage[at]
        successor = NEXT_STAGE[before, event]
        if (successor == NO_MOVE).any():
            stage = SeedStage(int(before[successor == NO_MOVE][0]))
            raise InvariantViolation(
                f"a slot in {stage.name} was given {event.name}, which the lifecycle lacks"
            )
        self.stage[at] = successor
        entered = successor != before
        entering = (at[0][entered], at[1][entered])
        self.epochs_in_stage[entering] = 0
        self.accuracy_at_stage[entering] = self.accuracy[entering[0]]

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self, config: EnvironmentConfig) -> Ticked:
        """Let one epoch pass.

        Seeds that move by themselves (`auto_forward_*`) do so first, as if a controller had advanced them in this
        step; then dwell times end, seeds age, and ramps make one part of their way. A scheduled prune that arrives at
        0 removes its seed.

        Args:
            config: Length of the embargo, the gates and who goes through them alone.
        """
        forward = moves_itself(self.stage, config)
        if forward.any():
            self.advance(_where(forward & open_gates(self.vitals(), Event.ADVANCE, config)))
        self.epochs_in_stage += self.stage != SeedStage.DORMANT
        self.age += OCCUPIED[self.stage]
        due = expired(self.stage, self.epochs_in_stage, config.embargo_epochs)
        while due.any():
            self.move(_where(due), Event.EXPIRE)
            due = expired(self.stage, self.epochs_in_stage, config.embargo_epochs)
        self.epochs_since_contribution += self.epochs_since_contribution >= 0
        return Ticked(self._tick_ramps())

    def _tick_ramps(self) -> At:
        """Every ramp makes one part of its way; returns the seeds that were removed at its end."""
        np.copyto(self.alpha_before, self.alpha_ticked)
        moving = self.ramping
        if moving.any():
            self.ramp_done[moving] += 1
            self.alpha[moving] = ramp(
                self.alpha_start[moving],
                self.alpha_target[moving],
                self.alpha_curve[moving],
                self.ramp_done[moving],
                self.ramp_total[moving],
            )
            self.alpha_mode[self.ramp_done >= self.ramp_total] = AlphaMode.HOLD
        landed = _where(self.prune_scheduled & ~self.ramping)
        if len(landed[0]):
            self.remove(landed)
        np.copyto(self.alpha_ticked, self.alpha)
        return landed

    # -- what is measured --------------------------------------------------------------------------------------------

    def record_gradients(self, report: GradientReport, *, host_parameters: int, ema: float) -> None:
        """Note how sound the gradients of computing seeds were in the epoch that has just passed.

        The ratio of an epoch compares root mean squares, `(|g_seed| / sqrt(P_seed)) / (|g_host| / sqrt(P_host))`, so
        that it does not depend on sizes; it is averaged as `r <- ema r + (1 - ema) ratio`, from the first ratio on.
        Where the host's own gradient vanishes there is none. Frozen seeds keep what was measured before.

        Args:
            report: Norms and health of the epoch.
            host_parameters: Parameters of the host alone.
            ema: Weight of the past, in [0, 1).
        """
        computing = COMPUTING[self.stage] & ~self.frozen
        self.gradient_health_before[computing] = self.gradient_health[computing]
        self.gradient_health[computing] = report.health[computing]
        self.gradient_norm[computing] = report.seed_norm[computing]
        self.vanishing[computing] = report.vanishing[computing]
        self.exploding[computing] = report.exploding[computing]
        host_norm = np.sqrt((report.layer_norm**2).sum(axis=1, keepdims=True))
        known = computing & (host_norm >= VANISHING_NORM) & (self.parameters > 0)
        seed_mean = report.seed_norm / np.sqrt(np.maximum(self.parameters, 1))
        ratio = seed_mean * np.sqrt(host_parameters) / np.maximum(host_norm, VANISHING_NORM)
        averaged = ema * self.gradient_ratio + (1 - ema) * ratio
        first = np.isnan(self.gradient_ratio)
        self.gradient_ratio[known] = np.where(first, ratio, averaged)[known]

    def record_accuracy(self, lanes: Integers, accuracy: Floats) -> None:
        """Note what hosts `[n]` can do, in percent `[n]`, before their first step."""
        self.accuracy[lanes] = accuracy

    def record_validation(
        self,
        accuracy: Floats,
        contribution: Floats,
        solo: Floats,
        interaction: Floats,
        *,
        velocity_ema: float = 0.0,
    ) -> None:
        """Note what hosts can do and what seeds were worth in the validation that has just passed.

        The velocity of a contribution is its change since it was measured last, averaged from the first change on:
        `v <- velocity_ema v + (1 - velocity_ema) change`.

        Args:
            accuracy: `[E]` percent.
            contribution: `[E, S]` points lost with that seed off; NaN where not measured.
            solo: `[E, S]` points with only that seed on; NaN where not measured.
            interaction: `[E, S]` points, sum over partners; NaN where there was none, or it was not measured.
            velocity_ema: Weight of the past, in [0, 1).
        """
        self.accuracy[:] = accuracy
        measured = np.isfinite(contribution)
        change = contribution - self.contribution
        averaged = velocity_ema * self.contribution_velocity + (1 - velocity_ema) * change
        first = np.isnan(self.contribution_velocity)
        self.contribution_velocity[measured] = np.where(first, change, averaged)[measured]
        self.contribution[measured] = contribution[measured]
        self.progress[measured] = (accuracy[:, None] - self.accuracy_at_germination)[measured]
        self.interaction[measured] = np.nan_to_num(interaction[measured], nan=0.0)
        self.epochs_since_contribution[measured] = 0
        alone = np.isfinite(solo)
        self.solo[alone] = solo[alone]

    # -- within ------------------------------------------------------------------------------------------------------

    def _lead_alpha(self, at: At, target: Floats, epochs: Integers, curve: Integers) -> None:
        """Begin a ramp from where alpha stands; a ramp without a way, or of 0 epochs, is over at once."""
        start = self.alpha[at]
        mode = mode_of_ramp(start, target, epochs)
        over = mode == AlphaMode.HOLD
        self.alpha_mode[at] = mode
        self.alpha_start[at] = start
        self.alpha_target[at] = target
        self.alpha_curve[at] = curve_for(self.composition[at], curve)
        self.ramp_done[at] = 0
        self.ramp_total[at] = np.where(over, 0, epochs)
        self.alpha[at] = np.where(over, target, start)

    def _require_still(self, at: At, event: Event) -> None:
        if self.ramping[at].any():
            raise InvariantViolation(f"{event.name} was given to a seed whose alpha still moves")


def _where(chosen: Bools) -> At:
    lanes, slots = np.nonzero(chosen)
    return lanes, slots
