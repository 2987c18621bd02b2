"""The configuration: ranges of the requirements, unknown keys, overlays, assignments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import config as configuration
from esper_simic.config import Config, fresh_per_batch, parse, to_yaml
from esper_simic.errors import ConfigError

PRESETS = Path(configuration.__file__).parent.parent / "supervisor" / "presets"


def test_empty_text_is_all_defaults_of_the_requirements() -> None:
    trainer = parse("").simic_trainer
    assert (trainer.learning_rate, trainer.batch_size, trainer.gamma) == (3e-4, 32, 0.99)
    assert (trainer.rho_bar, trainer.c_bar, trainer.max_grad_norm) == (1.0, 1.0, 0.5)
    assert parse("").experience_buffer.capacity == 100_000


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_are_valid_and_survive_a_round_trip(preset: Path) -> None:
    config = parse(preset.read_text())
    assert parse(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("assignment", "key", "says"),
    [
        (
            "simic_trainer.batch_size=48",
            "simic_trainer.batch_size",
            "power of two in [8, 256]; near 48: 32 or 64",
        ),
        ("simic_trainer.batch_size=4", "simic_trainer.batch_size", "greater than or equal to 8"),
        ("simic_trainer.batch_size=512", "simic_trainer.batch_size", "less than or equal to 256"),
        ("simic_trainer.learning_rate=0.1", "simic_trainer.learning_rate", "less than or equal to 0.01"),
        ("simic_trainer.gamma=0.5", "simic_trainer.gamma", "greater than or equal to 0.9"),
        ("simic_trainer.gamma=1", "simic_trainer.gamma", "less than or equal to 0.999"),
        ("simic_trainer.device=gpu", "simic_trainer.device", "auto|cpu|cuda"),
        ("simic_trainer.device=cuda:x", "simic_trainer.device", "auto|cpu|cuda"),
        ("simic_trainer.gradient_accumulation=0", "simic_trainer.gradient_accumulation", "greater than"),
        ("simic_trainer.rho_bar=0", "simic_trainer.rho_bar", "greater than 0"),
        ("simic_trainer.learning_rat=1e-3", "simic_trainer.learning_rat", "did you mean 'learning_rate'"),
        ("simic_traner.seed=1", "simic_traner", "did you mean 'simic_trainer'"),
        ("environment.reward.rentweight=1", "environment.reward.rentweight", "did you mean 'rent_weight'"),
        ("environment.blueprints=[conv_lite]", "environment.blueprints", "did you mean 'conv_light'"),
        ("environment.slots=[]", "environment.slots", "at least one slot"),
        ("environment.slots=[r0c0, r0c0]", "environment.slots", "each once"),
        ("environment.max_epochs=8", "environment", "no seed can finish"),
        ("environment.host_lr=.nan", "environment.host_lr", "finite number"),
        ("simic_trainer.entropy_coefficient_final=0.5", "simic_trainer", "must not exceed"),
        ("experience_buffer.capacity=16", "", "cannot hold one batch"),
        ("supervisor.num_actors=no", "supervisor.num_actors", "truth value"),
        ("supervisor.num_actors=few", "supervisor.num_actors", "valid integer"),
        ("simic_trainer=3", "simic_trainer", "valid dictionary"),
    ],
)
def test_bad_values_name_the_key_and_the_remedy(assignment: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("", assignments=[assignment])
    assert caught.value.key == key
    assert says in str(caught.value)


def test_unknown_key_comes_before_other_problems_and_all_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"simic_trainer\.gama: unknown key.*and 2 more problems"):
        parse("simic_trainer: {batch_size: 48, learning_rate: 5, gama: 0.9}")


def test_unknown_key_without_a_near_one_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match="known here: capacity, min_experiences, replay_ratio"):
        parse("experience_buffer: {zzz: 1}")


@pytest.mark.parametrize("text", ["a: [", "- 1", "just words"])
def test_text_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize("assignment", ["nothing", "=1", "a..b=1", "simic_trainer.seed=["])
def test_malformed_assignments_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError):
        parse("", assignments=[assignment])


def test_later_layers_win_key_by_key() -> None:
    base = {"simic_trainer": {"seed": 1, "batch_size": 64}, "environment": {"max_epochs": 30}}
    config = parse(
        "simic_trainer: {seed: 2}", base=base, assignments=["simic_trainer.seed=3", "simic_trainer.seed=4"]
    )
    assert (config.simic_trainer.seed, config.simic_trainer.batch_size, config.environment.max_epochs) == (
        4,
        64,
        30,
    )
    assert base["simic_trainer"]["seed"] == 1


def test_min_experiences_must_fit_and_replay_must_leave_something_fresh() -> None:
    with pytest.raises(ConfigError, match="would never be reached"):
        parse("experience_buffer: {capacity: 64, min_experiences: 65}")
    with pytest.raises(ConfigError, match="leaves no fresh experience"):
        parse("{simic_trainer: {batch_size: 8}, experience_buffer: {replay_ratio: 0.9375}}")


def test_credits_must_fit_into_the_buffer() -> None:
    with pytest.raises(ConfigError, match="unrolls_in_flight"):
        parse("{experience_buffer: {capacity: 64, min_experiences: 32}, supervisor: {num_actors: 8}}")


def test_a_batch_that_the_credits_can_never_fill_is_refused() -> None:
    few = "{supervisor: {num_actors: 1, unrolls_in_flight: 1}, environment: {environments_per_actor: 8}}"
    with pytest.raises(ConfigError, match="wait for ever"):
        parse(few)
    # Two unrolls of 8: seven of the first may be consumed and its credit still be out, so 9 are sure.
    enough = "{supervisor: {num_actors: 1}, environment: {environments_per_actor: 8}, simic_trainer: {batch_size: 8}}"
    assert fresh_per_batch(parse(enough)) == 6


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().simic_trainer.seed = 3  # type: ignore[misc]


@given(st.sampled_from([8, 16, 32, 64, 128, 256]), st.floats(0, 0.875))
def test_every_batch_has_fresh_experience(batch: int, ratio: float) -> None:
    config = parse(
        "supervisor: {num_actors: 16}",
        assignments=[f"simic_trainer.batch_size={batch}", f"experience_buffer.replay_ratio={ratio}"],
    )
    assert 1 <= fresh_per_batch(config) <= batch
    assert abs(fresh_per_batch(config) - batch * (1 - ratio)) <= 0.5


@pytest.mark.parametrize(
    ("identity", "controller"),
    [
        ("esper_simic/GrowingHost-v0", "tamiyo"),
        ("esper_simic/BlueprintChoice-v0", "karn"),
        ("CartPole-v1", "CartPole-v1"),
    ],
)
def test_a_run_says_whose_controller_it_trains(identity, controller):
    assert parse("", assignments=[f"environment.id={identity}"]).controller == controller


def test_a_controller_is_not_trained_under_the_name_of_another():
    with pytest.raises(
        ConfigError, match="controller 'karn' does not act in esper_simic/GrowingHost-v0; that is 't"
    ):
        parse("simic_trainer: {controller: karn}")
    with pytest.raises(
        ConfigError, match="controller 'tamiyo' does not act in esper_simic/BlueprintChoice-v0"
    ):
        parse("{simic_trainer: {controller: tamiyo}, environment: {id: esper_simic/BlueprintChoice-v0}}")
    assert parse("{simic_trainer: {controller: karn}, environment: {id: CartPole-v1}}").controller == "karn"
