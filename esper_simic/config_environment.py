"""`environment`: the task, the host that grows on it, the rules of growth, and what watches over it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from esper_simic.actions import BLUEPRINTS
from esper_simic.config_behaviour import BehaviourKeys
from esper_simic.config_rewards import RewardConfig
from esper_simic.config_section import Section, distinct_known

Kind = Literal["image", "series", "vector", "tokens"]
"""What the samples of a task are, and the features of a host that takes them: pixels `H x W`; a series along W (H = 1);
one vector; a text along W (H = 1), read causally. It decides which hosts and blueprints fit a task."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

BLUEPRINT_NAMES: Final = BLUEPRINTS[1:]
"""The blueprints that can be grafted (all keep the shape of their input): every action value but `noop`."""

DEFAULT_BLUEPRINTS: Final = ("norm", "attention", "depthwise", "conv_light", "conv_heavy")
"""The blueprints offered where the configuration names none."""

HOST_SURFACES: Final[dict[str, tuple[int, int]]] = {
    "rescue": (3, 3),
    "minimal": (3, 0),
    "deep_impaired": (5, 5),
    "augment": (3, 3),
    "highres": (3, 3),
    "scale": (5, 5),
    "series": (3, 3),
    "mlp": (3, 0),
    "transformer": (3, 0),
}
"""Hosts by name: how many blocks they have, and behind how many of these, the first ones, they pool."""

HOST_NAMES: Final = tuple(HOST_SURFACES)
"""The hosts this version can grow."""


TASK_NAMES: Final = (
    "digits",
    "digits32",
    "wine",
    "breast_cancer",
    "mnist1d",
    "characters",
    "synthetic",
    "cifar10",
)
"""The tasks this version brings."""

TASK_GROUP: Final = "esper_simic.tasks"
"""Entry-point group in which other packages bring tasks."""

REGISTERED_TASKS: Final[dict[str, Callable[..., Any]]] = {}
"""Loaders of the tasks that this process alone knows; `growing_host.tasks.register_task` writes it, nothing else."""


class GovernorConfig(Section):
    """`environment.governor`: when a host has broken down, and what that costs."""

    enabled: bool = Field(True, description="Watch hosts, keep copies, roll a broken host back.")
    loss_max: float = Field(
        12.0, gt=0, description="Validation loss (nats) that must be exceeded for a statistical panic."
    )
    loss_max_tokens: float = Field(15.0, gt=0, description="The same for language models.")
    window_epochs: int = Field(20, ge=2, le=1000, description="Sound epochs a host is compared with.")
    samples_min: int = Field(
        10, ge=2, le=1000, description="Sound epochs needed before a host is compared with them."
    )
    deviations_max: float = Field(
        6.0, gt=0, description="Standard deviations above the window's mean that a loss may lie."
    )
    mean_ratio_max: float = Field(3.0, gt=1, description="Multiple of the window's mean that a loss may be.")
    strikes_max: int = Field(
        3, ge=1, description="Consecutive epochs beyond all three limits that make a panic."
    )
    learned_share_max: float = Field(
        0.6,
        gt=0,
        lt=1,
        description="A host has learned where its window's mean loss is below this share of guessing's.",
    )
    guessing_margin: float = Field(
        0.065,
        ge=0,
        lt=1,
        description="A host guesses where its loss is within this share of ln(classes).",
    )
    snapshot_interval_epochs: int = Field(5, ge=1, description="A sound host is copied so often.")
    penalty: float = Field(10.0, ge=0, description="Cost of a rollback.")
    forfeit: bool = Field(
        True, description="A rollback takes back, in its own step, all that its episode was paid so far."
    )

    @model_validator(mode="after")
    def _window_holds_its_samples(self) -> GovernorConfig:
        if self.samples_min > self.window_epochs:
            raise ValueError(
                f"samples_min {self.samples_min} would never be reached with window_epochs {self.window_epochs}"
            )
        return self


class EnvironmentConfig(BehaviourKeys):
    """`environment`: the task, the host that grows on it, and the rules of growth."""

    task: str = Field(
        "digits",
        description=f"Data set on which hosts are trained: {', '.join(TASK_NAMES)}, or a task that an installed "
        "package brings; parameters stand behind a colon, as in synthetic:3x32x32:10.",
    )
    host: str = Field(
        "rescue",
        description=f"Host network, one of {', '.join(HOST_NAMES)}; it must take the task's kind of samples. "
        "rescue is too small for its task.",
    )
    slots: tuple[str, ...] = Field(
        ("r0c0", "r0c1", "r0c2"),
        description="Slots that may be grown into: r0ci behind block i before its pool, r1ci behind its pool.",
    )
    blueprints: tuple[str, ...] = Field(
        DEFAULT_BLUEPRINTS,
        description=f"Blueprints a controller may choose, of {', '.join(BLUEPRINT_NAMES)}.",
    )
    environments_per_actor: int = Field(32, ge=1, le=4096, description="Lanes stepped as one computation.")
    max_epochs: int = Field(60, ge=4, le=10_000, description="Host epochs in an episode (its horizon).")
    train_batches: int = Field(8, ge=1, le=10_000, description="Training batches in a host epoch.")
    train_batch_size: int = Field(32, ge=2, le=4096, description="Samples in a training batch of one host.")
    validation_samples: int = Field(
        256, ge=10, le=1_000_000, description="Held-out samples measured each epoch."
    )
    host_lr: float = Field(0.03, gt=0, le=10, description="SGD learning rate of the host.")
    seed_lr: float = Field(0.03, gt=0, le=10, description="SGD learning rate of a seed.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum of host and seeds.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradient norm limit of the host and of each seed, apart."
    )
    training_epochs_min: int = Field(10, ge=1, description="Epochs in TRAINING before gate G2 can open.")
    gates: Literal["permissive", "strict"] = Field(
        "permissive",
        description="Form of the gates G1 to G5; strict asks for everything permissive asks for.",
    )
    auto_forward_g1: bool = Field(
        False, description="A germinated seed starts TRAINING by itself; ADVANCE is masked for it."
    )
    auto_forward_g2: bool = Field(
        False, description="A seed in TRAINING goes on by itself when G2 opens; ADVANCE is masked for it."
    )
    auto_forward_g3: bool = Field(
        False, description="A seed in BLENDING goes on by itself when G3 opens; ADVANCE is masked for it."
    )
    alpha_control: Literal["plain", "full"] = Field(
        "plain",
        description="What a controller may do with alpha. plain: seeds are added in once, wholly, and pruned at once; "
        "full: every style, target, speed and curve, retargets and scheduled prunes.",
    )
    gradient_health_min: float = Field(0.7, ge=0, le=1, description="Gradient health that gate G2 asks for.")
    gradient_ema: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Weight of the past in the averaged ratio of a seed's gradients to the host's.",
    )
    contribution_velocity_ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Weight of the past in the averaged change of a seed's contribution, which controllers see; "
        "0: the last change alone.",
    )
    gradient_ratio_min: float = Field(
        0.10, ge=0, description="That ratio, size-normalised, which strict G2 asks for."
    )
    improvement_min: float = Field(
        0.5, ge=0, le=100, description="Accuracy points gained since TRAINING began that strict G2 asks for."
    )
    blending_epochs_min: int = Field(10, ge=0, description="Epochs in BLENDING that strict G3 asks for.")
    contribution_min: float = Field(
        1.0, ge=0, le=100, description="Accuracy points a seed must be worth that strict G5 asks for."
    )
    prune_age_min: int = Field(5, ge=0, description="Epochs a seed must have lived before it may be pruned.")
    embargo_epochs: int = Field(5, ge=0, description="Epochs a pruned slot stays closed.")
    max_seeds: int | None = Field(
        None, ge=1, description="Seeds alive or fossilised at once; unset: all slots."
    )
    mask_gates: bool = Field(True, description="Mask an ADVANCE or FOSSILIZE that its gate would refuse.")
    stagger: bool = Field(True, description="Cut lanes' first episodes short so that their phases spread.")
    reward: RewardConfig = Field(default_factory=RewardConfig)
    governor: GovernorConfig = Field(default_factory=GovernorConfig)

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        name = value.partition(":")[0]
        if name not in TASK_NAMES:  # only then need the installed packages be searched
            distinct_known((name,), task_names(), "task")
        return value

    @field_validator("host")
    @classmethod
    def _known_host(cls, value: str) -> str:
        return distinct_known((value,), HOST_NAMES, "host")[0]

    @field_validator("slots")
    @classmethod
    def _known_slots(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        host = info.data.get("host")  # absent where the host itself was refused
        if host is None:
            return value
        return distinct_known(value, slot_names(host), f"slot of {host}")

    @field_validator("blueprints")
    @classmethod
    def _known_blueprints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return distinct_known(value, BLUEPRINT_NAMES, "blueprint")

    @model_validator(mode="after")
    def _horizon_fits_a_seed(self) -> EnvironmentConfig:
        if self.max_epochs <= self.training_epochs_min:
            raise ValueError(
                f"no seed can finish: max_epochs {self.max_epochs} must exceed training_epochs_min "
                f"{self.training_epochs_min}"
            )
        if self.gates == "strict" and self.max_epochs <= self.training_epochs_min + self.blending_epochs_min:
            raise ValueError(
                f"no seed can finish with strict gates: max_epochs {self.max_epochs} must exceed "
                f"training_epochs_min {self.training_epochs_min} + blending_epochs_min {self.blending_epochs_min}"
            )
        return self


def slot_names(host: str) -> tuple[str, ...]:
    """Every slot a host of this name has, in the order in which features meet them.

    `r0c{i}` lies behind block i before its pool, `r1c{i}` behind its pool.
    """
    blocks, pooled = HOST_SURFACES[host]
    return tuple(f"r{row}c{block}" for block in range(blocks) for row in range(2 if block < pooled else 1))


def task_names() -> tuple[str, ...]:
    """Every task that this process can load: built in, registered, brought by installed packages."""
    brought = sorted({entry.name for entry in entry_points(group=TASK_GROUP)})
    return tuple(dict.fromkeys((*TASK_NAMES, *REGISTERED_TASKS, *brought)))
