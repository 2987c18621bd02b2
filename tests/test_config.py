"""The configuration: ranges of the requirements, unknown keys, overlays, assignments."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic import config as configuration
from esper_simic.actions import HEADS
from esper_simic.config import Config, fresh_per_batch, parse, to_yaml
from esper_simic.errors import ConfigError
from supervisor.config_file import config_of

PRESETS = Path(configuration.__file__).parent.parent / "supervisor" / "presets"


def test_empty_text_is_all_defaults_of_the_requirements() -> None:
    trainer = parse("").simic_trainer
    assert (trainer.learning_rate, trainer.batch_size, trainer.gamma) == (3e-4, 32, 0.99)
    assert (trainer.rho_bar, trainer.c_bar, trainer.max_grad_norm) == (1.0, 1.0, 0.5)
    assert parse("").experience_buffer.capacity == 100_000


REQUIRED: Final = {
    "algorithm": "IMPALA",
    "learning_rate": 3e-4,
    "policy_lr": None,
    "value_lr": None,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "batch_size": 32,
    "gamma": 0.99,
    "max_grad_norm": 0.5,
    "rho_bar": 1.0,
    "c_bar": 1.0,
    "target_throughput_exp_sec": 180.0,
    "convergence_time_hours": 48.0,
    "epoch_boundary_budget_ms": 18.0,
    "training_step_budget_ms": 500.0,
    "ewc_lambda": 0.1,
    "ewc_sample_size": 200,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,
    "curriculum_enabled": True,
    "max_validation_loss": 0.5,
    "circuit_breaker_failure_threshold": 3,
    "circuit_breaker_recovery_timeout_s": 30.0,
    "conservative_batch_size_factor": 0.5,
    "conservative_timeout_factor": 1.5,
    "training_timeout_hours": 24.0,
    "unstable_grad_norm": 10.0,
    "exploding_grad_norm": 100.0,
    "memory_pressure_fraction": 0.9,
}
"""Names and defaults as the requirements give them; unset rates are those of `learning_rate`."""


@pytest.mark.parametrize("key", REQUIRED)
def test_each_key_of_the_requirements_has_its_name_and_default(key: str) -> None:
    assert getattr(parse("").simic_trainer, key) == REQUIRED[key]


@pytest.mark.parametrize(
    ("key", "wrong", "range_"),
    [
        ("policy_lr", 0.1, "less than or equal to 0.01"),
        ("value_lr", 1e-7, "greater than or equal to 0.000001"),
        ("warmup_epochs", -1, "greater than or equal to 0"),
        ("min_lr", 0, "greater than 0"),
        ("unroll_length", 0, "greater than or equal to 1"),
        ("unroll_length", 1001, "less than or equal to 1000"),
        ("max_policy_lag", 0, "greater than or equal to 1"),
        ("hidden_size", 4, "greater than or equal to 8"),
        ("graph_layers", 9, "less than or equal to 8"),
        ("ewc_lambda", -0.1, "greater than or equal to 0"),
        ("ewc_sample_size", 0, "greater than or equal to 1"),
        ("lora_rank", -1, "greater than or equal to 0"),
        ("lora_alpha", 0, "greater than 0"),
        ("lora_dropout", 1, "less than 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_range_and_value(
    key: str, wrong: float, range_: str
) -> None:
    with pytest.raises(ConfigError) as said:
        parse("", assignments=[f"simic_trainer.{key}={wrong!r}"])
    assert said.value.key == f"simic_trainer.{key}"
    assert range_ in str(said.value)
    assert "(given: " in str(said.value)


def test_what_its_own_policy_did_is_learned_from_once() -> None:
    with pytest.raises(ConfigError, match="replay_ratio must be 0 with it, it is 0.25"):
        parse("simic_trainer: {algorithm: PPO}")
    assert parse(
        "{simic_trainer: {algorithm: PPO}, experience_buffer: {replay_ratio: 0}}"
    ).simic_trainer.algorithm


def test_appo_is_not_left_without_its_advantages() -> None:
    with pytest.raises(ConfigError, match="APPO takes its advantages from V-trace.*or take PPO"):
        parse("simic_trainer: {algorithm: APPO, vtrace_enabled: false}")
    assert not parse("simic_trainer: {vtrace_enabled: false}").simic_trainer.vtrace_enabled


COEFFICIENT = "simic_trainer.entropy_floor_coefficients={leap: 0.5}"


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("entropy_floors", ["simic_trainer.entropy_floors={leap: 0.5}", COEFFICIENT]),
        ("entropy_floor_coefficients", ["simic_trainer.entropy_floors={}", COEFFICIENT]),
        ("entropy_multipliers", ["simic_trainer.entropy_multipliers={op: 2, leap: 0.5}"]),
    ],
)
def test_a_head_that_growing_hosts_lack_is_refused_with_those_they_have(key: str, given: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("", assignments=given)
    assert f"simic_trainer.{key} names leap" in str(caught.value)
    assert f"this world's heads are {', '.join(HEADS)};" in str(caught.value)
    elsewhere = parse("", assignments=[*given, "environment.id=CartPole-v1"])
    assert elsewhere.simic_trainer, "whose heads are not known before it is made"


def test_numbers_of_some_heads_may_be_given_and_none_at_all() -> None:
    trainer = parse("simic_trainer: {entropy_floors: {op: 0.5}, entropy_multipliers: {}}").simic_trainer
    assert (trainer.entropy_floors, trainer.entropy_multipliers) == ({"op": 0.5}, {})


@pytest.mark.parametrize(
    "given",
    [
        ["simic_trainer.min_lr=1e-2"],
        ["simic_trainer.entropy_multipliers={leap: 0.5}"],
        ["simic_trainer.algorithm=BC"],
    ],
)
def test_what_only_does_nothing_ends_no_run_that_was_begun_with_it(given: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse("", assignments=given)
    recorded = parse("", assignments=given, is_recorded=True)
    assert config_of(recorded.model_dump(mode="json")) == recorded
    with pytest.raises(ConfigError, match="unknown key"):
        parse("", assignments=[*given, "simic_trainer.leap=1"], is_recorded=True)


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
        ("simic_trainer.min_lr=1e-3", "simic_trainer", "min_lr 0.001 is above learning_rate 0.0003"),
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


def test_unknown_key_of_a_large_section_says_where_they_are_listed() -> None:
    with pytest.raises(
        ConfigError, match=r"simic_trainer\.recurrent: unknown key; `config explain simic_trainer\.`"
    ) as said:
        parse("simic_trainer: {recurrent: true}")
    assert "learning_rate" not in str(said.value)


def test_key_without_its_section_names_the_section() -> None:
    with pytest.raises(ConfigError, match=r"unknown key; did you mean simic_trainer\.learning_rate\?$"):
        parse("", assignments=["learning_rate=1"])


def test_unknown_key_in_an_item_of_a_list_names_those_of_an_item() -> None:
    with pytest.raises(ConfigError, match=r"curriculum_stages\.0\.nme: unknown key; did you mean 'name'\?"):
        parse("simic_trainer: {curriculum_stages: [{nme: a}]}")
    with pytest.raises(
        ConfigError, match=r"0\.zzz: unknown key; known here: name, difficulty, min_success_rate, "
    ):
        parse("simic_trainer: {curriculum_stages: [{zzz: a}]}")


def test_keys_that_lack_are_named_together() -> None:
    with pytest.raises(ConfigError) as said:
        parse("simic_trainer: {curriculum_stages: [{name: a, difficulty: 0.5}]}")
    assert str(said.value) == (
        "simic_trainer.curriculum_stages.0: must have min_success_rate, min_episodes, max_episodes"
    )


def test_a_curriculum_without_stages_names_the_key_that_trains_without_one() -> None:
    with pytest.raises(ConfigError, match="curriculum_enabled: false trains without a curriculum"):
        parse("simic_trainer: {curriculum_stages: []}")


@pytest.mark.parametrize(
    ("environment", "network", "says"),
    [
        ("id: CartPole-v1", "graph", "CartPole-v1 is observed as a vector; take auto, mlp or lstm"),
        ("observation: flat", "graph", "is observed as a vector"),
        ("observation: graph", "lstm", "observation is graph; take network graph, or observation flat"),
        ("observation: graph", "mlp", "reads vectors"),
    ],
)
def test_a_network_that_cannot_read_what_is_observed_is_refused(
    environment: str, network: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(f"{{environment: {{{environment}}}, simic_trainer: {{network: {network}}}}}")


@pytest.mark.parametrize(
    ("environment", "network"),
    [("observation: graph", "graph"), ("observation: flat", "lstm"), ("id: CartPole-v1", "mlp")],
)
def test_a_network_that_can_read_what_is_observed_is_taken(environment: str, network: str) -> None:
    text = f"{{environment: {{{environment}}}, simic_trainer: {{network: {network}}}}}"
    assert parse(text).simic_trainer.network == network


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
