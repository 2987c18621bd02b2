"""The rows of what one algorithm alone has to tell, and of the curriculum; see `telemetry.catalogue`."""

from __future__ import annotations

from typing import Final

from esper_simic.telemetry.metric import Kind, Metric, counter, gauge


def _of_heads(name: str, source: str, description: str, unit: str, tag: str) -> Metric:
    return Metric(
        name=name,
        kind=Kind.GAUGE,
        unit=unit,
        description=description,
        source=source,
        label="head",
        tag=tag,
    )


ALGORITHMS: Final = (
    gauge(
        "simic.trainer.batch_size",
        "batch_size",
        "Experiences of the newest update.",
        unit="experiences",
        tag="charts/batch_size",
    ),
    gauge(
        "simic.trainer.curriculum_difficulty",
        "curriculum_difficulty",
        "Difficulty of the stage that is on, 0 to 1.",
        tag="charts/curriculum_difficulty",
    ),
    gauge(
        "simic.trainer.curriculum_success_rate",
        "curriculum_success_rate",
        "Share of successes among the newest episodes of the stage's round.",
        tag="charts/curriculum_success_rate",
    ),
    counter(
        "simic.trainer.facts",
        "facts.",
        "What happened beside updates, such as stages passed and breakers opened, by kind.",
        unit="facts",
        label="kind",
    ),
    # PPO and APPO
    gauge(
        "simic.trainer.entropy_floor_penalty",
        "entropy_floor_penalty",
        "Penalty for heads whose entropy is below their floor.",
        tag="losses/entropy_floor_penalty",
    ),
    gauge(
        "simic.trainer.anchor_ratio",
        "mean_ratio",
        "Mean ratio of the moving policy's probabilities to those at the update's beginning.",
        tag="losses/ratio",
    ),
    gauge(
        "simic.trainer.importance",
        "mean_importance",
        "Mean importance weight of the policy's gradient.",
        tag="losses/importance",
    ),
    _of_heads(
        "simic.trainer.head_kl",
        "head_kl.",
        "Estimated divergence of one head from where it was when the update began.",
        "nats",
        "losses/kl_{}",
    ),
    gauge(
        "simic.trainer.ppo_steps",
        "ppo_steps",
        "Optimiser steps of the newest update.",
        unit="steps",
        tag="charts/ppo_steps",
    ),
    gauge(
        "simic.trainer.ppo_stopped_early",
        "ppo_stopped_early",
        "1 where the newest update ended early because the policy had moved far enough.",
        tag="charts/ppo_stopped_early",
    ),
    # BC
    _of_heads(
        "simic.trainer.head_nll",
        "head_nll.",
        "Negative log-likelihood of one head's recorded choices.",
        "nats",
        "losses/nll_{}",
    ),
    _of_heads(
        "simic.trainer.head_accuracy",
        "head_accuracy.",
        "Share of one head's recorded choices that the policy holds most probable.",
        "1",
        "losses/accuracy_{}",
    ),
    # IQL
    gauge("simic.trainer.q_loss", "q_loss", "Loss of the critics.", tag="losses/q_loss"),
    gauge(
        "simic.trainer.conservative_loss",
        "conservative_loss",
        "How far critics value other actions above the recorded ones.",
        tag="losses/conservative_loss",
    ),
    gauge(
        "simic.trainer.policy_weight",
        "mean_policy_weight",
        "Mean weight of recorded actions in the policy's loss.",
        tag="losses/policy_weight",
    ),
    gauge(
        "simic.trainer.weight_clip_fraction",
        "weight_clip_fraction",
        "Share of these weights at their bound.",
        tag="losses/weight_clipfrac",
    ),
    gauge("simic.trainer.q_value", "mean_q", "Mean value of recorded actions.", tag="losses/q_value"),
)
