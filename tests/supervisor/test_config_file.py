"""Configurations from presets, files and assignments; what cannot be read; keys explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic.fields import FieldInfo

from esper_simic.config import Config, EnvironmentConfig, TrainerConfig, parse, to_yaml
from esper_simic.config_curriculum import CurriculumStage
from esper_simic.errors import ConfigError
from supervisor import config_file


def test_the_shipped_presets_are_all_obeyable() -> None:
    assert "digits" in config_file.preset_names()
    for name in config_file.preset_names():
        assert isinstance(config_file.load(name), Config)


def test_defaults_preset_file_and_assignments_overlay_in_this_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("simic_trainer:\n  seed: 3\n  vtrace_lambda: 0.5\n")
    config = config_file.load("digits", path, ["simic_trainer.seed=4"])
    assert config.simic_trainer.seed == 4
    assert config.simic_trainer.vtrace_lambda == 0.5
    assert config.simic_trainer.learning_rate == 7e-4, "from the preset"
    assert config.simic_trainer.batch_size == Config().simic_trainer.batch_size, "from the defaults"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.touch()
    assert config_file.load("digits", path) == config_file.load("digits")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'digit'; shipped: digits"):
        config_file.load("digit")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "cannot read {path}: No such file"),
        (b"", "cannot read {path}: Is a directory"),
        (b"seed: \xff\n", "{path} is not UTF-8 text: byte 6 is 0xff"),
        (b"a: [1\n", "{path}: not valid YAML"),
        (b"- 1\n", "{path}: the top of a configuration is a mapping"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, contents: bytes | None, words: str) -> None:
    path = tmp_path / "mine.yaml"
    if contents == b"":
        path.mkdir()
    elif contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        config_file.load("digits", path)
    assert words.format(path=path) in str(caught.value)


def test_what_a_journal_recorded_gives_the_same_configuration() -> None:
    config = config_file.load("digits", None, ["environment.slots=[r0c1]"])
    assert config_file.config_of(config.model_dump(mode="json")) == config


def test_what_another_version_recorded_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"simic_trainer\.batchsize: unknown key"):
        config_file.config_of({"simic_trainer": {"batchsize": 32}})


def field(model: type[TrainerConfig] | type[EnvironmentConfig], name: str) -> FieldInfo:
    return model.model_fields[name]


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (field(TrainerConfig, "learning_rate"), "in [1e-06, 0.01]"),
        (field(TrainerConfig, "policy_lr"), "in [1e-06, 0.01]"),
        (field(TrainerConfig, "min_lr"), "in (0, 0.01]"),
        (field(EnvironmentConfig, "momentum"), "in [0, 1)"),
        (field(TrainerConfig, "warmup_epochs"), ">= 0"),
        (field(TrainerConfig, "rho_bar"), "> 0"),
        (field(TrainerConfig, "algorithm"), "one of IMPALA, PPO, APPO, IQL, BC"),
        (field(TrainerConfig, "entropy_floors"), "each in [0, 1]"),
        (field(TrainerConfig, "entropy_multipliers"), "each >= 0"),
        (field(EnvironmentConfig, "kwargs"), ""),
        (FieldInfo.from_annotation(Literal["fast"]), "only fast"),  # type: ignore[arg-type]
        (FieldInfo.from_annotation(Literal["a", "b"] | None), "one of a, b"),  # type: ignore[arg-type]
        (FieldInfo.from_annotation(tuple[Literal["a", "b"], ...]), "each one of a, b"),
        (field(EnvironmentConfig, "stagger"), "true or false"),
        (field(EnvironmentConfig, "slots"), ""),
    ],
)
def test_what_a_key_accepts_is_said_in_words(described: FieldInfo, words: str) -> None:
    assert config_file.allowed_words(described) == words


MAPPINGS = {
    "simic_trainer.entropy_multipliers",
    "simic_trainer.entropy_floors",
    "simic_trainer.entropy_floor_coefficients",
    "environment.kwargs",
}
"""Keys whose values are mappings; all other mappings are sections."""


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of the keys of a configuration, as its YAML has them."""
    for name, value in section.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in MAPPINGS:
            yield from leaves(value, f"{path}.")
        else:
            yield path


def test_every_key_of_the_configuration_is_explained_once_with_words() -> None:
    explained = config_file.explain("digits")
    paths = [key.path for key in explained]
    assert len(set(paths)) == len(paths)
    assert [path for path in paths if "[]" not in path] == list(leaves(yaml.safe_load(to_yaml(Config()))))
    assert all(key.description.endswith(".") for key in explained)
    assert not any(word in key.allowed for key in explained for word in ("Ge(", "Le(", "Gt(", "Lt("))


def test_explaining_tells_default_and_the_presets_value() -> None:
    keys = {key.path: key for key in config_file.explain("digits", "simic_trainer.")}
    rate = keys["simic_trainer.learning_rate"]
    assert (rate.value, rate.default) == ("0.0007", "0.0003")
    assert keys["simic_trainer.policy_lr"].value == "unset"
    slots = config_file.explain("digits", "environment.slots")
    assert [key.value for key in slots] == ["[r0c0, r0c1, r0c2]"]
    (floors,) = config_file.explain("digits", "entropy_floors")
    assert yaml.safe_load(floors.value) == config_file.load("digits").simic_trainer.entropy_floors
    assert "'" not in floors.value
    assert [key.default for key in config_file.explain("digits", "mask_gates")] == ["true"]
    assert [key.path for key in config_file.explain("digits", "reward.mode")] == ["environment.reward.mode"]


def test_stages_are_explained_as_they_are_written_and_key_by_key() -> None:
    (stages, *inner) = config_file.explain("digits", "curriculum_stages")
    trainer = config_file.load("digits").simic_trainer
    written = parse(f"simic_trainer: {{curriculum_stages: {stages.value}}}").simic_trainer
    assert written.curriculum_stages == trainer.curriculum_stages
    assert [key.path.rpartition("[].")[2] for key in inner] == list(CurriculumStage.model_fields)
    rate = next(key for key in inner if key.path.endswith("min_success_rate"))
    assert (rate.value, rate.default, rate.allowed) == ("of each", "required", "in (0, 1]")


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="flux: no such key"):
        config_file.explain("digits", "flux")
