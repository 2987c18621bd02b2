"""`environment.reward`: which reward an environment gives, and the weight of each of its terms.

Defaults are the platform's numbers. What the terms are is told where they are computed, in `rewards/`; what a source
left open, in docs/decisions/0012-reward-terms.md.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from esper_simic.config_section import Section


class ShapedRewardConfig(Section):
    """`environment.reward.shaped`: the dense terms that SHAPED and ESCROW add to shaping and terminal accuracy."""

    attribution_weight: float = Field(1.0, ge=0, description="Reward per point attributed to a seed.")
    attribution_formula: Literal["harmonic", "minimum"] = Field(
        "harmonic",
        description="How contribution and progress are joined where contribution exceeds progress.",
    )
    progress_unknown_share: float = Field(
        0.5, ge=0, le=1, description="Share of a contribution that is attributed while progress is unknown."
    )
    stage_improvement_weight: float = Field(
        0.3, ge=0, description="Share of the improvement in a stage, while no contribution was measured yet."
    )
    discount_steepness: float = Field(
        3.0, ge=0, description="Steepness of the discount where all seeds together make the host worse."
    )
    timing_discount_min: float = Field(
        0.4, ge=0, le=1, description="Discount of a seed that germinates in the very first epoch."
    )
    timing_discount_epochs: int = Field(
        10, ge=0, description="Germination epoch from which a seed is not discounted; before, linearly."
    )
    ratio_contribution_min: float = Field(
        1.0, ge=0, description="Contributions up to so many points are never suspected of being a ransom."
    )
    ratio_improvement_min: float = Field(
        0.1, gt=0, description="With no more total improvement, any contribution beyond that is suspect."
    )
    ratio_max: float = Field(
        5.0, gt=0, description="Contribution over total improvement beyond which a seed is suspect."
    )
    ratio_weight: float = Field(0.1, ge=0, description="Cost per excess over ratio_max, relative to it.")
    ratio_cost_max: float = Field(0.3, ge=0, description="Bound of the ratio penalty of a seed.")
    ratio_contribution_full: float = Field(
        10.0, gt=0, description="Points of contribution without improvement that cost ratio_cost_max."
    )
    blending_warning: float = Field(
        0.1, ge=0, description="Cost of blending a seed into a host that gets worse."
    )
    blending_warning_per_epoch: float = Field(
        0.05, ge=0, description="Growth of that warning per epoch of blending."
    )
    blending_warning_growth_max: float = Field(0.3, ge=0, description="Bound of the growth of that warning.")
    indecision_epochs_min: int = Field(2, ge=0, description="Epoch of HOLDING from which indecision costs.")
    indecision: float = Field(
        0.1, ge=0, description="Cost of leaving a worthy seed in HOLDING in that epoch."
    )
    indecision_per_epoch: float = Field(
        0.05, ge=0, description="Growth of the cost of indecision per further epoch."
    )
    indecision_max: float = Field(0.3, ge=0, description="Bound of the cost of indecision of a seed.")
    synergy_weight: float = Field(0.1, ge=0, description="Bound of a seed's reward for working with others.")
    synergy_slope: float = Field(
        0.5, ge=0, description="How fast synergy nears its bound, per interaction point."
    )
    rent_weight: float = Field(0.5, ge=0, description="Rent per unit of ln(1 + growth relative to the host).")
    rent_max: float = Field(1.5, ge=0, description="Bound of the rent of an epoch.")
    host_parameters_min: int = Field(200, ge=1, description="A smaller host counts as one of this size.")
    rent_host_share: float = Field(
        0.0039, ge=0, description="Share of the host's parameters charged for each blended slot."
    )
    alpha_shock_weight: float = Field(
        0.1958, ge=0, description="Cost of a squared change of alpha, times the seed's relative size."
    )
    alpha_shock_max: float = Field(1.0, ge=0, description="Bound of the cost of changing alphas in an epoch.")
    slots_free: int = Field(1, ge=0, description="Occupied slots that cost nothing.")
    slot_cost: float = Field(0.01, ge=0, description="Cost per epoch of each further occupied slot.")
    fossil_cost: float = Field(0.002, ge=0, description="Cost per epoch of each fossil.")
    germinate_cost: float = Field(0.15, ge=0, description="Cost of GERMINATE.")
    germinate_occupied_cost: float = Field(
        0.3, ge=0, description="Further cost of GERMINATE where the slot holds a seed."
    )
    set_alpha_cost: float = Field(0.005, ge=0, description="Cost of SET_ALPHA_TARGET.")
    advance_cost: float = Field(0.1, ge=0, description="Cost of ADVANCE out of TRAINING.")
    prune_cost: float = Field(0.005, ge=0, description="Cost of PRUNE.")
    prune_hurting_contribution: float = Field(
        -0.5, le=0, description="A seed worth less than this many points hurts."
    )
    prune_hurting_bonus: float = Field(0.15, ge=0, description="Reward for pruning a seed that hurts.")
    prune_hurting_age_min: int = Field(
        3, ge=0, description="Age from which pruning a seed that hurts is rewarded."
    )
    prune_negative_bonus: float = Field(
        0.1, ge=0, description="Reward for pruning a seed worth less than nothing."
    )
    prune_good_cost: float = Field(0.3, ge=0, description="Cost of pruning any other measured seed.")
    prune_good_cost_per_point: float = Field(
        0.05, ge=0, description="Growth of that cost per point of contribution."
    )
    prune_good_cost_max: float = Field(
        0.9, ge=0, description="Bound of the cost of pruning a seed that is worth something."
    )
    prune_young_age: int = Field(
        5, ge=0, description="Age below which pruning costs prune_young_cost instead of all the above."
    )
    prune_young_cost: float = Field(
        0.3, ge=0, description="Cost of pruning too early, per epoch the seed is too young."
    )
    prune_fossil_cost: float = Field(1.0, ge=0, description="Cost of trying to prune a fossil.")
    auto_prune_cost: float = Field(0.2, ge=0, description="Cost of a seed that the environment had to prune.")
    fossilize_cost: float = Field(0.01, ge=0, description="Cost of FOSSILIZE.")
    fossilize_refused_cost: float = Field(1.0, ge=0, description="Cost of a FOSSILIZE that is refused.")
    fossilize_harm_cost: float = Field(
        0.5, ge=0, description="Cost of fossilising while all seeds together make the host worse."
    )
    fossilize_harm_cost_per_point: float = Field(
        0.2, ge=0, description="Growth of that cost per point of harm."
    )
    fossilize_harm_growth_max: float = Field(1.0, ge=0, description="Bound of the growth of that cost.")
    ransom_cost: float = Field(0.3, ge=0, description="Further cost of fossilising a ransom.")
    ransom_contribution_min: float = Field(
        0.1, description="A ransom seems to be worth more than these points."
    )
    ransom_improvement_max: float = Field(
        -0.2, description="While there is a ransom, total improvement is below these points."
    )
    fossilize_contribution_min: float = Field(
        1.0, ge=0, description="Points a seed must be worth to be rewarded as a fossil."
    )
    fossilize_bonus: float = Field(0.5, ge=0, description="Reward for fossilising such a seed.")
    fossilize_bonus_per_point: float = Field(
        0.1, ge=0, description="Growth of that reward per point of contribution."
    )
    fossilize_count_bonus: float = Field(
        3.0, ge=0, description="Weight of a further bonus, the same for every such seed."
    )
    fossilize_count_scale: float = Field(
        3.0, gt=0, description="A fossil is paid fossilize_count_bonus times tanh(1 / this)."
    )
    fossilize_holding_epochs: int = Field(
        5, ge=1, description="Epochs of HOLDING that earn both bonuses wholly; fewer earn their share."
    )
    fossilize_idle_cost: float = Field(0.2, ge=0, description="Cost of fossilising any other seed.")
    hindsight_max: float = Field(
        0.2, ge=0, description="Bound of the credit for partners, paid when a seed is fossilised."
    )
    hindsight_slope: float = Field(
        0.1, ge=0, description="How fast it nears its bound, per interaction point times improvement point."
    )


class EscrowRewardConfig(Section):
    """`environment.reward.escrow`: the credit that ESCROW pays out and takes back."""

    stable_epochs: int = Field(
        3, ge=1, le=1000, description="The stable accuracy is the least of so many epochs'."
    )
    step_max: float = Field(2.0, gt=0, description="Bound of what a step pays of a live seed's credit.")


class DripRewardConfig(Section):
    """`environment.reward.drip`: how BASIC_PLUS pays the fossil bonus."""

    share: float = Field(
        0.7, ge=0, le=1, description="Share of the fossil bonus that is paid epoch by epoch."
    )
    epoch_max: float = Field(0.1, gt=0, description="Bound of what a fossil is paid in an epoch.")
    negative_share: float = Field(
        0.5, ge=0, le=1, description="Share of epoch_max that a harmful fossil costs at most."
    )
    epochs_min: int = Field(5, ge=1, description="Epochs over which that share is spread at least.")


class SparseRewardConfig(Section):
    """`environment.reward.sparse`: what SPARSE pays at the end, and MINIMAL's one addition."""

    parameter_weight: float = Field(0.1, ge=0, description="Cost of as many fossil parameters as the budget.")
    parameter_budget: int | None = Field(
        500_000, ge=1, description="Parameters that cost parameter_weight; unset: as many as the host has."
    )
    prune_young_age: int = Field(5, ge=0, description="Age below which MINIMAL charges a prune.")
    prune_young_cost: float = Field(0.1, ge=0, description="Cost of such a prune.")


class SimplifiedRewardConfig(Section):
    """`environment.reward.simplified`: SIMPLIFIED's three terms beside the shaping."""

    action_cost: float = Field(0.01, ge=0, description="Cost of every operation but WAIT.")
    terminal_accuracy_weight: float = Field(
        3.0, ge=0, description="Reward at the end for an accuracy of 100 %."
    )
    terminal_fossil_weight: float = Field(
        2.0, ge=0, description="Reward at the end per fossil that contributes."
    )
    contribution_min: float = Field(1.0, ge=0, description="Points from which a fossil contributes.")


class LossRewardConfig(Section):
    """`environment.reward.loss`: the reward of the loss family."""

    change_weight: float = Field(5.0, ge=0, description="Reward per deviation by which the loss falls.")
    change_max: float = Field(5.0, gt=0, description="Bound of a change, in deviations.")
    worse_share: float = Field(
        0.5, ge=0, le=1, description="Share of the weight that a rise of the loss costs."
    )
    deviation: float = Field(
        0.1, gt=0, description="Deviation of the changes of the loss when an episode begins."
    )
    deviation_ema: float = Field(
        0.99, ge=0, le=1, description="Weight of the past in that deviation; 1 keeps it as it began."
    )
    rent_weight: float = Field(
        0.05, ge=0, description="Rent per unit of ln(1 + growth relative to the host)."
    )
    grace_epochs: int = Field(3, ge=0, description="Age from which a seed's parameters are charged.")
    potential_weight: float = Field(0.1, ge=0, description="Weight of the potential-based shaping.")
    terminal_weight: float = Field(
        1.0, ge=0, description="Reward at the end for taking away the whole loss of guessing uniformly."
    )


class OfflineRewardConfig(Section):
    """`environment.reward.offline`: what a field report is worth."""

    success_bonus: float = Field(10.0, ge=0, description="Reward of a successful adaptation.")
    accuracy_weight: float = Field(40.0, ge=0, description="Reward per unit of accuracy gained (1 is 100 %).")
    efficiency_weight: float = Field(0.3, ge=0, description="Reward over the resource usage.")
    resource_min: float = Field(0.1, gt=0, description="A smaller resource usage counts as this one.")
    stability_weight: float = Field(3.0, ge=0, description="Reward of a stability of 1, the seeds' mean.")
    failure_cost: float = Field(2.0, ge=0, description="Cost per failure.")
    duration_free_s: float = Field(5.0, ge=0, description="Seconds an adaptation may take for nothing.")
    duration_cost_per_s: float = Field(1.0, ge=0, description="Cost of each further second.")
    outcome_success: float = Field(1.0, description="Worth of SUCCESS where the change of loss is unknown.")
    outcome_neutral: float = Field(0.0, description="Worth of NEUTRAL where the change of loss is unknown.")
    outcome_regression: float = Field(
        -0.5, description="Worth of REGRESSION where the change of loss is unknown."
    )
    outcome_aborted: float = Field(-1.0, description="Worth of ABORTED where the change of loss is unknown.")


RewardMode = Literal["shaped", "escrow", "basic", "basic_plus", "sparse", "minimal", "simplified", "loss"]

REWARD_FAMILIES: Final[dict[str, tuple[RewardMode, ...]]] = {
    "contribution": ("shaped", "escrow", "basic", "basic_plus", "sparse", "minimal", "simplified"),
    "loss": ("loss",),
}
"""The modes of each family: what a seed contributes to accuracy is paid, or what the loss does."""

FARMABLE_REWARDS: Final[frozenset[RewardMode]] = frozenset({"shaped"})
"""Modes that pay more for holding seeds for ever than for fossilising them; none of them is a default."""

INDIFFERENT_REWARDS: Final[frozenset[RewardMode]] = frozenset({"loss"})
"""Modes that pay the same for both."""


class RewardConfig(Section):
    """`environment.reward`: which reward, and the weight of each of its named parts.

    The keys beside the sections are those of BASIC; other modes share them where they have the same term.
    """

    mode: RewardMode = Field(
        "basic",
        description="Which reward. Paid for never fossilising, so that its return proves nothing: "
        f"{', '.join(sorted(FARMABLE_REWARDS))}. Indifferent to fossilising: "
        f"{', '.join(sorted(INDIFFERENT_REWARDS))}. The others pay more for a seed that becomes permanent.",
    )
    family: Literal["contribution", "loss"] = Field(
        "contribution",
        description="What is paid for: accuracy and contributions, or the loss; mode belongs to it.",
    )
    potential_weight: float = Field(0.3, ge=0, description="Weight of the potential-based shaping.")
    stage_bonus_per_epoch: float = Field(
        0.3, ge=0, description="Growth of a slot's potential per epoch in its stage."
    )
    stage_bonus_max: float = Field(2.0, ge=0, description="Bound of that growth.")
    rent_weight: float = Field(
        0.01, ge=0, description="Cost per epoch of blended parameters, relative to the host's own count."
    )
    fossil_bonus_base: float = Field(0.3, ge=0, description="Reward for fossilising a seed that contributes.")
    fossil_bonus_per_point: float = Field(
        0.5, ge=0, description="Reward per accuracy point (harmonic mean of contribution and progress)."
    )
    fossil_bonus_max: float = Field(5.0, ge=0, description="Bound of the whole fossil bonus.")
    terminal_accuracy_weight: float = Field(
        0.05, ge=0, description="Reward per accuracy point at the episode's end."
    )
    terminal_parameter_weight: float = Field(
        0.1,
        ge=0,
        description="Cost at the episode's end of added parameters, relative to the host's own count.",
    )
    shaped: ShapedRewardConfig = Field(default_factory=ShapedRewardConfig)
    escrow: EscrowRewardConfig = Field(default_factory=EscrowRewardConfig)
    drip: DripRewardConfig = Field(default_factory=DripRewardConfig)
    sparse: SparseRewardConfig = Field(default_factory=SparseRewardConfig)
    simplified: SimplifiedRewardConfig = Field(default_factory=SimplifiedRewardConfig)
    loss: LossRewardConfig = Field(default_factory=LossRewardConfig)
    offline: OfflineRewardConfig = Field(default_factory=OfflineRewardConfig)

    @model_validator(mode="after")
    def _mode_of_its_family(self) -> RewardConfig:
        known = REWARD_FAMILIES[self.family]
        if self.mode not in known:
            family = next(name for name, modes in REWARD_FAMILIES.items() if self.mode in modes)
            raise ValueError(
                f"mode {self.mode} is of the family {family}, not {self.family}: set family to {family}, or mode to "
                f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}"
            )
        return self
