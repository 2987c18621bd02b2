"""The keys of `environment` that say which world it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_simic import config as configuration
from esper_simic.config import parse, to_yaml
from esper_simic.config_environment import EnvironmentConfig
from esper_simic.config_gym import GROWING_HOST, GYMNASIUM_KEYS, SHARED_KEYS, WorldKeys
from esper_simic.errors import ConfigError

PRESET = Path(configuration.__file__).parent.parent / "supervisor" / "presets" / "gym.yaml"


def test_hosts_are_grown_unless_another_world_is_named():
    environment = parse("").environment
    assert environment.id == GROWING_HOST
    assert (environment.kwargs, environment.vectorised, environment.success_return) == ({}, "auto", None)


def test_the_preset_is_cart_pole_and_takes_other_ids():
    text = PRESET.read_text()
    assert parse(text).environment.id == "CartPole-v1"
    other = parse(
        text, assignments=["environment.id=FrozenLake-v1", "environment.kwargs.map_name=8x8"]
    ).environment
    assert (other.id, other.kwargs) == ("FrozenLake-v1", {"map_name": "8x8"})


def test_a_gymnasium_configuration_survives_being_written_out_whole():
    text = (
        "environment: {id: Acrobot-v1, kwargs: {max_episode_steps: 200}, success_return: -90, stagger: false}"
    )
    config = parse(text)
    assert parse(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: CartPole", "its version belongs to it"),
        ("id: CartPol-v1", "CartPole"),
        ("id: CartPole-v9", "v1"),
        ("id: Breakout-v5", "package.module:Breakout-v5"),
        ("id: 'a b:X-v0'", "its version belongs to it"),
        ("{id: CartPole-v1, task: wine}", "task is for growing hosts .* 'CartPole-v1'; .* under kwargs"),
        ("{id: CartPole-v1, observation: flat}", "observation is for growing hosts"),
        ("{id: CartPole-v1, success_accuracy: 70}", "success_accuracy is for growing hosts"),
        ("{id: CartPole-v1, reward: {mode: sparse}}", "reward is for growing hosts"),
        ("kwargs: {a: 1}", "kwargs is for other ids"),
        ("vectorised: never", "vectorised is for other ids"),
        ("success_return: 3", "success_return is for other ids"),
        ("{id: CartPole-v1, kwargs: {render_mode: human}}", "'render_mode' is not for a configuration"),
        ("{id: CartPole-v1, kwargs: {num_envs: 3}}", "'num_envs' is not for a configuration"),
        ("{id: CartPole-v1, kwargs: {when: 2026-01-01}}", "'when' must be made of texts"),
        ("{id: CartPole-v1, kwargs: {deep: {1: 2}}}", "'deep' must be made of texts"),
        ("{id: CartPole-v1, kwargs: {lost: [1, .nan]}}", "'lost' must be made of texts, finite numbers"),
        ("{id: CartPole-v1, kwargs: {far: -.inf}}", "'far' must be made of texts, finite numbers"),
        ("{id: CartPole-v1, vectorised: sometimes}", "'auto' or 'never'"),
    ],
)
def test_what_no_world_obeys_is_refused_with_the_reason(text, says):
    body = text if text.startswith("{") else "{" + text + "}"
    with pytest.raises(ConfigError, match=says) as refused:
        parse(f"environment: {body}")
    assert refused.value.key.startswith("environment")


def test_plain_kwargs_pass():
    text = "environment: {id: CartPole-v1, kwargs: {a: [1, 2.5, null, x], b: {c: true}}}"
    assert parse(text).environment.kwargs == {"a": [1, 2.5, None, "x"], "b": {"c": True}}


def test_ids_of_modules_are_left_to_the_processes_that_import_them():
    assert parse("environment: {id: 'no_such.package:Thing-v0'}").environment.id == "no_such.package:Thing-v0"


def test_defaults_that_are_spelled_out_are_no_mistake():
    assert (
        parse("environment: {id: CartPole-v1, task: digits, max_epochs: 60}").environment.id == "CartPole-v1"
    )


def test_every_key_belongs_to_somebody():
    keys = set(EnvironmentConfig.model_fields)
    assert SHARED_KEYS | GYMNASIUM_KEYS | set(WorldKeys.model_fields) <= keys
    assert not SHARED_KEYS & GYMNASIUM_KEYS
