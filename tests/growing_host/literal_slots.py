"""The rules of slots written out one host and one slot at a time: the slow truth beside `SlotTable` and its masks.

And `Episode`: random growth of many hosts on a `SlotTable` alone, with made-up measurements, beside that truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from esper_simic.actions import (
    ALPHA_CURVE,
    ALPHA_CURVES,
    ALPHA_SPEED,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGET,
    ALPHA_TARGETS,
    BLUEPRINT,
    CHOICE_HEADS,
    HEADS,
    OP,
    RELEVANT_HEADS,
    SLOT,
    STYLE,
    TEMPO,
    TEMPO_EPOCHS,
    MaskLayout,
    Op,
    Style,
    head_sizes,
)
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host import masks
from esper_simic.growing_host.slots import SlotTable
from esper_simic.growing_host.training import GradientReport
from tests.growing_host.test_alpha import literal_curve

LIVE = ("GERMINATED", "TRAINING", "BLENDING", "HOLDING")
NAN = float("nan")


@dataclass
class Slot:
    """One slot; `ramp` is (start, target, curve, done, total) while alpha moves."""

    stage: str = "DORMANT"
    epochs: int = 0
    age: int = 0
    alpha: float = 0.0
    target: float = 0.0
    curve: str = "LINEAR"
    composition: str = "ADD"
    tempo: int = 0
    ramp: tuple[float, float, str, int, int] | None = None
    doomed: bool = False
    entered_with: float = NAN
    health: float = NAN
    exploding: bool = False
    ratio: float = NAN
    contribution: float = NAN

    @property
    def mode(self):
        if self.ramp is None:
            return "HOLD"
        return "UP" if self.ramp[1] > self.ramp[0] else "DOWN"


@dataclass
class Host:
    """The slots of one host under the rules of a configuration."""

    config: EnvironmentConfig
    slots: list[Slot]
    accuracy: float = NAN
    removed: list[int] = field(default_factory=list)

    def legal(self, op, slot):
        """Whether the lifecycle knows the move, and the host has room for it."""
        here, config = self.slots[slot], self.config
        match Op(op):
            case Op.WAIT:
                return True
            case Op.GERMINATE:
                stages = [other.stage for other in self.slots]
                blocked = {"GERMINATED", "TRAINING", "PRUNED", "EMBARGOED", "RESETTING"}
                seeds = sum(stage in (*LIVE, "FOSSILIZED") for stage in stages)
                room = seeds < (config.max_seeds or len(stages))
                return here.stage == "DORMANT" and room and not blocked.intersection(stages)
            case Op.SET_ALPHA_TARGET:
                still = here.stage in ("BLENDING", "HOLDING") and here.ramp is None
                return config.alpha_control == "full" and still
            case Op.PRUNE:
                return here.stage in LIVE and here.age >= config.prune_age_min and here.ramp is None
            case Op.FOSSILIZE:
                return here.stage == "HOLDING"
            case Op.ADVANCE:
                return here.stage in ("GERMINATED", "TRAINING", "BLENDING") and not self.goes_alone(slot)

    def goes_alone(self, slot):
        flags = {
            "GERMINATED": self.config.auto_forward_g1,
            "TRAINING": self.config.auto_forward_g2,
            "BLENDING": self.config.auto_forward_g3,
        }
        return flags.get(self.slots[slot].stage, False)

    def opens(self, op, slot):
        """Whether the gate in front of the move is open."""
        here, config, strict = self.slots[slot], self.config, self.config.gates == "strict"
        if op == Op.FOSSILIZE:
            ready = not math.isnan(here.contribution) and not math.isnan(here.health) and not here.exploding
            return ready and (not strict or here.contribution >= config.contribution_min)
        if op != Op.ADVANCE or here.stage == "GERMINATED":
            return True
        if here.stage == "TRAINING":
            ready = here.epochs >= config.training_epochs_min and not here.exploding
            ready = ready and here.health >= config.gradient_health_min
            risen = self.accuracy - here.entered_with >= config.improvement_min
            return ready and (not strict or (risen and here.ratio >= config.gradient_ratio_min))
        if here.stage == "BLENDING":
            ready = here.alpha == 1.0 and here.target == 1.0 and here.ramp is None
            return ready and (not strict or here.epochs >= config.blending_epochs_min)
        return False

    def act(self, action):
        """Carry out one accepted action."""
        op, here = Op(action[OP]), self.slots[action[SLOT]]
        self.removed = []
        if op == Op.GERMINATE:
            style = Style(action[STYLE]).name
            self.enter(here, "GERMINATED")
            here.composition = style.rpartition("_")[2]
            here.curve = "SIGMOID" if style == "SIGMOID_ADD" else "LINEAR"
            here.tempo = TEMPO_EPOCHS[action[TEMPO]]
            here.target = ALPHA_TARGETS[action[ALPHA_TARGET]]
        elif op == Op.ADVANCE:
            self.advance(here)
        elif op == Op.FOSSILIZE:
            self.enter(here, "FOSSILIZED")
        elif op == Op.SET_ALPHA_TARGET:
            target = ALPHA_TARGETS[action[ALPHA_TARGET]]
            if here.stage == "HOLDING" and target < 1:
                self.enter(here, "BLENDING")
            here.composition = Style(action[STYLE]).name.rpartition("_")[2]
            self.lead(here, target, action)
        elif op == Op.PRUNE:
            if here.alpha > 0 and ALPHA_SPEED_EPOCHS[action[ALPHA_SPEED]] > 0:
                if here.stage == "HOLDING":
                    self.enter(here, "BLENDING")
                here.doomed = True
                self.lead(here, 0.0, action)
            else:
                self.remove(action[SLOT])

    def lead(self, here, target, action):
        epochs, curve = ALPHA_SPEED_EPOCHS[action[ALPHA_SPEED]], ALPHA_CURVES[action[ALPHA_CURVE]]
        self.start_ramp(here, target, epochs, curve)

    def start_ramp(self, here, target, epochs, curve):
        here.target = target
        here.curve = "LINEAR" if here.composition == "GATE" else curve
        if epochs == 0 or target == here.alpha:
            here.alpha, here.ramp = target, None
        else:
            here.ramp = (here.alpha, target, here.curve, 0, epochs)

    def advance(self, here):
        self.enter(
            here, {"GERMINATED": "TRAINING", "TRAINING": "BLENDING", "BLENDING": "HOLDING"}[here.stage]
        )
        if here.stage == "BLENDING":
            self.start_ramp(here, here.target, here.tempo, here.curve)

    def enter(self, here, stage):
        here.stage, here.epochs, here.entered_with = stage, 0, self.accuracy

    def remove(self, slot):
        self.removed.append(slot)
        self.slots[slot] = Slot()
        self.enter(self.slots[slot], "PRUNED")

    def tick(self):
        for slot, here in enumerate(self.slots):
            if self.goes_alone(slot) and self.opens(Op.ADVANCE, slot):
                self.advance(here)
            here.epochs += here.stage != "DORMANT"
            here.age += here.stage in (*LIVE, "FOSSILIZED")
            if here.stage == "PRUNED":
                self.enter(here, "EMBARGOED")
            elif here.stage == "RESETTING":
                self.enter(here, "DORMANT")
            if here.stage == "EMBARGOED" and here.epochs >= self.config.embargo_epochs:
                self.enter(here, "RESETTING")
            if here.ramp is not None:
                start, target, curve, done, total = here.ramp
                done += 1
                here.alpha = start + (target - start) * literal_curve(curve, done / total)
                here.ramp = (start, target, curve, done, total)
                if done == total:
                    here.alpha, here.ramp = target, None
                    if here.doomed:
                        self.remove(slot)


class Episode:
    """Random growth of some hosts, on a `SlotTable` and by the literal rules at once."""

    def __init__(self, config, *, lanes=3, slots=3, seed=0):
        self.config, self.lanes, self.count = config, lanes, slots
        self.chance = np.random.default_rng(seed)
        self.table = SlotTable(lanes, slots)
        self.hosts = [Host(config, [Slot() for _ in range(slots)]) for _ in range(lanes)]
        self.epoch = 0
        self.note_accuracy(self.chance.uniform(5, 15, lanes))
        self.table.record_accuracy(np.arange(lanes), self.accuracy)
        self.removed = set()

    def note_accuracy(self, accuracy):
        self.accuracy = accuracy
        for host, value in zip(self.hosts, accuracy, strict=True):
            host.accuracy = float(value)

    def legality(self):
        return masks.legality(self.table, self.config)

    def random_action(self, legal_share):
        """Actions `[E, 8]`: mostly legal by the masks, else anything.

        Legal ones wait or prune seldom and lead alpha to 1 often, for episodes should get somewhere.
        """
        legal, sizes = self.legality(), np.array(head_sizes(self.count))
        actions = self.chance.integers(0, sizes, (self.lanes, len(HEADS)))
        for lane in np.flatnonzero(self.chance.random(self.lanes) < legal_share):
            wishes = legal.op_slot[lane].any(axis=1) * np.array([0.1, 1.0, 0.5, 0.2, 0.5, 2.0])
            actions[lane, OP] = self.chance.choice(len(Op), p=wishes / wishes.sum())
            actions[lane, SLOT] = self.chance.choice(np.flatnonzero(legal.op_slot[lane, actions[lane, OP]]))
            for head in CHOICE_HEADS:
                allowed = np.flatnonzero(legal.choices[head][lane])
                actions[lane, HEADS.index(head)] = self.chance.choice(allowed)
            if self.chance.random() < 0.5:
                actions[lane, ALPHA_TARGET] = ALPHA_TARGETS.index(1.0)
        return actions

    def step(self, actions):
        """One epoch; returns what was accepted, `[E]`."""
        accepted = masks.accepted(self.legality(), actions)
        removed = act(self.table, actions, accepted, self.epoch)
        removed += list(zip(*(part.tolist() for part in self.table.tick(self.config).removed), strict=True))
        self.removed = set(removed)
        assert len(self.removed) == len(removed), "a seed was removed twice in one step"
        for lane, host in enumerate(self.hosts):
            host.removed = []
            if accepted[lane]:
                host.act(actions[lane])
            host.tick()
        self.epoch += 1
        self.measure()
        return accepted

    def measure(self):
        shape = (self.lanes, self.count)
        chance, stage = self.chance, self.table.stage
        self.note_accuracy(self.accuracy + chance.normal(0.3, 1.0, self.lanes))
        report = GradientReport(
            layer_norm=chance.uniform(0.1, 1.0, (self.lanes, 2)),
            seed_norm=chance.uniform(0.0, 0.5, shape),
            health=chance.choice([0.5, 0.7, 1.0], shape),
            vanishing=chance.random(shape) < 0.2,
            exploding=chance.random(shape) < 0.1,
        )
        contribution = np.where(np.isin(stage, (4, 6)), chance.normal(1.0, 2.0, shape), NAN)
        self.table.record_gradients(report, host_parameters=100, ema=self.config.gradient_ema)
        self.table.record_validation(self.accuracy, contribution, contribution / 2, contribution / 4)
        host_norm = np.sqrt((report.layer_norm**2).sum(axis=1))
        for lane, host in enumerate(self.hosts):
            for slot, here in enumerate(host.slots):
                if here.stage in ("TRAINING", "BLENDING", "HOLDING", "FOSSILIZED") and here.mode != "DOWN":
                    here.health = float(report.health[lane, slot])
                    here.exploding = bool(report.exploding[lane, slot])
                    ratio = report.seed_norm[lane, slot] / math.sqrt(40) / (host_norm[lane] / math.sqrt(100))
                    ema = self.config.gradient_ema if not math.isnan(here.ratio) else 0.0
                    here.ratio = (ema * here.ratio if ema else 0.0) + (1 - ema) * ratio
                if here.stage in ("BLENDING", "HOLDING"):
                    here.contribution = float(contribution[lane, slot])


def act(table, actions, accepted, epoch, parameters=40):
    """Carry out the accepted actions on a table, as an environment does; lanes and slots removed at once."""

    def targets(wanted):
        lanes = np.flatnonzero(accepted & (actions[:, OP] == wanted))
        return (lanes, actions[lanes, SLOT]), actions[lanes]

    at, chosen = targets(Op.GERMINATE)
    table.germinate(
        at,
        blueprint=chosen[:, BLUEPRINT],
        parameters=np.full(len(chosen), parameters),
        style=chosen[:, STYLE],
        tempo=chosen[:, TEMPO],
        alpha_target=chosen[:, ALPHA_TARGET],
        epoch=np.full(len(chosen), epoch),
    )
    at, chosen = targets(Op.PRUNE)
    removed = table.prune(at, alpha_speed=chosen[:, ALPHA_SPEED], alpha_curve=chosen[:, ALPHA_CURVE])
    at, chosen = targets(Op.SET_ALPHA_TARGET)
    table.retarget(
        at,
        style=chosen[:, STYLE],
        alpha_target=chosen[:, ALPHA_TARGET],
        alpha_speed=chosen[:, ALPHA_SPEED],
        alpha_curve=chosen[:, ALPHA_CURVE],
        parameters=np.full(len(chosen), parameters),
    )
    table.advance(targets(Op.ADVANCE)[0])
    table.fossilize(targets(Op.FOSSILIZE)[0])
    return list(zip(removed[0].tolist(), removed[1].tolist(), strict=True))


def promised(packed, slots, action):
    """What a packed mask `[M]` says about an action `[8]`: each choice that matters to its operation is legal."""
    layout, op = MaskLayout(slots), Op(action[OP])
    if not packed[layout.op][op] or not packed[layout.op_slot].reshape(len(Op), slots)[op, action[SLOT]]:
        return False
    return all(
        packed[layout.choices(head)][action[HEADS.index(head)]]
        for head in CHOICE_HEADS
        if head in RELEVANT_HEADS[op]
    )
