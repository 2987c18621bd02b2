"""`simic_trainer`: the curriculum, from easy environments to the configured one.

A stage says when it is passed, and what of `environment` is different in it. Stages that name nothing change nothing,
and with no stage that does there is no curriculum to follow (`follows_curriculum`), whatever `curriculum_enabled` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from esper_simic.config_environment import HOST_SURFACES, EnvironmentConfig
from esper_simic.config_section import Section, did_you_mean

WORLDS_WORD: Final = "success"

FIXED_KEYS: Final[dict[str, str]] = {
    "id": "one policy is trained in one kind of world",
    "observation": "one policy sees one form of observation",
    "environments_per_actor": "actors, buffers and credits are made for as many lanes",
}
"""Keys of `environment` that no stage may change, and why."""

ROUNDING: Final = 1e-9
"""A product that is a whole number but for rounding counts as that number."""

Measure = Literal["success", "accuracy", "return"]


@dataclass(frozen=True, slots=True)
class SuccessRule:
    """When an episode counts as a success.

    Attributes:
        measure: `success`, the world's own word; or `accuracy` (percent, at the episode's end) or `return` to be
            compared.
        least: The least accuracy or return; without meaning for the world's own word.
    """

    measure: Measure
    least: float = 0.0


def success_rule(text: str) -> SuccessRule:
    """Read `success`, `accuracy >= x` or `return >= x`.

    Raises:
        ValueError: It is none of these.
    """
    if text.strip() == WORLDS_WORD:
        return SuccessRule("success")
    measure, separator, number = (part.strip() for part in text.partition(">="))
    if separator and measure in ("accuracy", "return"):
        least = _number(number)
        if measure == "accuracy" and 0 <= least <= 100:
            return SuccessRule("accuracy", least)
        if measure == "return" and math.isfinite(least):
            return SuccessRule("return", least)
    raise ValueError(
        "a success is 'success' (the world's own word), 'accuracy >= x' (0 to 100, percent) or 'return >= x'"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class CurriculumStage(Section):
    """One stage: how hard it is, when it is passed, and what is different in it."""

    name: str = Field(min_length=1, max_length=64, description="Its name in events, requests and metrics.")
    difficulty: float = Field(
        ge=0, le=1, description="How hard its environment is; 1: the configured one, uneased."
    )
    min_success_rate: float = Field(gt=0, le=1, description="Share of successes that passes it.")
    min_episodes: int = Field(ge=1, le=1_000_000, description="Episodes after which it can be passed.")
    max_episodes: int = Field(
        ge=1,
        le=1_000_000,
        description="Episodes after which a round without the success rate has failed and the next one begins.",
    )
    success: str | None = Field(
        None, description="What is a success in this stage; unset: curriculum_success."
    )
    environment: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of environment that are different in this stage, such as {host: augment, max_epochs: 60}.",
    )

    @field_validator("success")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            success_rule(value)
        return value

    @field_validator("environment")
    @classmethod
    def _known_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = EnvironmentConfig.model_fields
        for key in value:
            if key in FIXED_KEYS:
                raise ValueError(f"no stage can change environment.{key}: {FIXED_KEYS[key]}")
            if key not in known:
                raise ValueError(f"unknown key environment.{key}{did_you_mean(key, known)}")
        return value

    @model_validator(mode="after")
    def _can_be_passed(self) -> CurriculumStage:
        if self.min_episodes > self.max_episodes:
            raise ValueError(
                f"stage {self.name!r} can never be passed: min_episodes {self.min_episodes} exceeds max_episodes "
                f"{self.max_episodes}, after which a round ends"
            )
        return self


def _default_stages() -> tuple[CurriculumStage, ...]:
    rows = (
        ("basic", 0.25, 0.7, 100, 500),
        ("intermediate", 0.5, 0.6, 200, 1000),
        ("advanced", 0.75, 0.5, 300, 1500),
        ("expert", 1.0, 0.4, 500, 2000),
    )
    return tuple(
        CurriculumStage(
            name=name,
            difficulty=difficulty,
            min_success_rate=rate,
            min_episodes=least,
            max_episodes=most,
            success=None,
        )
        for name, difficulty, rate, least, most in rows
    )


class CurriculumKeys(Section):
    """The curriculum's keys of `simic_trainer`."""

    curriculum_enabled: bool = Field(
        True,
        description="Train in the stages of curriculum_stages, one after the other, as far as they change the "
        "environment. The default stages do not: without a stage that names keys of environment, or "
        "curriculum_difficulty other than named, training is in the configured environment from the start.",
    )
    curriculum_stages: tuple[CurriculumStage, ...] = Field(
        default_factory=_default_stages,
        max_length=100,
        description="The stages in order, difficulties rising.",
    )
    curriculum_difficulty: Literal["named", "budget"] = Field(
        "named",
        description="What a stage's difficulty does by itself. named: nothing, only what the stage names is different; "
        "budget: hosts train train_batches x (2 - difficulty) batches an epoch where the stage names no train_batches.",
    )
    curriculum_success: str = Field(
        WORLDS_WORD,
        description="What is a success where a stage does not say: success (the world's own word), 'accuracy >= 80' "
        "(percent, at the end) or 'return >= 475'.",
    )
    curriculum_breaker_failure_threshold: int = Field(
        5, ge=1, le=1000, description="Failed rounds in a row after which no progress is judged for a while."
    )
    curriculum_breaker_recovery_timeout_s: float = Field(
        120.0, gt=0, le=86_400, description="Seconds until progress is judged again."
    )

    @field_validator("curriculum_success")
    @classmethod
    def _readable_success(cls, value: str) -> str:
        success_rule(value)
        return value

    @field_validator("curriculum_stages")
    @classmethod
    def _stages_rise(cls, value: tuple[CurriculumStage, ...]) -> tuple[CurriculumStage, ...]:
        if not value:
            raise ValueError("there must be a stage; curriculum_enabled: false trains without a curriculum")
        names = [stage.name for stage in value]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need names of their own, not {', '.join(names)}")
        for easier, harder in pairwise(value):
            if harder.difficulty <= easier.difficulty:
                raise ValueError(
                    f"difficulties must rise: {harder.name!r} has {harder.difficulty:g}, {easier.name!r} before it "
                    f"{easier.difficulty:g}"
                )
        return value

    @property
    def follows_curriculum(self) -> bool:
        """Whether there is a curriculum to follow: it is enabled, and some stage has an environment of its own."""
        eases = self.curriculum_difficulty == "budget" and any(
            stage.difficulty < 1 for stage in self.curriculum_stages
        )
        return self.curriculum_enabled and (
            eases or any(stage.environment for stage in self.curriculum_stages)
        )


Surface = Callable[[EnvironmentConfig], object]


def surface_of(environment: EnvironmentConfig) -> object:
    """What decides the shapes of observations and actions of a growing host: its blocks, and how many slots it has."""
    return HOST_SURFACES[environment.host][0], len(environment.slots)


def environment_of(
    environment: EnvironmentConfig, stage: CurriculumStage, difficulty: Literal["named", "budget"] = "named"
) -> EnvironmentConfig:
    """The environment of a stage.

    Args:
        environment: The configured one.
        stage: Its `environment` is laid over, mappings key by key.
        difficulty: Under `budget` a stage that names no `train_batches` gets
            `ceil(train_batches x (2 - difficulty))`: difficulty 1 is the configured budget, 0 twice that.

    Raises:
        ValueError: It would not be a valid one, with the stage and the key.
    """
    changes: dict[str, Any] = dict(stage.environment)
    if difficulty == "budget" and "train_batches" not in changes:
        eased = environment.train_batches * (2 - stage.difficulty)
        changes["train_batches"] = math.ceil(eased - ROUNDING)
    if not changes:
        return environment
    try:
        return type(environment).model_validate(_laid_over(environment.model_dump(), changes))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("environment", *(str(part) for part in first["loc"])))
        raise ValueError(
            f"stage {stage.name!r}, {key}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def stage_environments(
    keys: CurriculumKeys, environment: EnvironmentConfig, surface: Surface = surface_of
) -> tuple[EnvironmentConfig, ...]:
    """The environment of every stage, each checked to suit the one policy.

    Args:
        keys: The curriculum.
        environment: The configured one.
        surface: What has to be equal in all stages for observations and actions to have the same shapes.

    Returns:
        One a stage where there is a curriculum to follow, otherwise the configured one alone.

    Raises:
        ValueError: One is not valid, or is of another shape; with the stage and the reason.
    """
    if not keys.follows_curriculum:
        return (environment,)
    made = []
    for stage in keys.curriculum_stages:
        made.append(environment_of(environment, stage, keys.curriculum_difficulty))
        wanted, found = surface(environment), surface(made[-1])
        if found != wanted:
            raise ValueError(
                f"stage {stage.name!r} would need another policy: shapes of observations and actions follow from "
                f"{wanted} (blocks of the host, slots) in environment and from {found} in this stage; name a host with "
                f"as many blocks, and as many slots"
            )
    return tuple(made)


def _laid_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = _laid_over(below, value)
        else:
            result[key] = value
    return result
