"""Every feature against its definition, written out slot by slot; and graphs that policies can read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_simic.actions import BLUEPRINTS, HEADS, OP, Op
from esper_simic.config import EnvironmentConfig
from esper_simic.growing_host.controllers import RandomController
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.observation import symlog
from esper_simic.lifecycle import SeedStage

LANES, GAMMA = 6, 0.9
CONFIG = EnvironmentConfig(
    max_epochs=50,
    training_epochs_min=1,
    train_batches=2,
    train_batch_size=16,
    validation_samples=40,
    prune_age_min=4,
    embargo_epochs=2,
    slots=("r0c2", "r0c0"),
)
STAGE_ORDER = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
LIVE = {SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.HOLDING, SeedStage.FOSSILIZED}


def literal_symlog(x):
    return math.copysign(math.log(1 + abs(x)), x)


def literal_slot(slots, lane, slot):
    """The 31 features of one slot by their definitions."""

    def value(name):
        return getattr(slots, name)[lane, slot].item()

    def measured(name, otherwise):
        return otherwise if math.isnan(value(name)) else value(name)

    def clip(x):
        return max(-1.0, min(1.0, x))

    stage, horizon = SeedStage(value("stage")), CONFIG.max_epochs
    features = [0.0] * 31
    if stage is SeedStage.DORMANT:
        return features
    alive = stage in LIVE
    features[0] = float(alive)
    features[1 + STAGE_ORDER.index(stage)] = 1.0
    features[11] = value("alpha")
    features[12] = clip(measured("contribution", 0) / 10)
    features[13] = clip(measured("contribution_velocity", 0) / 10)
    features[14] = value("tempo_epochs") / 12
    features[15] = value("alpha_target")
    rising = value("ramp_done") < value("ramp_total")
    features[16] = 0.5 if rising else 0.0
    features[17] = value("ramp_total") / horizon
    features[18] = value("ramp_done") / horizon
    features[19] = (value("ramp_total") - value("ramp_done")) / horizon
    features[20] = value("alpha") - value("alpha_before")
    features[23] = literal_symlog(value("gradient_norm")) / 7
    features[24] = measured("gradient_health", 0)
    features[25], features[26] = float(value("vanishing")), float(value("exploding"))
    features[27] = measured("gradient_health_before", -1) if alive else 0.0
    features[28] = value("epochs_in_stage") / horizon
    if alive:
        since = value("epochs_since_contribution")
        features[29] = GAMMA**since if since >= 0 else -1.0
    features[30] = value("age") / horizon
    return features


def played(epochs, seed=0):
    """Hosts after random growth, with the history that the observation should show."""
    hosts = GrowingHosts(LANES, CONFIG, gamma=GAMMA)
    hosts.start(np.arange(LANES), list(range(LANES)), [0] * LANES)
    rng, losses, accuracies, stages, last = np.random.default_rng(seed), [], [], set(), None
    losses.append(hosts.view().loss[:, -1])
    accuracies.append(hosts.accuracy)
    for _ in range(epochs):
        actions = RandomController().act(hosts.view(), rng.random((LANES, len(HEADS))))
        refused = rng.random(LANES) < 0.3
        actions[refused, OP] = Op.SET_ALPHA_TARGET
        last = (actions[:, OP], hosts.step(actions).succeeded)
        losses.append(hosts.view().loss[:, -1])
        accuracies.append(hosts.accuracy)
        stages |= set(hosts.slots.stage.ravel().tolist())
    return hosts, np.array(losses), np.array(accuracies), stages, last


@pytest.mark.parametrize("epochs", [1, 7, 20, 45])
def test_slot_features_are_their_definitions(epochs):
    hosts, *_ = played(epochs)
    nodes = hosts.observe()["slot_nodes"]
    expected = [[literal_slot(hosts.slots, lane, slot) for slot in range(2)] for lane in range(LANES)]
    np.testing.assert_allclose(nodes, np.array(expected), atol=1e-6)


def test_random_growth_visits_every_stage_but_the_one_that_ends_in_its_own_step():
    *_, stages, _ = played(45)
    assert stages == {int(stage) for stage in SeedStage} - {SeedStage.PRUNED}


@pytest.mark.parametrize("epochs", [1, 3, 9])
def test_global_features_are_their_definitions(epochs):
    hosts, losses, accuracies, _, (ops, succeeded) = played(epochs)
    features = hosts.observe()["globals"]
    for lane in range(LANES):
        past_losses = [literal_symlog(loss) / 7 for loss in losses[-5:, lane]]
        past_accuracies = [accuracy / 100 for accuracy in accuracies[-5:, lane]]
        absent = [-1.0] * (5 - len(past_losses))
        stage = hosts.slots.stage[lane].tolist()
        shares = [
            stage.count(SeedStage.TRAINING) / 2,
            stage.count(SeedStage.BLENDING) / 2,
            (stage.count(SeedStage.HOLDING) + stage.count(SeedStage.FOSSILIZED)) / 2,
        ]
        expected = [
            epochs / CONFIG.max_epochs,
            past_losses[-1],
            past_accuracies[-1],
            *absent,
            *past_losses,
            *absent,
            *past_accuracies,
            *shares,
            float(succeeded[lane]),
            *(float(ops[lane] == op) for op in Op),
        ]
        np.testing.assert_allclose(features[lane], expected, atol=1e-6)


def test_host_features_are_their_definitions():
    hosts, *_ = played(3)
    nodes = hosts.observe()["host_nodes"]
    rows = hosts.bank.parameters[:, :75].numpy()
    layers = [(1, 64, 3, 0), (2, 16, 6, 3), (4, 4, 16, 9), (10, 1, 50, 25)]
    for lane in range(LANES):
        for layer, (outputs, positions, count, start) in enumerate(layers):
            norm = float(np.linalg.norm(rows[lane, start : start + count]))
            gradient = hosts._layer_gradient_norms[lane, layer]
            expected = [
                layer / 3,
                math.log2(1 + outputs) / 8,
                math.log2(1 + positions) / 12,
                math.log(1 + count) / 12,
                literal_symlog(norm) / 7,
                literal_symlog(gradient) / 7,
                float(layer == 3),
                float(layer < 3),
            ]
            np.testing.assert_allclose(nodes[lane, layer], expected, atol=1e-5)
    assert (nodes[:, -1, 5] > 0).all()


def test_slots_point_at_the_layer_they_sit_behind_and_at_their_blueprint():
    hosts, *_ = played(12)
    observed = hosts.observe()
    assert observed["slot_host"].tolist() == [[2, 0]] * LANES
    assert observed["host_mask"].all()
    assert observed["slot_mask"].all()
    holds = np.isin(hosts.slots.stage, list(LIVE))
    np.testing.assert_array_equal(observed["slot_blueprint"] < len(BLUEPRINTS), holds)
    assert holds.any()
    assert not holds.all()


@pytest.mark.parametrize("x", [-3.0, 0.0, 1e9])
def test_symlog(x):
    assert symlog(np.array(x)) == pytest.approx(literal_symlog(x))
