"""Trials of blueprints: each beside a twin that differs in nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from esper_simic import seeding
from esper_simic.actions import BLUEPRINT, BLUEPRINTS, OP, Op
from esper_simic.config import BLUEPRINT_NAMES, EnvironmentConfig
from esper_simic.errors import ConfigError
from esper_simic.growing_host.blueprints import blueprint
from esper_simic.growing_host.controllers import FixedSchedule, NeverGrow
from esper_simic.growing_host.core import GrowingHosts
from esper_simic.growing_host.tasks import load_task
from esper_simic.growing_host.trials import fitting_blueprints, trial_environment, try_blueprints
from esper_simic.lifecycle import SeedStage

SEEDS = (3, 5)
AT = 2
SETTINGS = {"max_epochs": 12, "training_epochs_min": 2, "train_batches": 2}


def environment(**changed: object) -> EnvironmentConfig:
    whole = trial_environment("digits", "rescue", "r0c1", SETTINGS)
    return whole.model_copy(update={"blueprints": ("conv_light", "norm", "lora"), **changed})


def alone(config: EnvironmentConfig, seed: int, kind: str | None) -> GrowingHosts:
    """One host by itself, stepped as a person would; `kind` is grown where it is the time for it."""
    hosts = GrowingHosts(1, config, gamma=0.9)
    hosts.start(np.array([0]), [seeding.derive("trial", seed)], [0])
    for epoch in range(config.max_epochs):
        view = hosts.view()
        if kind is None or epoch < AT:
            actions = NeverGrow().act(view, np.zeros((1, 8)))
        else:
            actions = FixedSchedule().act(view, np.zeros((1, 8)))
            assert (actions[0, OP] == Op.GERMINATE) == (epoch == AT)
            actions[0, BLUEPRINT] = BLUEPRINTS.index(kind)
        hosts.step(actions)
    return hosts


def test_what_a_trial_says_is_what_hosts_come_to_one_by_one() -> None:
    config = environment()
    told: list[int] = []
    found = try_blueprints(config, SEEDS, germinated_at=AT, gamma=0.9, observer=lambda: told.append(1))
    assert len(told) == config.max_epochs
    assert found.seeds == SEEDS
    assert [one.blueprint for one in found.grown] == ["conv_light", "norm"], "lora is not for images"
    for trial, seed in enumerate(SEEDS):
        twin = alone(config, seed, None).view()
        young = alone(config.model_copy(update={"max_epochs": AT}), seed, None).view()
        assert found.accuracy[trial] == pytest.approx(young.accuracy[0, -1], abs=0.5)
        assert found.loss[trial] == pytest.approx(young.loss[0, -1], rel=1e-3)
        for one in found.grown:
            hosts = alone(config, seed, one.blueprint)
            grown = hosts.view()
            # A validation sample is 0.4 points; rounding may tip one over.
            expected = grown.accuracy[0, -1] - twin.accuracy[0, -1]
            assert one.accuracy_change[trial] == pytest.approx(expected, abs=0.8)
            assert one.loss_change[trial] == pytest.approx(grown.loss[0, -1] - twin.loss[0, -1], abs=2e-3)
            assert one.contribution[trial] == pytest.approx(grown.contribution[0, 0], abs=0.8)
            assert one.kept[trial]
            assert grown.stage[0, 0] == SeedStage.FOSSILIZED
            assert one.parameters == blueprint(one.blueprint).parameter_count(2)
    assert found.grown[0].accuracy_change != found.grown[1].accuracy_change


def test_the_place_is_described_as_it_is() -> None:
    place = try_blueprints(environment(), (0,), germinated_at=AT, gamma=0.9).place
    assert (place.task, place.host, place.slot, place.kind) == ("digits", "rescue", "r0c1", "image")
    assert (place.channels, place.positions, place.block, place.blocks, place.behind_pool) == (
        2,
        16,
        1,
        3,
        False,
    )
    assert (place.classes, place.input_size, place.train_size) == (10, 64, 1347)
    assert place.host_parameters == 75


def test_a_seed_that_never_came_to_blend_has_no_worth_and_is_not_kept() -> None:
    config = environment(max_epochs=5, gradient_health_min=1.0, blueprints=("norm",), host="rescue")
    config = config.model_copy(
        update={"training_epochs_min": 2, "gates": "strict", "blending_epochs_min": 50}
    )
    found = try_blueprints(config, (0,), germinated_at=AT, gamma=0.9).grown[0]
    assert found.contribution == (None,)
    assert found.kept == (False,)
    assert found.accuracy_change == (0.0,), "what is not blended in changes nothing"
    assert found.loss_change == (0.0,)


def test_the_environment_of_a_trial() -> None:
    config = trial_environment("wine", "mlp", "r0c0", {"max_epochs": 30})
    assert config.blueprints == BLUEPRINT_NAMES
    assert (config.slots, config.max_epochs) == (("r0c0",), 30)
    assert config.validation_samples == len(load_task("wine").validation_labels) < 256
    assert trial_environment("digits", "rescue", "r0c0", {}).validation_samples == 256
    assert trial_environment("characters", "transformer", "r0c0", {}).validation_samples == 32
    with pytest.raises(ConfigError, match="unknown key"):
        trial_environment("digits", "rescue", "r0c0", {"colour": 1})


def test_what_fits_is_by_the_kind_of_samples() -> None:
    whole = trial_environment("wine", "mlp", "r0c0", {})
    assert set(fitting_blueprints(whole)) == {"norm", "lora", "lora_large", "mlp_small", "mlp"}
    with pytest.raises(ConfigError, match="no blueprint of conv_light takes vector"):
        fitting_blueprints(whole.model_copy(update={"blueprints": ("conv_light",)}))


def test_trials_that_can_tell_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="a trial is of one slot, not of r0c0, r0c1"):
        try_blueprints(environment(slots=("r0c0", "r0c1")), (0,), germinated_at=AT, gamma=0.9)
    with pytest.raises(
        ConfigError, match="germinates at epoch 10 and trains 2 epochs is never blended in within 12"
    ):
        try_blueprints(environment(), (0,), germinated_at=10, gamma=0.9)
