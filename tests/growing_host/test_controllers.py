"""Scripted controllers: what they do, and that they only do what is legal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from esper_simic.actions import BLUEPRINT, BLUEPRINTS, HEADS, OP, SLOT, MaskLayout, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.controllers import (
    Farm,
    FixedSchedule,
    HeuristicController,
    NeverGrow,
    PatientController,
    RandomController,
    sample,
)
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.lifecycle import SeedStage

LANES = 4
CONFIG = EnvironmentConfig(max_epochs=40, training_epochs_min=2, validation_samples=100)


def controllers():
    schedules = [PatientController(), FixedSchedule(), Farm()]
    return [NeverGrow(), RandomController(), *schedules, HeuristicController(LANES)]


def play(controller, epochs, config=CONFIG):
    env = GrowingHostVectorEnv(LANES, config)
    rng = np.random.default_rng(0)
    env.reset(seed=3, options={"stagger": False})
    controller.reset(np.ones(LANES, dtype=np.bool_))
    for _ in range(epochs):
        view = env.view()
        actions = controller.act(view, rng.random((LANES, len(HEADS))))
        *_, infos = env.step(actions)
        yield view, actions, infos


@pytest.mark.parametrize("controller", controllers(), ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    "change",
    [{}, {"blueprints": ("norm", "attention")}, {"alpha_control": "full"}, {"auto_forward_g2": True}],
    ids=["plain", "few blueprints", "full alpha control", "auto-forward"],
)
def test_only_legal_actions(controller, change):
    config = CONFIG.model_copy(update=change)
    for _, _, infos in play(controller, 25, config):
        assert infos["action_succeeded"].all()


def test_never_grow_waits():
    assert all((actions[:, OP] == Op.WAIT).all() for _, actions, _ in play(NeverGrow(), 3))


def test_random_is_uniform_over_what_is_legal():
    view = next(play(NeverGrow(), 1))[0]
    everyone = {
        field.name: np.repeat(getattr(view, field.name)[:1], 3000, axis=0)
        for field in dataclasses.fields(view)
    }
    many = dataclasses.replace(view, **everyone)
    actions = RandomController().act(many, np.random.default_rng(0).random((3000, len(HEADS))))
    for column, choices in ((OP, [Op.WAIT, Op.GERMINATE]), (SLOT, [0, 1, 2]), (BLUEPRINT, [1, 2, 3, 4, 7])):
        counts = np.bincount(actions[:, column], minlength=13)
        assert np.flatnonzero(counts).tolist() == choices
        assert counts[choices] == pytest.approx(3000 / len(choices), rel=0.15)


@pytest.mark.parametrize(("u", "choice"), [(0.0, 1), (0.49, 1), (0.5, 3), (1 - 1e-12, 3)])
def test_sample_is_the_inverse_distribution_function(u, choice):
    assert sample(np.array([[False, True, False, True]]), np.array([u])).tolist() == [choice]


def schedule_played(controller, epochs=35):
    """Slots germinated in turn, epochs in HOLDING of each seed when it was kept, and the last view."""
    slots, kept, last = [], [], None
    for view, actions, _ in play(controller, epochs):
        if actions[0, OP] == Op.GERMINATE:
            slots.append(int(actions[0, SLOT]))
            assert actions[0, BLUEPRINT] == BLUEPRINTS.index("conv_light")
        if actions[0, OP] == Op.FOSSILIZE:
            kept.append(int(view.epochs_in_stage[0, actions[0, SLOT]]))
        last = view
    return slots, kept, last


def test_patient_germinates_in_order_and_keeps_after_five_epochs():
    slots, kept, _ = schedule_played(PatientController())
    assert slots == [0, 1, 2]
    assert len(kept) == 3
    assert all(epochs >= 5 for epochs in kept)


def test_the_fixed_schedule_keeps_at_once():
    slots, kept, last = schedule_played(FixedSchedule())
    assert slots == [0, 1, 2]
    assert kept == [1, 1, 1], "a tick passes between reaching HOLDING and the next action"
    assert (last.stage[0] == SeedStage.FOSSILIZED).all()


def test_the_farm_grows_everywhere_and_keeps_nothing():
    slots, kept, last = schedule_played(Farm())
    assert slots == [0, 1, 2]
    assert kept == []
    assert (last.stage[0] == SeedStage.HOLDING).all()


def quiet_view(**changes):
    """A plateau: nothing planted, everything legal that the stages allow."""
    view = next(play(NeverGrow(), 1))[0]
    flat = np.full(view.accuracy.shape, 20.0)
    return dataclasses.replace(view, accuracy=flat, loss=flat / 10, epoch=np.full(LANES, 9), **changes)


def act(controller, view):
    return controller.act(view, np.zeros((LANES, len(HEADS))))


def test_heuristic_germinates_on_a_plateau_and_rotates():
    controller, view = HeuristicController(LANES), quiet_view()
    chosen = [BLUEPRINTS[act(controller, view)[0, BLUEPRINT]] for _ in range(6)]
    assert chosen == ["conv_light", "conv_heavy", "attention", "norm", "depthwise", "conv_light"]


LEARNING = {
    "too early": lambda view: dataclasses.replace(view, epoch=np.full(LANES, 4)),
    "accuracy rises": lambda view: dataclasses.replace(view, accuracy=view.accuracy + np.arange(10)),
    "loss falls": lambda view: dataclasses.replace(view, loss=0.9 ** np.arange(10) + np.zeros((LANES, 1))),
    "history too short": lambda view: dataclasses.replace(
        view, accuracy=np.where(np.arange(10) < 7, np.nan, view.accuracy)
    ),
}


@pytest.mark.parametrize("change", LEARNING.values(), ids=LEARNING)
def test_heuristic_waits_while_the_host_learns(change):
    assert (act(HeuristicController(LANES), change(quiet_view()))[:, OP] == Op.WAIT).all()


def planted(contribution, *, epochs=1, at_germination=20.0, at_stage=20.0, stage=SeedStage.HOLDING):
    """A seed in slot 1 of every lane, in HOLDING; FOSSILIZE and PRUNE are legal there. The accuracy is 20."""
    view = quiet_view()
    stages = np.full((LANES, 3), SeedStage.DORMANT, dtype=np.int8)
    stages[:, 1] = stage
    mask = np.zeros_like(view.mask)
    table = np.zeros((LANES, len(Op), 3), dtype=np.int8)
    table[:, Op.WAIT] = table[:, Op.PRUNE, 1:2] = 1
    table[:, Op.FOSSILIZE, 1:2] = stage is SeedStage.HOLDING
    layout = MaskLayout(3)
    mask[:] = view.mask
    mask[:, layout.op_slot] = table.reshape(LANES, -1)
    mask[:, layout.op] = table.any(axis=2)
    filled = np.zeros((LANES, 3))
    kind = np.full((LANES, 3), len(BLUEPRINTS))
    kind[:, 1] = BLUEPRINTS.index("conv_light")
    return dataclasses.replace(
        view,
        stage=stages,
        mask=mask,
        contribution=filled + contribution,
        epochs_in_stage=filled.astype(np.int64) + epochs,
        accuracy_at_germination=filled + at_germination,
        accuracy_at_stage=filled + at_stage,
        blueprint=kind,
    )


@pytest.mark.parametrize(
    ("view", "op"),
    [
        (planted(0.6), Op.FOSSILIZE),
        (planted(0.5), Op.WAIT),
        (planted(0.5, epochs=5), Op.PRUNE),
        (planted(0.6, at_germination=22.5), Op.PRUNE),
        (planted(np.nan, epochs=4), Op.WAIT),
        (planted(9.0, at_germination=20.1), Op.PRUNE),  # ransomware: leaned on, and nothing is better for it
        (planted(0.5, at_germination=20.1), Op.WAIT),  # worse, but nobody leans on it yet
        (planted(0.5, stage=SeedStage.BLENDING, epochs=5), Op.PRUNE),
        (planted(0.5, stage=SeedStage.BLENDING, epochs=4), Op.WAIT),
        (
            planted(0.5, stage=SeedStage.BLENDING, epochs=5, at_stage=19.9),
            Op.WAIT,
        ),  # it has brought something
        (planted(0.6, stage=SeedStage.BLENDING, epochs=5), Op.WAIT),
        (planted(np.nan, stage=SeedStage.TRAINING, epochs=9), Op.WAIT),  # it cannot have changed the accuracy
        (planted(np.nan, stage=SeedStage.TRAINING, at_germination=22.5), Op.PRUNE),
    ],
)
def test_heuristic_keeps_what_contributes_and_prunes_what_does_not(view, op):
    actions = act(HeuristicController(LANES), view)
    assert (actions[:, OP] == op).all()
    if op != Op.WAIT:
        assert (actions[:, SLOT] == 1).all()


def test_heuristic_remembers_prunes_for_a_while():
    controller = HeuristicController(LANES)
    act(controller, planted(0.0, epochs=5))
    waits = [int(act(controller, quiet_view())[0, OP]) for _ in range(6)]
    assert waits == [Op.WAIT] * 5 + [Op.GERMINATE]


def test_heuristic_skips_a_blueprint_that_was_pruned_often():
    controller = HeuristicController(LANES)
    for _ in range(4):
        act(controller, planted(0.0, epochs=5))
    controller._epochs_since_prune[:] = 99
    assert controller._penalty[0, 0] > 3
    controller._penalty *= 2  # the next act halves it
    assert BLUEPRINTS[act(controller, quiet_view())[0, BLUEPRINT]] == "conv_heavy"
    controller.reset(np.arange(LANES) == 0)
    controller._epochs_since_prune[:] = 99
    assert BLUEPRINTS[act(controller, quiet_view())[0, BLUEPRINT]] == "conv_light"


def test_heuristic_takes_the_plainest_blueprint_where_none_of_its_rotation_is_offered():
    view = quiet_view()
    mask = view.mask.copy()
    offered = mask[:, MaskLayout(3).choices("blueprint")]
    offered[:] = 0
    offered[:, BLUEPRINTS.index("mlp_small")] = 1
    mask[:, MaskLayout(3).choices("blueprint")] = offered
    actions = act(HeuristicController(LANES), dataclasses.replace(view, mask=mask))
    assert (actions[:, OP] == Op.GERMINATE).all()
    assert (actions[:, BLUEPRINT] == BLUEPRINTS.index("mlp_small")).all()
