"""An episode read back from its observations is the episode that happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esper_simic.actions import BLUEPRINTS, HEADS
from esper_simic.config import EnvironmentConfig
from esper_simic.errors import ContractError
from esper_simic.growing_host.controllers import RandomController
from esper_simic.growing_host.lifelines import Layer, Lifeline, Span, read_lifeline, stages
from esper_simic.growing_host.observation import slot_features
from esper_simic.growing_host.slots import SlotTable
from esper_simic.growing_host.vector import GrowingHostVectorEnv
from esper_simic.lifecycle import OCCUPIED, SeedStage

CONFIG = EnvironmentConfig(
    max_epochs=40,
    training_epochs_min=3,
    train_batches=2,
    train_batch_size=8,
    validation_samples=40,
    stagger=False,
)


def played(epochs: int = 39, lanes: int = 4) -> tuple[list[dict[str, Any]], list[Any]]:
    """Observations and views of random growth, epoch by epoch."""
    env = GrowingHostVectorEnv(lanes, CONFIG, gamma=0.99, lane_seeds=range(lanes))
    controller, chance = RandomController(), np.random.default_rng(0)
    observation, _ = env.reset()
    observations, views = [observation], [env.view()]
    for _ in range(epochs):
        actions = controller.act(env.view(), chance.random((lanes, len(HEADS))))
        observation, *_ = env.step(actions)
        observations.append({key: np.array(value) for key, value in observation.items()})
        views.append(env.view())
    return observations, views


def test_what_is_read_back_is_what_happened() -> None:
    observations, views = played()
    seen_stages: set[int] = set()
    for lane in range(4):
        lifeline = read_lifeline(
            {key: np.stack([one[key][lane] for one in observations]) for key in observations[0]}
        )
        assert lifeline.slot_layer == (0, 1, 2)
        stage = np.stack([view.stage[lane] for view in views])
        np.testing.assert_array_equal(lifeline.stage, stage)
        np.testing.assert_allclose(lifeline.alpha, [view.alpha[lane] for view in views], atol=1e-6)
        np.testing.assert_allclose(lifeline.accuracy, [view.accuracy[lane, -1] for view in views], atol=1e-4)
        names = [
            [
                "" if not OCCUPIED[s] else BLUEPRINTS[b]
                for s, b in zip(v.stage[lane], v.blueprint[lane], strict=True)
            ]
            for v in views
        ]
        assert lifeline.blueprint.tolist() == names
        seen_stages |= set(stage.ravel().tolist())
    assert len(seen_stages) >= 7, "random growth passes through nearly all stages"


def test_every_stage_is_read_from_its_own_column() -> None:
    table = SlotTable(1, len(SeedStage))
    table.stage[0] = list(SeedStage)
    read = stages(slot_features(table, horizon=40, gamma=0.99))
    assert read[0].tolist() == list(SeedStage)


def test_layers_are_read_back_with_their_sizes() -> None:
    env = GrowingHostVectorEnv(1, CONFIG, gamma=0.99, lane_seeds=[0])
    observation, _ = env.reset()
    read = read_lifeline({key: np.stack([value[0]]) for key, value in observation.items()})
    assert read.layers == (
        Layer(1, 3, False),
        Layer(2, 6, False),
        Layer(4, 16, False),
        Layer(10, 50, True),
    )


def lifeline_of(stage: list[SeedStage], blueprint: list[str]) -> Lifeline:
    epochs = len(stage)
    return Lifeline(
        layers=(),
        slot_layer=(0,),
        stage=np.array(stage, dtype=np.int8)[:, None],
        blueprint=np.array(blueprint)[:, None],
        alpha=np.zeros((epochs, 1)),
        composition=np.zeros(1, dtype=np.int64),
        accuracy=np.zeros(epochs),
    )


def test_spans_are_runs_of_one_seed_in_one_stage() -> None:
    S = SeedStage
    stage = [S.DORMANT, S.GERMINATED, S.TRAINING, S.TRAINING, S.PRUNED, S.DORMANT, S.TRAINING]
    found = lifeline_of(stage, ["", "norm", "norm", "norm", "", "", "attention"]).spans()
    assert found == [
        Span(0, S.GERMINATED, "norm", 1, 2),
        Span(0, S.TRAINING, "norm", 2, 4),
        Span(0, S.PRUNED, "", 4, 5),
        Span(0, S.TRAINING, "attention", 6, 7),
    ]


def test_another_seed_in_the_same_stage_is_another_span() -> None:
    found = lifeline_of([SeedStage.TRAINING] * 3, ["norm", "attention", "attention"]).spans()
    assert [(span.blueprint, span.start, span.stop) for span in found] == [
        ("norm", 0, 1),
        ("attention", 1, 3),
    ]


def test_spans_cover_every_epoch_of_an_occupied_slot_once() -> None:
    observations, _ = played(30, 1)
    read = read_lifeline({key: np.stack([one[key][0] for one in observations]) for key in observations[0]})
    covered = np.full(read.stage.shape, SeedStage.DORMANT)
    for span in read.spans():
        assert (covered[span.start : span.stop, span.slot] == SeedStage.DORMANT).all()
        covered[span.start : span.stop, span.slot] = span.stage
    np.testing.assert_array_equal(covered, read.stage)


def test_observations_of_another_version_are_refused() -> None:
    with pytest.raises(ContractError, match="another version"):
        read_lifeline({"slot_nodes": np.zeros((1, 3, 5)), "host_nodes": np.zeros((1, 4, 8))})
