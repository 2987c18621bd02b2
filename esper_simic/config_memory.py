"""`simic_trainer`: what is kept of what was learned before."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from esper_simic.config_section import Section


class LoraKeys(Section):
    """The keys of `simic_trainer` for low-rank adapters, which `policies.lora` obeys.

    Adapters adapt weights that already know something. So they begin with a given update, from which on the base is
    frozen; without one a run trains all of its weights and has none, whatever their rank would be.
    """

    lora_rank: int = Field(
        16, ge=0, le=512, description="Rank of adapters, usually 4 to 64; 0 rules adapters out."
    )
    lora_alpha: float = Field(
        32.0, gt=0, description="An adapter's product is scaled by lora_alpha / lora_rank."
    )
    lora_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of an adapter's coordinates that an update leaves out."
    )
    lora_start_step: int | None = Field(
        None,
        ge=0,
        description="After this update the weights are frozen and adapters alone learn; unset: never.",
    )
    initial_adapters: str | None = Field(
        None,
        description="Adapters to begin with, on the weights of initial_policy, on which they were trained: the "
        "directory of a run, or a file of `simic-supervisor checkpoint adapters`. With lora_start_step 0, and their "
        "rank and alpha. Unset: adapters that change nothing yet.",
    )

    @property
    def lora_enabled(self) -> bool:
        """Whether this run ever has adapters: it follows from rank and start, there is no key."""
        return self.lora_rank > 0 and self.lora_start_step is not None

    @field_validator("lora_start_step")
    @classmethod
    def _start_needs_a_rank(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("lora_rank") == 0:
            raise ValueError("lora_start_step asks for adapters and lora_rank 0 rules them out")
        return value


class EwcKeys(Section):
    """Elastic weight consolidation: how firmly a training holds on to stages of its curriculum that it has passed."""

    ewc_lambda: float = Field(
        0.1, ge=0, description="Weight of the penalty that holds what earlier stages needed; 0: none is held."
    )
    ewc_sample_size: int = Field(
        200, ge=1, le=100_000, description="Experiences from which a stage's Fisher information is estimated."
    )
    ewc_decay: float = Field(
        1.0, ge=0, le=1, description="Weight of the stages before when another one is consolidated."
    )
    ewc_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the parameters, drawn tensor by tensor, that are held; less is cheaper.",
    )
    ewc_adjusts_rate: bool = Field(
        False,
        description="The policy's learning rate is divided by 1 + ewc_lambda times the mean Fisher information held.",
    )
