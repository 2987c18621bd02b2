"""`simic_trainer`: the algorithm and its numbers, group by group."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, field_validator, model_validator

from esper_simic.config_algorithms import IqlKeys, PpoKeys, VtraceKeys
from esper_simic.config_curriculum import CurriculumKeys
from esper_simic.config_execution import ExecutionKeys
from esper_simic.config_memory import EwcKeys, LoraKeys
from esper_simic.config_networks import NetworkKeys
from esper_simic.config_rates import RateKeys
from esper_simic.config_safety import SafetyKeys

SEED_MAX: Final = 2**63 - 1

BATCH_SIZE_MIN: Final = 8
BATCH_SIZE_MAX: Final = 256

ControllerName = Literal["auto", "tamiyo", "karn"]
"""Whose controller: Tamiyo grows hosts, Karn chooses what is to be grown into them."""

Algorithm = Literal["IMPALA", "PPO", "APPO", "IQL", "BC"]

ON_POLICY: Final[frozenset[Algorithm]] = frozenset({"PPO"})
"""Algorithms that take experience as if the present policy had made it: they learn from it once and never again."""

IMITATING: Final[frozenset[Algorithm]] = frozenset({"BC"})
"""Algorithms that make the policy do as was done: they learn nothing from what it does itself."""


class TrainerConfig(
    RateKeys,
    VtraceKeys,
    PpoKeys,
    IqlKeys,
    NetworkKeys,
    EwcKeys,
    LoraKeys,
    CurriculumKeys,
    SafetyKeys,
    ExecutionKeys,
):
    """`simic_trainer`: the algorithm and its numbers."""

    algorithm: Algorithm = Field(
        "IMPALA",
        description="IMPALA: V-trace, off-policy, with replay. PPO: clipped surrogate with GAE, on-policy. APPO: "
        "clipped surrogate with V-trace. IQL: implicit Q-learning, for recorded experience. BC: imitation of whoever "
        "acts, who must be another than the policy (environment.behaviour).",
    )
    controller: ControllerName = Field(
        "auto",
        description="Whose controller is trained; its policies are known by that name. auto: by the world, tamiyo for "
        "growing hosts, karn where blueprints are chosen, else the environment's id.",
    )
    batch_size: int = Field(
        32,
        ge=BATCH_SIZE_MIN,
        le=BATCH_SIZE_MAX,
        description="Experiences (lane unrolls) an update; a power of two.",
    )
    gamma: float = Field(
        0.99, ge=0.9, le=0.999, description="Discount; the reward's shaping uses the same one."
    )
    max_grad_norm: float = Field(
        0.5, gt=0, description="Global gradient norm above which gradients are scaled."
    )
    value_coefficient: float = Field(0.5, ge=0, description="Weight of the value loss in the total loss.")
    entropy_coefficient: float = Field(0.02, ge=0, description="Weight of the entropy bonus at the start.")
    entropy_coefficient_final: float = Field(
        0.004, ge=0, description="Weight of the entropy bonus at the end."
    )
    entropy_anneal_steps: int = Field(
        50_000,
        ge=1,
        description="Environment steps over which the entropy weight falls linearly; floors of heads in PPO and APPO "
        "count 1.5 times in their first quarter, and fall to half in their last.",
    )
    reward_clip: float = Field(10.0, gt=0, description="Bound of a reward after division by its deviation.")
    unroll_length: int = Field(10, ge=1, le=1000, description="Environment steps in one experience (T).")
    max_policy_lag: int = Field(
        200, ge=1, description="An unroll made by a policy this many versions old or older is refused."
    )
    digest_every_steps: int = Field(
        100, ge=1, description="Every so many updates the journal gets a digest of the whole learner state."
    )
    seed: int = Field(0, ge=0, le=SEED_MAX, description="The one number from which all chance is derived.")

    @field_validator("batch_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            below = 1 << (value.bit_length() - 1)
            raise ValueError(f"must be a power of two in [8, 256]; near {value}: {below} or {2 * below}")
        return value

    @model_validator(mode="after")
    def _appo_has_its_advantages(self) -> TrainerConfig:
        if self.algorithm == "APPO" and not self.vtrace_enabled:
            raise ValueError(
                "algorithm APPO takes its advantages from V-trace, and vtrace_enabled is false; leave it on, or take "
                "PPO, whose advantages are GAE's"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_their_weights(self) -> TrainerConfig:
        if self.initial_adapters is None:
            return self
        if self.lora_start_step != 0:
            raise ValueError("initial_adapters are there from the beginning: set lora_start_step to 0")
        if self.initial_policy is None:
            raise ValueError("initial_adapters are of certain weights: name those in initial_policy")
        return self

    @model_validator(mode="after")
    def _entropy_falls(self) -> TrainerConfig:
        if self.entropy_coefficient_final > self.entropy_coefficient:
            raise ValueError("entropy_coefficient_final must not exceed entropy_coefficient")
        return self
