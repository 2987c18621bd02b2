"""Whole episodes with growth: all lanes as one computation, against the same lanes each alone.

Every lane grows two seeds of its own blueprint and composition, begins in its own epoch, and goes one of four ways, so
that lanes stand in different stages at once. In double precision the two ways agree over a whole episode, in single
precision over every epoch that is begun from the same state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from esper_simic.actions import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLUEPRINTS,
    HEADS,
    MaskLayout,
    Op,
    Style,
)
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.alpha import Composition
from esper_simic.growing_host.blueprints import CATALOGUE
from esper_simic.growing_host.controllers import waiting
from esper_simic.growing_host.core import GrowingHosts, StepResult
from esper_simic.growing_host.hosts import HOSTS
from esper_simic.growing_host.view import HostView
from esper_simic.lifecycle import SeedStage

EPOCHS = 14
GAMMA = 0.99
WORLDS = [
    ("digits", "rescue"),
    ("digits", "augment"),
    ("mnist1d", "series"),
    ("wine", "mlp"),
    ("characters", "transformer"),
]
STYLES = {
    Composition.ADD: (Style.LINEAR_ADD, Style.SIGMOID_ADD),
    Composition.MULTIPLY: (Style.LINEAR_MULTIPLY,),
    Composition.GATE: (Style.GATED_GATE,),
}
TO_HALF, TO_WHOLE = ALPHA_TARGETS.index(0.5), ALPHA_TARGETS.index(1.0)
AT_ONCE, IN_THREE_EPOCHS = ALPHA_SPEED_EPOCHS.index(0), ALPHA_SPEED_EPOCHS.index(3)

Seed = tuple[str, Composition]


def seeds_of(host: str) -> list[Seed]:
    """On the rescue host every blueprint in every composition; elsewhere every blueprint, compositions in turns."""
    names = [name for name, blueprint in CATALOGUE.items() if HOSTS[host].kind in blueprint.kinds]
    if host == "rescue":
        return [(name, composition) for name in names for composition in Composition]
    return [(name, Composition(index % len(Composition))) for index, name in enumerate(names)]


def settings(task: str, host: str) -> EnvironmentConfig:
    return EnvironmentConfig(
        task=task,
        host=host,
        slots=("r0c0", "r0c1"),
        blueprints=tuple(dict.fromkeys(name for name, _ in seeds_of(host))),
        max_epochs=EPOCHS,
        training_epochs_min=1,
        train_batches=2,
        train_batch_size=4 if host == "transformer" else 8,
        validation_samples=10 if host == "transformer" else 20,
        prune_age_min=2,
        embargo_epochs=1,
        gradient_health_min=0,
        alpha_control="full",
        stagger=False,
    )


class Growers:
    """One script a lane: when it begins, which two seeds it plants, which way it goes. The last lane never grows.

    All advance where they can and fossilise after two epochs of HOLDING. Beside that lanes of way 1 lead alpha of
    their first seed to 0.5 and back, those of way 2 prune their first seed by a ramp, those of way 3 germinate with
    the target 0.5 and lead it to 1 later.
    """

    def __init__(self, host: str) -> None:
        self.seeds = seeds_of(host)
        self.lanes = (len(self.seeds) + 1) // 2 + 1
        self.planted = np.zeros(self.lanes, dtype=np.int64)
        self.turned = np.zeros(self.lanes, dtype=np.bool_)

    def act(self, view: HostView) -> np.ndarray:
        actions = waiting(view)
        for lane in range(self.lanes - 1):
            if view.epoch[lane] >= lane % 3:
                for head, choice in self._choose(lane, view).items():
                    actions[lane, HEADS.index(head)] = choice
        return actions

    def _choose(self, lane: int, view: HostView) -> dict[str, int]:
        way = lane % 4
        legal = view.mask[lane, MaskLayout(2).op_slot].reshape(len(Op), 2)
        rested = (view.stage[lane] == SeedStage.HOLDING) & (view.epochs_in_stage[lane] >= 2)
        for op, slots in (
            (Op.ADVANCE, legal[Op.ADVANCE]),
            (Op.GERMINATE, legal[Op.GERMINATE] & (self.planted[lane] < 2)),
            (Op.PRUNE, legal[Op.PRUNE] & rested & (way == 2) & ~self.turned[lane]),
            (Op.SET_ALPHA_TARGET, legal[Op.SET_ALPHA_TARGET] & (way == 1) & ~self.turned[lane]),
            (Op.SET_ALPHA_TARGET, legal[Op.SET_ALPHA_TARGET] & (view.alpha[lane] < 1)),
            (Op.FOSSILIZE, legal[Op.FOSSILIZE] & rested),
        ):
            if slots.any():
                return {"op": op, "slot": int(np.argmax(slots))} | self._rest(lane, way, op, view)
        return {}

    def _rest(self, lane: int, way: int, op: Op, view: HostView) -> dict[str, int]:
        if op == Op.GERMINATE:
            name, composition = self.seeds[(2 * lane + self.planted[lane]) % len(self.seeds)]
            self.planted[lane] += 1
            target = TO_HALF if way == 3 else TO_WHOLE
            style = STYLES[composition][-(lane % 2)]
            return {"blueprint": BLUEPRINTS.index(name), "style": style, "alpha_target": target}
        if op == Op.PRUNE:
            self.turned[lane] = True
            return {"alpha_speed": IN_THREE_EPOCHS, "alpha_curve": ALPHA_CURVES.index("SIGMOID")}
        if op == Op.SET_ALPHA_TARGET:
            back, self.turned[lane] = self.turned[lane] or way != 1, True
            style = Style.LINEAR_ADD if lane % 2 else Style.GATED_GATE
            target, speed = (TO_WHOLE, IN_THREE_EPOCHS) if back else (TO_HALF, AT_ONCE)
            return {"style": style, "alpha_target": target, "alpha_speed": speed, "alpha_curve": 1}
        return {}


def started(lanes: list[int], config: EnvironmentConfig, dtype: torch.dtype) -> GrowingHosts:
    hosts = GrowingHosts(len(lanes), config, gamma=GAMMA, dtype=dtype)
    hosts.start(np.arange(len(lanes)), [70 + lane for lane in lanes], [lane % 2 for lane in lanes])
    return hosts


def lane_of(state: Mapping[str, Any], lane: int) -> dict[str, Any]:
    """What a vector's state holds of one lane, as the state of a vector of that lane alone."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(key, part) for key, part in value.items()}
        if name in ("sample_chance", "seed_chance"):
            return value[lane : lane + 1]
        return [cut("", part) for part in value] if isinstance(value, list) else value[lane : lane + 1]

    return {name: cut(name, value) for name, value in state.items()}


def numbers(state: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every array of a nested state, with its place."""
    if isinstance(state, Mapping):
        for key, part in state.items():
            yield from numbers(part, f"{name}.{key}")
    elif isinstance(state, list):
        for index, part in enumerate(state):
            yield from numbers(part, f"{name}[{index}]")
    elif not isinstance(state, str):
        yield name, np.asarray(state)


def assert_same(together: Any, alone: Any, atol: float, rtol: float = 0.0) -> None:
    """Floating point within `atol`; stages, counts, decisions and generators are the same."""
    pairs = list(zip(numbers(together), numbers(alone), strict=True))
    for (name, ours), (same_name, theirs) in pairs:
        assert (name, ours.dtype, ours.shape) == (same_name, theirs.dtype, theirs.shape)
        if np.issubdtype(ours.dtype, np.floating):
            np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def assert_same_result(together: StepResult, alone: StepResult, lane: int, atol: float) -> None:
    for name in ("terminated", "rolled_back", "succeeded"):
        assert getattr(together, name)[lane] == getattr(alone, name)[0], name
    assert together.reward[lane] == pytest.approx(alone.reward[0], abs=atol)
    assert set(together.reward_parts) == set(alone.reward_parts)
    for name, part in together.reward_parts.items():
        assert part[lane] == pytest.approx(alone.reward_parts[name][0], abs=atol), name


@pytest.mark.parametrize(("task", "host"), WORLDS)
def test_a_whole_episode_in_double_precision_is_that_of_each_lane_alone(task: str, host: str) -> None:
    """Losses, accuracies, alphas, parameters, momentum, statistics, rewards, observations; gates decide the same."""
    config, growers = settings(task, host), Growers(host)
    together = started(list(range(growers.lanes)), config, torch.float64)
    alone = [started([lane], config, torch.float64) for lane in range(growers.lanes)]
    computed: set[tuple[int, int]] = set()
    seen_stages: set[int] = set()
    for epoch in range(EPOCHS):
        actions = growers.act(together.view())
        result = together.step(actions)
        state, observed = together.state_dict(), together.observe()
        for lane, hosts in enumerate(alone):
            assert_same_result(result, hosts.step(actions[lane : lane + 1]), lane, 1e-8)
            assert_same(lane_of(state, lane), hosts.state_dict(), 1e-8)
            seen = {key: array[lane : lane + 1] for key, array in observed.items()}
            assert_same(seen, hosts.observe(), 1e-8, rtol=2.0**-22)  # an observation is rounded to float32
        slots = together.slots
        grown = (slots.stage == SeedStage.BLENDING) | (slots.stage == SeedStage.HOLDING)
        computed |= set(zip(slots.blueprint[grown].tolist(), slots.composition[grown].tolist(), strict=True))
        seen_stages |= set(slots.stage.ravel().tolist())
        assert result.terminated.all() == (epoch == EPOCHS - 1)
    assert computed >= {(BLUEPRINTS.index(name), composition) for name, composition in growers.seeds}
    assert {SeedStage.TRAINING, SeedStage.FOSSILIZED, SeedStage.PRUNED, SeedStage.EMBARGOED} <= seen_stages


@pytest.mark.parametrize(("task", "host"), WORLDS)
def test_every_epoch_in_single_precision_is_that_of_each_lane_alone(task: str, host: str) -> None:
    """Begun from the same state: losses, gradient norms, alphas, parameters. (Of accuracies a tie may flip one.)"""
    config, growers = settings(task, host), Growers(host)
    together = started(list(range(growers.lanes)), config, torch.float32)
    alone = started([0], config, torch.float32)
    for _ in range(EPOCHS):
        before, actions = together.state_dict(), growers.act(together.view())
        result = together.step(actions)
        after = together.state_dict()
        for lane in range(growers.lanes):
            alone.load_state_dict(lane_of(before, lane))
            assert alone.step(actions[lane : lane + 1]).succeeded[0] == result.succeeded[lane]
            mine, theirs = lane_of(after, lane), alone.state_dict()
            for part in ("_loss", "_layer_gradient_norms", "bank"):
                assert_same({part: mine[part]}, {part: theirs[part]}, 1e-5)
            for name in (
                "stage",
                "alpha",
                "alpha_mode",
                "gradient_norm",
                "gradient_ratio",
                "gradient_health",
            ):
                assert_same({name: mine["slots"][name]}, {name: theirs["slots"][name]}, 1e-5)
