"""Keys of the algorithms' own numbers, flat under `simic_trainer`; `TrainerConfig` inherits each group.

What the formulas are is told where they are computed, in `algorithms/`. Defaults are the requirements' and the
platform's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import Field, model_validator

from esper_simic.config_section import Section

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]

ENTROPY_FLOORS: Final = {
    "op": 0.30,
    "slot": 0.15,
    "blueprint": 0.20,
    "style": 0.15,
    "tempo": 0.20,
    "alpha_target": 0.10,
    "alpha_speed": 0.10,
    "alpha_curve": 0.10,
}
"""Of the heads of growth control (`actions.HEADS`); other action spaces have none unless they are given some."""

ENTROPY_FLOOR_COEFFICIENTS: Final = {
    head: 0.3 if head in {"op", "blueprint", "tempo"} else 0.1 for head in ENTROPY_FLOORS
}
ENTROPY_MULTIPLIERS: Final = {
    "op": 1.0,
    "slot": 1.0,
    "blueprint": 1.3,
    "style": 1.2,
    "tempo": 1.3,
    "alpha_target": 1.2,
    "alpha_speed": 1.2,
    "alpha_curve": 1.2,
}


BY_HEAD: Final = ("entropy_floors", "entropy_floor_coefficients", "entropy_multipliers")
"""Keys that have a number for each head."""


class VtraceKeys(Section):
    """V-trace, in IMPALA and APPO."""

    vtrace_enabled: bool = Field(
        True,
        description="Off: one-step targets (TD(0)) without importance weights. APPO needs it on.",
    )
    rho_bar: float = Field(1.0, gt=0, description="V-trace truncation of importance weights in the target.")
    c_bar: float = Field(1.0, gt=0, description="V-trace truncation of the trace coefficients.")
    clip_pg_rho: float | None = Field(
        None,
        gt=0,
        description="Truncation of importance weights in the policy's loss; unset means rho_bar.",
    )
    vtrace_lambda: float = Field(1.0, gt=0, le=1, description="V-trace lambda: decay of the trace.")

    @property
    def effective_clip_pg_rho(self) -> float:
        """Truncation of importance weights in the policy's loss."""
        return self.rho_bar if self.clip_pg_rho is None else self.clip_pg_rho


class PpoKeys(Section):
    """PPO and APPO."""

    ppo_clip: float = Field(
        0.2, gt=0, lt=1, description="Ratios of new to anchored policy count within 1 ± this."
    )
    ppo_per_head: bool = Field(
        True,
        description="Each causally relevant head is clipped by its own ratio; off: one joint ratio a step.",
    )
    ppo_epochs: int = Field(1, ge=1, le=100, description="Passes of one update over its batch.")
    ppo_minibatches: int = Field(
        1, ge=1, le=256, description="Pieces of the batch, one optimiser step each, in every epoch."
    )
    ppo_target_kl: float | None = Field(
        0.015,
        gt=0,
        description="An update ends early when its divergence from the anchor passes 1.5 times this; unset: never.",
    )
    ppo_value_clip: float | None = Field(
        None,
        gt=0,
        description="Values count within this distance of the anchor's; unset: no clipping. Not with ppo_epochs > 1.",
    )
    gae_lambda: float = Field(0.98, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    normalise_advantages: bool = Field(
        True,
        description="Advantages of an update are brought to mean 0 and deviation 1, forced steps included.",
    )
    advantage_deviation_min: float = Field(
        0.1, gt=0, description="Smaller deviations of advantages are taken for this."
    )
    entropy_multipliers: dict[str, Weight] = Field(
        ENTROPY_MULTIPLIERS,
        description="Factor of each head's entropy in the bonus; 1 for other heads.",
    )
    entropy_floors: dict[str, Share] = Field(
        ENTROPY_FLOORS,
        description="Normalised entropy of each head below which it is penalised; 0 for other heads.",
    )
    entropy_floor_coefficients: dict[str, Weight] = Field(
        ENTROPY_FLOOR_COEFFICIENTS,
        description="Weight of the squared shortfall of each head that has a floor.",
    )

    @model_validator(mode="after")
    def _ppo_keys_agree(self) -> PpoKeys:
        if self.ppo_value_clip is not None and self.ppo_epochs > 1:
            raise ValueError(
                f"ppo_value_clip {self.ppo_value_clip:g} with ppo_epochs {self.ppo_epochs} would hold values to "
                f"those of before the update in every epoch; leave ppo_value_clip unset, or take ppo_epochs 1"
            )
        missing = sorted(self.entropy_floors.keys() - self.entropy_floor_coefficients.keys())
        if missing:
            raise ValueError(
                f"entropy_floors names {', '.join(missing)}, entropy_floor_coefficients does not; give a coefficient"
            )
        return self

    def check_heads(self, heads: Sequence[str]) -> None:
        """Refuse numbers of heads that a world lacks; defaults, which are growth control's, are let pass as a whole.

        Args:
            heads: Of the world's actions.

        Raises:
            ValueError: Naming the key, the heads that are none, and those there are.
        """
        for key in BY_HEAD:
            numbers: dict[str, float] = getattr(self, key)
            if numbers == type(self).model_fields[key].default:
                continue
            unknown = [head for head in numbers if head not in heads]
            if unknown:
                raise ValueError(
                    f"simic_trainer.{key} names {', '.join(unknown)}, and this world's heads are {', '.join(heads)}; "
                    f"name these alone, or leave the key out"
                )


class IqlKeys(Section):
    """Implicit Q-learning, for recorded experience."""

    iql_expectile: float = Field(
        0.7, gt=0, lt=1, description="Expectile of Q that the values follow; 0.5 is the mean."
    )
    iql_beta: float = Field(
        3.0, ge=0, description="Inverse temperature of the policy's weights; 0 is behaviour cloning."
    )
    iql_weight_max: float = Field(100.0, gt=0, description="Bound of the policy's weights.")
    iql_target_rate: float = Field(
        0.005, gt=0, le=1, description="Share of the critics that their slow copies take over in each update."
    )
    iql_cql_alpha: float = Field(
        0.0, ge=0, description="Weight of the conservative term; discrete actions only."
    )
