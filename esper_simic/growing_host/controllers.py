"""Scripted controllers: the baselines a learned one is compared with.

Each looks at a `HostView` and answers with actions `[E, 8]`; all memory is per lane and cleared by `reset(lanes)`.
Chance comes in as uniforms `[E, 8]`, one per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from esper_simic.actions import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLUEPRINT,
    BLUEPRINTS,
    CHOICE_HEADS,
    HEADS,
    OP,
    RELEVANT_HEADS,
    SLOT,
    TEMPO_EPOCHS,
    MaskLayout,
    Op,
    Style,
)
from esper_simic.growing_host.view import HostView
from esper_simic.lifecycle import LIVE, Bools, SeedStage

FAST_TEMPO: Final = TEMPO_EPOCHS.index(min(TEMPO_EPOCHS))


class Controller(Protocol):
    """Anything that can grow hosts from a view of them."""

    def reset(self, lanes: Bools) -> None:
        """Forget lanes `[E]` whose episode has ended."""

    def act(self, view: HostView, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """Actions `[E, 8]` for a view, with uniforms `[E, 8]` in [0, 1)."""


def waiting(view: HostView) -> NDArray[np.int64]:
    """Actions `[E, 8]` that wait; every other head holds its plainest legal choice."""
    lanes, slots = view.stage.shape
    layout = MaskLayout(slots)
    actions = np.zeros((lanes, len(HEADS)), dtype=np.int64)
    plain = {
        "style": Style.SIGMOID_ADD,
        "tempo": FAST_TEMPO,
        "alpha_target": ALPHA_TARGETS.index(1.0),
        "alpha_speed": ALPHA_SPEED_EPOCHS.index(0),
        "alpha_curve": ALPHA_CURVES.index("LINEAR"),
        "op": Op.WAIT,
    }
    for head, choice in plain.items():
        actions[:, HEADS.index(head)] = choice
    enabled = view.mask[:, layout.choices("blueprint")] > 0
    light = BLUEPRINTS.index("conv_light")
    actions[:, BLUEPRINT] = np.where(enabled[:, light], light, enabled.argmax(axis=1))
    return actions


def op_slots(view: HostView) -> Bools:
    """Legal slots of each operation, `[E, 6, S]`."""
    lanes, slots = view.stage.shape
    return view.mask[:, MaskLayout(slots).op_slot].reshape(lanes, len(Op), slots) > 0


def sample(allowed: Bools, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """One of the allowed choices of each row, all equally likely.

    Args:
        allowed: `[E, n]` with at least one true in each row.
        uniforms: `[E]` in [0, 1).
    """
    rank = (uniforms * allowed.sum(axis=1)).astype(np.int64)
    return np.asarray(np.argmax(np.cumsum(allowed, axis=1) > rank[:, None], axis=1))


class NeverGrow:
    """Waits for ever: what the host can do alone."""

    def reset(self, lanes: Bools) -> None:
        """Nothing is remembered."""

    def act(self, view: HostView, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """WAIT in every lane."""
        return waiting(view)


class RandomController:
    """A legal operation uniformly, then one of its slots, then the other choices, each uniformly."""

    def reset(self, lanes: Bools) -> None:
        """Nothing is remembered."""

    def act(self, view: HostView, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """A random legal action in every lane."""
        lanes, slots = view.stage.shape
        layout = MaskLayout(slots)
        actions = np.zeros((lanes, len(HEADS)), dtype=np.int64)
        actions[:, OP] = sample(view.mask[:, layout.op] > 0, uniforms[:, OP])
        actions[:, SLOT] = sample(op_slots(view)[np.arange(lanes), actions[:, OP]], uniforms[:, SLOT])
        for head in CHOICE_HEADS:
            index = HEADS.index(head)
            actions[:, index] = sample(view.mask[:, layout.choices(head)] > 0, uniforms[:, index])
        return actions


def random_log_probs(view: HostView, actions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probabilities `[E]` with which `RandomController` does this, over the causally relevant heads.

    Args:
        view: What it saw.
        actions: What it did, `[E, 8]`.
    """
    lanes, slots = view.stage.shape
    layout = MaskLayout(slots)
    relevant = np.array([[head in RELEVANT_HEADS[op] for head in HEADS] for op in Op])[actions[:, OP]]
    choices = np.ones((lanes, len(HEADS)))
    choices[:, OP] = (view.mask[:, layout.op] > 0).sum(axis=1)
    choices[:, SLOT] = op_slots(view)[np.arange(lanes), actions[:, OP]].sum(axis=1)
    for head in CHOICE_HEADS:
        choices[:, HEADS.index(head)] = (view.mask[:, layout.choices(head)] > 0).sum(axis=1)
    return np.asarray(-np.where(relevant, np.log(choices), 0.0).sum(axis=1))


class _Schedule:
    """A fixed schedule: `conv_light` (or the first blueprint offered) into each slot in turn, on as gates allow.

    When several things are legal, keeping a seed goes before advancing one, and that before germinating another.

    Args:
        holding_epochs: Epochs in HOLDING before a seed is fossilised; None: it never is.
    """

    def __init__(self, holding_epochs: int | None) -> None:
        self._holding_epochs = holding_epochs

    def reset(self, lanes: Bools) -> None:
        """Nothing is remembered."""

    def act(self, view: HostView, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The next step of the schedule in every lane."""
        legal = op_slots(view)
        actions = waiting(view)
        _choose(actions, Op.GERMINATE, legal[:, Op.GERMINATE])
        _choose(actions, Op.ADVANCE, legal[:, Op.ADVANCE])
        if self._holding_epochs is not None:
            held = legal[:, Op.FOSSILIZE] & (view.epochs_in_stage >= self._holding_epochs)
            _choose(actions, Op.FOSSILIZE, held)
        return actions


class PatientController(_Schedule):
    """The fixed schedule that keeps a seed after a while of HOLDING.

    Args:
        holding_epochs: Epochs in HOLDING before a seed is fossilised.
    """

    def __init__(self, holding_epochs: int = 5) -> None:
        super().__init__(holding_epochs)


class FixedSchedule(_Schedule):
    """The fixed schedule that keeps a seed as soon as it may."""

    def __init__(self) -> None:
        super().__init__(0)


class Farm(_Schedule):
    """The fixed schedule that never keeps a seed: it is blended in and held for ever.

    It puts the same blueprints into the same slots as `PatientController` and `FixedSchedule`: keeping a seed changes
    nothing of what a host computes, and costs an epoch's action at most. So its accuracy and parameters are about
    theirs, and only its return, which no finished seed pays into, tells them apart.

    The test of a reward: one that pays for attribution every epoch pays this controller best, though it finishes
    nothing. No default reward may.
    """

    def __init__(self) -> None:
        super().__init__(None)


class HeuristicController:
    """The rule-based controller: germinates on plateaus, keeps what contributes, prunes what does not.

    * Germinate when the accuracy has not risen by `PLATEAU_POINTS` for three epochs, from epoch 5 on, once the loss is
      stable (three epochs with less than 3 % relative improvement each), and five epochs after the last prune. The
      blueprint is the first of the rotation whose penalty is at most 3 (the least penalised where all are above): a
      prune adds 2 to its blueprint's penalty, which halves every epoch; a blueprint that is not offered is never
      chosen. The rotation moves on with each germination. Where none of it is offered, the plainest one is taken.
    * Advance whenever legal.
    * Fossilise in HOLDING when the contribution exceeds 0.5 points.
    * Prune a live seed when the accuracy lies 2 points below that at its germination.
    * Prune a blended seed that brings no improvement: five epochs in HOLDING and its contribution still at most 0.5
      points, or five epochs in BLENDING, the same, and the accuracy not above that at the start of BLENDING. (A seed
      in TRAINING cannot change the accuracy; it is not judged.)
    * Prune ransomware: a seed in HOLDING whose contribution exceeds 0.5 points while the accuracy lies below that at
      its germination. The host has come to lean on it and is none the better for it.
    """

    ROTATION: Final = ("conv_light", "conv_heavy", "attention", "norm", "depthwise")
    EPOCH_MIN: Final = 5
    PLATEAU_EPOCHS: Final = 3
    PLATEAU_POINTS: Final = 0.5
    STABLE_IMPROVEMENT: Final = 0.03
    EMBARGO_EPOCHS: Final = 5
    CONTRIBUTION_MIN: Final = 0.5
    IDLE_EPOCHS_MAX: Final = 5
    LOSS_POINTS: Final = 2.0
    PENALTY: Final = 2.0
    PENALTY_DECAY: Final = 0.5
    PENALTY_MAX: Final = 3.0

    def __init__(self, lanes: int) -> None:
        self._rotation = np.array([BLUEPRINTS.index(name) for name in self.ROTATION])
        self._position = np.zeros(lanes, dtype=np.int64)
        self._penalty = np.zeros((lanes, len(self.ROTATION)))
        self._epochs_since_prune = np.full(lanes, self.EMBARGO_EPOCHS)

    def reset(self, lanes: Bools) -> None:
        """Start the rotation anew and forget penalties."""
        self._position[lanes] = 0
        self._penalty[lanes] = 0
        self._epochs_since_prune[lanes] = self.EMBARGO_EPOCHS

    def act(self, view: HostView, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """What the rules say in every lane; pruning goes before keeping, advancing and germinating."""
        legal = op_slots(view)
        actions = waiting(view)
        self._penalty *= self.PENALTY_DECAY
        self._epochs_since_prune += 1
        contribution = np.nan_to_num(view.contribution)
        ready = legal[:, Op.GERMINATE] & self._wants_growth(view)[:, None]
        _choose(actions, Op.GERMINATE, ready)
        _choose(actions, Op.ADVANCE, legal[:, Op.ADVANCE])
        worthy = contribution > self.CONTRIBUTION_MIN
        _choose(actions, Op.FOSSILIZE, legal[:, Op.FOSSILIZE] & worthy & ~self._ransomware(view, worthy))
        _choose(actions, Op.PRUNE, legal[:, Op.PRUNE] & self._useless(view, worthy))
        self._note(actions, view)
        return actions

    def _wants_growth(self, view: HostView) -> Bools:
        recent = self.PLATEAU_EPOCHS + 1
        accuracy, loss = view.accuracy[:, -recent:], view.loss[:, -recent:]
        enough = np.isfinite(accuracy).all(axis=1) & (view.epoch >= self.EPOCH_MIN)
        plateau = np.nan_to_num(accuracy[:, 1:].max(axis=1) - accuracy[:, 0]) < self.PLATEAU_POINTS
        improvement = np.nan_to_num((loss[:, :-1] - loss[:, 1:]) / np.maximum(loss[:, :-1], 1e-9))
        stable = (improvement < self.STABLE_IMPROVEMENT).all(axis=1)
        return np.asarray(enough & plateau & stable & (self._epochs_since_prune > self.EMBARGO_EPOCHS))

    def _useless(self, view: HostView, worthy: Bools) -> Bools:
        now = view.accuracy[:, -1:]
        below = now < view.accuracy_at_germination - self.LOSS_POINTS
        stuck = (view.stage == SeedStage.BLENDING) & (now <= view.accuracy_at_stage)
        idle = (stuck | (view.stage == SeedStage.HOLDING)) & (view.epochs_in_stage >= self.IDLE_EPOCHS_MAX)
        return np.asarray(LIVE[view.stage] & (below | (idle & ~worthy) | self._ransomware(view, worthy)))

    def _ransomware(self, view: HostView, worthy: Bools) -> Bools:
        worse = view.accuracy[:, -1:] < view.accuracy_at_germination
        return np.asarray((view.stage == SeedStage.HOLDING) & worthy & worse)

    def _note(self, actions: NDArray[np.int64], view: HostView) -> None:
        """Pick blueprints for germinations; remember penalties of prunes."""
        growing = np.flatnonzero(actions[:, OP] == Op.GERMINATE)
        order = (self._position[growing, None] + np.arange(len(self.ROTATION))) % len(self.ROTATION)
        layout = MaskLayout(view.stage.shape[1])
        enabled = view.mask[:, layout.choices("blueprint")][:, self._rotation] > 0
        penalties = np.where(enabled, self._penalty, np.inf)
        penalty = np.take_along_axis(penalties[growing], order, axis=1)
        acceptable = penalty <= self.PENALTY_MAX
        pick = np.where(acceptable.any(axis=1), acceptable.argmax(axis=1), penalty.argmin(axis=1))
        chosen = order[np.arange(len(growing)), pick]
        offered = enabled[growing].any(axis=1)
        actions[growing, BLUEPRINT] = np.where(offered, self._rotation[chosen], actions[growing, BLUEPRINT])
        self._position[growing] = (chosen + 1) % len(self.ROTATION)
        pruned = np.flatnonzero(actions[:, OP] == Op.PRUNE)
        kinds = view.blueprint[pruned, actions[pruned, SLOT]]
        self._penalty[pruned] += self.PENALTY * (self._rotation == kinds[:, None])
        self._epochs_since_prune[pruned] = 0


CONTROLLERS: Final[dict[str, Callable[[int], Controller]]] = {
    "heuristic": HeuristicController,
    "patient": lambda lanes: PatientController(),
    "fixed-schedule": lambda lanes: FixedSchedule(),
    "farm": lambda lanes: Farm(),
    "random": lambda lanes: RandomController(),
    "never-grow": lambda lanes: NeverGrow(),
}
"""Controllers by name, each made for so many lanes; in the order in which they are shown."""


def _choose(actions: NDArray[np.int64], op: Op, slots: Bools) -> None:
    """Give `op` on its first wanted slot to the lanes that want it at all."""
    lanes = slots.any(axis=1)
    actions[lanes, OP] = op
    actions[lanes, SLOT] = slots[lanes].argmax(axis=1)
