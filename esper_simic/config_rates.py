"""`simic_trainer`: learning rates and their schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from esper_simic.config_section import Section, was_recorded


class RateKeys(Section):
    """The learning-rate keys of `simic_trainer`, which `learning_rates.UnifiedLRController` obeys."""

    learning_rate: float = Field(3e-4, ge=1e-6, le=1e-2, description="Adam step size of both optimisers.")
    policy_lr: float | None = Field(
        None, ge=1e-6, le=1e-2, description="Step size of trunk and policy heads; unset means learning_rate."
    )
    value_lr: float | None = Field(
        None, ge=1e-6, le=1e-2, description="Step size of the value head; unset means learning_rate."
    )
    min_lr: float = Field(
        1e-6,
        gt=0,
        le=1e-2,
        description="No schedule goes below this learning rate; at most the rates that are configured.",
    )
    warmup_epochs: int = Field(
        10, ge=0, description="Updates over which learning rates rise linearly to their base value."
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="Learning rates after the warm-up: constant, or half a cosine down to min_lr, which they reach "
        "with update lr_horizon_updates.",
    )
    lr_horizon_updates: int | None = Field(
        None, ge=1, description="Updates at which a cosine schedule ends; cosine needs it."
    )

    @model_validator(mode="after")
    def _cosine_has_a_horizon(self) -> RateKeys:
        if self.lr_schedule != "cosine":
            return self
        if self.lr_horizon_updates is None:
            raise ValueError(
                "lr_schedule cosine needs lr_horizon_updates: the updates in which learning rates fall to min_lr"
            )
        if self.lr_horizon_updates <= self.warmup_epochs:
            raise ValueError(
                f"lr_horizon_updates {self.lr_horizon_updates} must exceed warmup_epochs {self.warmup_epochs}"
            )
        return self

    @model_validator(mode="after")
    def _least_rate_is_least(self, info: ValidationInfo) -> RateKeys:
        if was_recorded(info):
            return self
        rates = {
            "learning_rate" if self.policy_lr is None else "policy_lr": self.effective_policy_lr,
            "learning_rate" if self.value_lr is None else "value_lr": self.effective_value_lr,
        }
        for key, rate in rates.items():
            if self.min_lr > rate:
                raise ValueError(
                    f"min_lr {self.min_lr:g} is above {key} {rate:g}, which would be raised to it; lower min_lr, or "
                    f"raise {key}"
                )
        return self

    @property
    def effective_policy_lr(self) -> float:
        """Learning rate of trunk and policy heads."""
        return self.learning_rate if self.policy_lr is None else self.policy_lr

    @property
    def effective_value_lr(self) -> float:
        """Learning rate of the value head."""
        return self.learning_rate if self.value_lr is None else self.value_lr

    @property
    def effective_horizon_updates(self) -> int | None:
        """Updates at which learning rates have fallen to `min_lr`; None where they stay constant."""
        return self.lr_horizon_updates if self.lr_schedule == "cosine" else None
