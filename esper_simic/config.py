"""One frozen, validated configuration.

A run obeys exactly one `Config`: defaults, overlaid by a preset, a YAML file and `--set a.b=c` assignments, parsed
once at start and passed on by section. Unknown keys are refused with a suggestion, values outside their range with
the range. A key enters this schema together with the code that obeys it.

Sections carry the names of the requirements: `simic_trainer`, `experience_buffer`, `supervisor`, `environment`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator

from esper_simic.actions import HEADS
from esper_simic.config_behaviour import POLICY
from esper_simic.config_curriculum import stage_environments, success_rule
from esper_simic.config_environment import (
    BLUEPRINT_NAMES,
    DEFAULT_BLUEPRINTS,
    HOST_NAMES,
    HOST_SURFACES,
    EnvironmentConfig,
    GovernorConfig,
    slot_names,
)
from esper_simic.config_gym import BLUEPRINT_CHOICE, GROWING_HOST
from esper_simic.config_rewards import RewardConfig
from esper_simic.config_section import RECORDED, Section, did_you_mean, was_recorded
from esper_simic.config_trainer import IMITATING, ON_POLICY, TrainerConfig
from esper_simic.errors import ConfigError

__all__ = [
    "BLUEPRINT_NAMES",
    "DEFAULT_BLUEPRINTS",
    "HOST_NAMES",
    "HOST_SURFACES",
    "BufferConfig",
    "Config",
    "EnvironmentConfig",
    "GovernorConfig",
    "RewardConfig",
    "SupervisorConfig",
    "TrainerConfig",
    "explained",
    "fresh_per_batch",
    "parse",
    "parse_mapping",
    "section_in",
    "slot_names",
    "to_yaml",
]


class BufferConfig(Section):
    """`experience_buffer`: what the learner keeps to learn from again."""

    capacity: int = Field(100_000, ge=8, description="Experiences kept; the oldest goes first.")
    min_experiences: int = Field(1_000, ge=1, description="Experiences admitted before the first update.")
    replay_ratio: float = Field(
        0.25,
        ge=0,
        le=0.9375,
        description="Share of each batch drawn from the buffer; the rest is fresh. "
        "Every experience is thus used 1 / (1 - replay_ratio) times on average.",
    )


class SupervisorConfig(Section):
    """`supervisor`: processes, limits, journal, evaluation."""

    num_actors: int = Field(2, ge=1, le=512, description="Actor processes, one thread each.")
    learner_threads: int = Field(1, ge=1, le=256, description="Intra-op threads of the learner.")
    unrolls_in_flight: int = Field(
        2, ge=1, le=64, description="Credits: unrolls of one actor not yet consumed."
    )
    max_seconds: float | None = Field(
        None, gt=0, description="Training ends after so many seconds of this invocation."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Training ends after so many environment steps of this invocation."
    )
    max_updates: int | None = Field(
        None,
        ge=1,
        description="Training ends with exactly this update of the run, whichever invocation makes it.",
    )
    lockstep: bool = Field(
        False, description="Fixed schedule of actors and learner: the run is a function of its seed. Slower."
    )
    checkpoint_interval_s: float = Field(120.0, gt=0, description="A checkpoint every so many seconds.")
    checkpoint_interval_steps: int | None = Field(
        None, ge=1, description="A checkpoint every so many updates, too."
    )
    keep_last: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_best: int = Field(
        1, ge=0, description="Checkpoints of the highest training return kept beside them."
    )
    disk_reserve_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Kept back for the last words on a full disk; admission stops without it.",
    )
    recovery_attempts_max: int = Field(
        3, ge=1, description="Failed recoveries at one journal position before it is quarantined."
    )
    ready_timeout_s: float = Field(120.0, gt=0, description="A child that is not READY by then is replaced.")
    progress_timeout_s: float = Field(
        120.0, gt=0, description="A child that reports no progress so long is replaced."
    )
    stop_timeout_s: float = Field(20.0, gt=0, description="A child asked to stop is killed after so long.")
    max_restarts: int = Field(
        5, ge=0, description="Restarts of one child within the window before giving up."
    )
    restart_window_s: float = Field(60.0, gt=0, description="Window in which restarts are counted.")
    restart_backoff_s: float = Field(
        0.5, ge=0, description="First delay before a restart; it doubles each time."
    )
    restart_backoff_max_s: float = Field(30.0, gt=0, description="Bound of that delay.")
    frame_bytes_max: int = Field(64 * 2**20, ge=2**16, description="A larger message is refused.")
    journal_segment_bytes_max: int = Field(
        64 * 2**20, ge=2**16, description="A journal segment's size limit."
    )
    journal_commit_interval_ms: float = Field(5.0, gt=0, le=1000, description="Group commit: longest wait.")
    journal_commit_records_max: int = Field(256, ge=1, description="Group commit: most records.")
    journal_commit_bytes_max: int = Field(2**20, ge=2**12, description="Group commit: most bytes.")
    evaluation_episodes: int = Field(
        64, ge=2, le=100_000, description="Held-out episodes per evaluated policy."
    )
    metrics_port: int | None = Field(
        9092,
        ge=0,
        le=65_535,
        description="Port on which /metrics is served for Prometheus; unset: none is. One that is taken ends no run.",
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address it is served on; 127.0.0.1 is reached from this machine alone."
    )
    evaluation_workers: int = Field(2, ge=1, le=64, description="Processes that evaluate at the end.")


KEYS_TOLD_MAX: Final = 12
"""Of a section with more keys a complaint does not name them all."""

CONTROLLERS: Final = {GROWING_HOST: "tamiyo", BLUEPRINT_CHOICE: "karn"}
"""Whose controller acts in a world."""


class Config(Section):
    """The whole configuration of a run."""

    simic_trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    experience_buffer: BufferConfig = Field(default_factory=BufferConfig)
    supervisor: SupervisorConfig = Field(default_factory=SupervisorConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Config:
        buffer, batch = self.experience_buffer, self.simic_trainer.batch_size
        if batch == round(batch * buffer.replay_ratio):
            raise ValueError(
                f"experience_buffer.replay_ratio {buffer.replay_ratio} leaves no fresh experience in a batch of "
                f"{batch}; it must be at most {1 - 1 / batch:g}"
            )
        if self.simic_trainer.algorithm in ON_POLICY and buffer.replay_ratio > 0:
            raise ValueError(
                f"simic_trainer.algorithm {self.simic_trainer.algorithm} learns from what its own policy just did; "
                f"experience_buffer.replay_ratio must be 0 with it, it is {buffer.replay_ratio:g}"
            )
        if buffer.capacity < batch:
            raise ValueError(
                f"experience_buffer.capacity {buffer.capacity} cannot hold one batch of "
                f"simic_trainer.batch_size {batch}"
            )
        if buffer.min_experiences > buffer.capacity:
            raise ValueError(
                f"experience_buffer.min_experiences {buffer.min_experiences} would never be reached with "
                f"experience_buffer.capacity {buffer.capacity}"
            )
        own = CONTROLLERS.get(self.environment.id)
        if own is not None and self.controller != own:
            raise ValueError(
                f"simic_trainer.controller {self.controller!r} does not act in {self.environment.id}; that is {own!r}"
            )
        if not was_recorded(info):
            self._can_be_meant()
        self._network_can_read()
        self._successes_can_be()
        self._behaviour_can_be_learned_from()
        lanes = self.environment.environments_per_actor
        if self.supervisor.lockstep:
            self._rounds_fit(self.supervisor.num_actors * lanes)
            return self
        in_flight = self.supervisor.num_actors * self.supervisor.unrolls_in_flight * lanes
        if buffer.capacity < in_flight:
            raise ValueError(
                f"experience_buffer.capacity {buffer.capacity} cannot hold the {in_flight} experiences that "
                f"num_actors x unrolls_in_flight x environments_per_actor allow; raise it, or lower "
                f"supervisor.unrolls_in_flight"
            )
        # An unroll holds its credit until the last of its lanes is consumed, so one may be stuck with a single one.
        fresh_at_least = in_flight - lanes + 1
        if fresh_at_least < fresh_per_batch(self):
            raise ValueError(
                f"a batch takes {fresh_per_batch(self)} fresh experiences, but with num_actors x unrolls_in_flight x "
                f"environments_per_actor = {in_flight} as few as {fresh_at_least} may ever be there: the run would "
                f"wait for ever; raise one of them, or experience_buffer.replay_ratio"
            )
        return self

    @property
    def controller(self) -> str:
        """Whose controller is trained: the name under which its policies are known."""
        named = self.simic_trainer.controller
        return CONTROLLERS.get(self.environment.id, self.environment.id) if named == "auto" else named

    def stage_environments(self) -> tuple[EnvironmentConfig, ...]:
        """The environment of each stage of the curriculum; the configured one alone where there is none to follow."""
        return stage_environments(self.simic_trainer, self.environment)

    def _network_can_read(self) -> None:
        """What a policy sees is known here, so nobody has to wait for the processes to say it."""
        network, environment = self.simic_trainer.network, self.environment
        is_graph = environment.id == GROWING_HOST and environment.observation == "graph"
        if is_graph and network not in ("auto", "graph"):
            raise ValueError(
                f"simic_trainer.network {network} reads vectors, and environment.observation is graph; take network "
                f"graph, or observation flat"
            )
        if network == "graph" and not is_graph:
            raise ValueError(
                f"simic_trainer.network graph reads graphs, and {environment.id} is observed as a vector; take auto, "
                f"mlp or lstm"
            )

    def _can_be_meant(self) -> None:
        """What could be done, and would do nothing."""
        if self.environment.id == GROWING_HOST:  # of other worlds it is known once they are made
            self.simic_trainer.check_heads(HEADS)
        behaviour, algorithm = self.environment.behaviour, self.simic_trainer.algorithm
        if behaviour == POLICY and algorithm in IMITATING:
            raise ValueError(
                f"simic_trainer.algorithm {algorithm} imitates who acts, and environment.behaviour is {behaviour!r}: "
                f"it would imitate itself and learn nothing; take behaviour recorded with records, or a scripted "
                f"policy: {', '.join(self.environment.scripts)}"
            )

    def _successes_can_be(self) -> None:
        """A success by accuracy is never one in a world whose episodes have none."""
        trainer = self.simic_trainer
        if self.environment.id == GROWING_HOST or not trainer.follows_curriculum:
            return
        for stage in trainer.curriculum_stages:
            rule = stage.success or trainer.curriculum_success
            if success_rule(rule).measure == "accuracy":
                raise ValueError(
                    f"stage {stage.name!r} is passed by {rule!r}, and episodes of {self.environment.id} have no "
                    f"accuracy; use 'return >= x'"
                )

    def _behaviour_can_be_learned_from(self) -> None:
        """Who acts must suit the algorithm, and be the policy itself where its successes lead on."""
        behaviour, algorithm = self.environment.behaviour, self.simic_trainer.algorithm
        if behaviour != POLICY and algorithm in ON_POLICY:
            raise ValueError(
                f"simic_trainer.algorithm {algorithm} learns from what its own policy just did, and "
                f"environment.behaviour is {behaviour!r}; take BC or IQL, or IMPALA or APPO, which correct for it"
            )
        acting = {stage.behaviour for stage in self.stage_environments()} | {behaviour}
        if self.simic_trainer.follows_curriculum and acting != {POLICY}:
            raise ValueError(
                f"a curriculum is passed by what the learned policy achieves, and environment.behaviour is "
                f"{', '.join(sorted(acting - {POLICY}))}; set simic_trainer.curriculum_enabled: false"
            )

    def _rounds_fit(self, per_round: int) -> None:
        """In lockstep a round brings its experiences whether or not those of the round before were consumed."""
        waiting = max(fresh_per_batch(self) - 1, self.experience_buffer.min_experiences - 1)
        if self.experience_buffer.capacity < waiting + per_round:
            raise ValueError(
                f"experience_buffer.capacity {self.experience_buffer.capacity} cannot hold a round of {per_round} "
                f"experiences (num_actors x environments_per_actor) beside the {waiting} that may wait; raise it"
            )


def fresh_per_batch(config: Config, batch_size: int | None = None) -> int:
    """Fresh experiences in one batch: `batch_size - round(batch_size * replay_ratio)`, at least 1.

    Args:
        config: The configuration.
        batch_size: Of a batch that is smaller than configured; None for the configured one.
    """
    batch = config.simic_trainer.batch_size if batch_size is None else batch_size
    return max(1, batch - round(batch * config.experience_buffer.replay_ratio))


def parse(
    text: str,
    *,
    base: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    is_recorded: bool = False,
) -> Config:
    """Parse YAML text into a configuration.

    Args:
        text: YAML with the sections above; empty text means all defaults.
        base: Nested values that the text overlays, such as a preset's.
        assignments: `a.b=c` overrides, applied last, in order; the right side is YAML.
        is_recorded: It is what a run wrote down when it was begun: what only does nothing is let pass then.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: Malformed YAML, unknown key (with the nearest known one), or a value out of range.
    """
    values = _overlay(dict(base or {}), parse_mapping(text))
    for assignment in assignments:
        _assign(values, assignment)
    try:
        return Config.model_validate(values, context={RECORDED: is_recorded})
    except ValidationError as error:
        raise explained(error) from None


def parse_mapping(text: str) -> dict[str, Any]:
    """Parse YAML text into nested mappings without validating keys.

    Raises:
        ConfigError: Not YAML, or the top is not a mapping.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the top of a configuration is a mapping of sections, not {type(values).__name__}")
    return values


def to_yaml(config: Config) -> str:
    """Render every key with its effective value, in schema order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _overlay(lower: dict[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in upper.items():
        if isinstance(value, Mapping) and isinstance(lower.get(key), Mapping):
            lower[key] = _overlay(dict(lower[key]), value)
        else:
            lower[key] = value
    return lower


def _assign(values: dict[str, Any], assignment: str) -> None:
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set takes section.key=value, not {assignment!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value {text!r} is not valid YAML", ".".join(keys)) from None
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[key]
    values[keys[-1]] = value


def explained(error: ValidationError, within: tuple[str, ...] = ()) -> ConfigError:
    """One sentence for the first problem (an unknown key before anything else), and the number of the others.

    Args:
        error: What pydantic says of the whole configuration, or of one of its sections.
        within: Path of that section.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = (*within, *(str(part) for part in first["loc"]))
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_hint(path)}"
    elif first["type"] == "missing":
        # One item of a list may lack several keys; named together they are given at once.
        lacking = [one["loc"] for one in problems if one["type"] == "missing"]
        names = [str(place[-1]) for place in lacking if place[:-1] == first["loc"][:-1]]
        key, problems = ".".join(path[:-1]), problems[len(names) - 1 :]
        message = f"must have {', '.join(names)}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], dict | BaseModel):
            message += f" (given: {first['input']!r})"
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more problem{'s' if len(problems) > 2 else ''})"
    return ConfigError(message, key)


def _hint(path: tuple[str, ...]) -> str:
    """What may have been meant by an unknown key: one of a near name, one of that name elsewhere, or any one here."""
    known = _keys_at(path[:-1])
    near = did_you_mean(path[-1], known)
    elsewhere = [section for section in Config.model_fields if path[-1] in _keys_at((section,))]
    if near or not elsewhere:
        if len(known) > KEYS_TOLD_MAX:
            return near or f"; `config explain {'.'.join(path[:-1])}.` lists those there are"
        return near or f"; known here: {', '.join(known)}"
    return f"; did you mean {elsewhere[0]}.{path[-1]}?"


def _keys_at(path: tuple[str, ...]) -> list[str]:
    """The keys of a section, or of the items of a list of sections."""
    model: type[BaseModel] = Config
    for part in path:
        if part.isdecimal():  # the place in a list, whose items the field before it told of
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else section_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def section_in(annotation: object) -> type[BaseModel] | None:
    """The section that a key holds, or of which its list is made; None where it holds plain values."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None
