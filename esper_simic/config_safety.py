"""The flat keys of `simic_trainer` that say when a training is in trouble, and what is done about it.

Breakers, conservative mode, the ladder of failures and the objectives obey them (`breaker.py`, `conservative.py`,
`ladder.py`, `slo.py`). Names and defaults that the requirements give are kept; where they leave a number open, the
default was chosen so that none of seven recorded trainings that went well comes near it.
"""

from __future__ import annotations

from typing import Final

from pydantic import Field, field_validator, model_validator

from esper_simic.config_section import Section, did_you_mean

TRIGGER_NAMES: Final = (
    "high_error_rate",
    "memory_pressure",
    "circuit_breaker_open",
    "slo_violation",
    "training_instability",
)
"""Everything that can put a training into conservative mode."""


class BreakerKeys(Section):
    """When circuit breakers open, and how long they stay so."""

    circuit_breaker_failure_threshold: int = Field(
        3,
        ge=1,
        le=1000,
        description="Failures in a row that open a breaker which has no threshold of its own, V-trace's among them.",
    )
    circuit_breaker_recovery_timeout_s: float = Field(
        30.0, gt=0, le=86_400, description="Seconds from the opening of such a breaker to its one probe."
    )
    training_breaker_failure_threshold: int = Field(
        5, ge=1, le=1000, description="Failed updates in a row that open the breaker of the training."
    )
    training_breaker_recovery_timeout_s: float = Field(
        60.0, gt=0, le=86_400, description="Seconds without updates before one is tried again."
    )
    vtrace_log_ratio_max: float = Field(
        20.0,
        gt=0,
        le=80,
        description="V-trace failed where log(pi/mu) of any step is larger: the two disagree about what was done.",
    )
    vtrace_mean_ratio_min: float = Field(
        0.01, ge=0, lt=1, description="V-trace failed where the mean of pi/mu is smaller: it learns nothing."
    )
    vtrace_mean_ratio_max: float = Field(
        100.0, gt=1, description="V-trace failed where the mean of pi/mu (1 on policy) is larger."
    )


class ConservativeKeys(Section):
    """When conservative mode is entered and left, and what it changes."""

    conservative_mode_triggers: tuple[str, ...] = Field(
        TRIGGER_NAMES, description="What may put the training into conservative mode; none switches it off."
    )
    conservative_batch_size_factor: float = Field(
        0.5, gt=0, le=1, description="Batch size in conservative mode, as a share of the configured one."
    )
    conservative_timeout_factor: float = Field(
        1.5,
        ge=1,
        le=10,
        description="Time budgets in conservative mode, as a multiple of the configured ones.",
    )
    conservative_lr_factor: float = Field(
        0.5, gt=0, le=1, description="Learning rates in conservative mode, as a share of the scheduled ones."
    )
    conservative_leave_factor: float = Field(
        0.9, gt=0, lt=1, description="A trigger is quiet again below its threshold times this."
    )
    conservative_quiet_steps: int = Field(
        100, ge=1, description="Updates in a row without any trigger before conservative mode is left."
    )
    conservative_quiet_s: float = Field(
        60.0, ge=0, description="Seconds without any trigger before conservative mode is left."
    )
    error_rate_max: float = Field(
        0.1, gt=0, lt=1, description="Share of failed operations above which the error rate is high."
    )
    memory_pressure_fraction: float = Field(
        0.9, gt=0, lt=1, description="Share of the memory limit in use above which there is pressure."
    )
    max_validation_loss: float = Field(
        0.5,
        gt=0,
        description="Loss that is still good. Twice this, or twice what is usual in the run, is unstable.",
    )
    unstable_grad_norm: float = Field(
        10.0, gt=0, description="Gradient norm, before clipping, above which the training is unstable."
    )

    @field_validator("conservative_mode_triggers")
    @classmethod
    def _known_triggers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in TRIGGER_NAMES:
                hint = did_you_mean(name, TRIGGER_NAMES)
                raise ValueError(f"unknown trigger {name!r}{hint}; known: {', '.join(TRIGGER_NAMES)}")
        if len(set(value)) != len(value):
            raise ValueError("name each trigger once")
        return value


class LadderKeys(Section):
    """What is done about updates that fail, and how each measure is taken back."""

    exploding_grad_norm: float = Field(
        100.0, gt=0, description="Gradient norm, before clipping, after which updates are clipped harder."
    )
    clip_tighten_factor: float = Field(
        0.5, gt=0, lt=1, description="Each explosion multiplies the norm that updates are clipped to by this."
    )
    clip_recovery_steps: int = Field(
        50, ge=1, description="Updates without an explosion after which one tightening is taken back."
    )
    batch_recovery_steps: int = Field(
        100,
        ge=1,
        description="Updates that fit in memory after which one halving of the batch is taken back.",
    )
    divergence_epochs: int = Field(
        10, ge=2, le=1000, description="Epochs of rising loss in a row that are a divergence."
    )
    divergence_epoch_updates: int = Field(
        100, ge=1, description="Updates in one epoch of the divergence check."
    )
    divergence_rise_min: float = Field(
        0.1,
        ge=0,
        description="Rise of the loss over those epochs, relative to the first, that it takes as well.",
    )
    divergence_lr_factor: float = Field(
        0.5, gt=0, lt=1, description="Each divergence multiplies the learning rates by this."
    )
    rate_recovery_epochs: int = Field(
        10, ge=1, description="Epochs without a rise after which one lowering of the rates is taken back."
    )
    restores_max: int = Field(
        10,
        ge=1,
        description="Restorations without a good epoch in between after which targets, then training, give way.",
    )
    halt_after_openings: int = Field(
        3,
        ge=2,
        le=100,
        description="Openings of the training's breaker in a row, without one good update, that halt it.",
    )


class ObjectiveKeys(Section):
    """What a training is measured against."""

    training_step_budget_ms: float = Field(
        500.0, gt=0, description="An update that takes longer is slow; one in twenty may be."
    )
    epoch_boundary_budget_ms: float = Field(
        18.0,
        gt=0,
        description="What happens between two updates may take so long; one in twenty may be slower.",
    )
    target_throughput_exp_sec: float = Field(
        180.0, gt=0, description="Experiences per second that the training should learn from."
    )
    convergence_time_hours: float = Field(
        48.0, gt=0, description="Hours by which the mean return should have stopped reaching new heights."
    )
    training_timeout_hours: float = Field(
        24.0, gt=0, description="Training ends, with a checkpoint, after so many hours."
    )
    improvement_window_episodes: int = Field(
        100, ge=2, description="Episodes whose mean return is compared with that of those before."
    )


class SafetyKeys(BreakerKeys, ConservativeKeys, LadderKeys, ObjectiveKeys):
    """Everything that the folds of `safety.py` obey."""

    @model_validator(mode="after")
    def _thresholds_agree(self) -> SafetyKeys:
        if self.exploding_grad_norm < self.unstable_grad_norm:
            raise ValueError(
                f"exploding_grad_norm {self.exploding_grad_norm} must be at least unstable_grad_norm "
                f"{self.unstable_grad_norm}: an explosion is an instability"
            )
        return self
