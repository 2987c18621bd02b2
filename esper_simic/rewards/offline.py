"""What a field report is worth: rewards for learning from what others did.

Two rules, both in named parts like the rewards of an environment:

* `by_outcome`: the fall of the loss; where the report does not tell it, a number for the outcome.
* `by_metrics`: success, accuracy gained, efficiency, stability, failures and duration.

A report that says REGRESSION or ABORTED is a report like any other. What a report does not tell is worth nothing; a
metric that is not a finite number is refused, and so is an outcome that the contract does not have.

Metrics that are read:

| key | unit | read by |
|---|---|---|
| `loss_delta`, else `loss_delta_total` | change of the loss, positive is worse | `by_outcome` |
| `accuracy_delta` | share, 1 is 100 % | `by_metrics` |
| `resource_usage` | above 0; relative, 1 is usual | `by_metrics` |
| `stability_score` | mean over the seeds, in [0, 1] | `by_metrics` |
| `failure_count` | failures | `by_metrics` |
| `duration_ms` | milliseconds the adaptation took | `by_metrics` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from esper_simic.config_rewards import OfflineRewardConfig
from esper_simic.errors import ContractError
from esper_simic.rewards.loss import gain


class ReportOutcome(IntEnum):
    """How an adaptation ended; the numbers are those of the wire contract. There is no other value."""

    UNSPECIFIED = 0
    SUCCESS = 1
    NEUTRAL = 2
    REGRESSION = 3
    ABORTED = 4


OUTCOME_PARTS: Final = ("loss", "outcome")
"""Names of the parts of `by_outcome`; one of them is 0."""

METRIC_PARTS: Final = ("success", "accuracy", "efficiency", "stability", "failures", "duration")
"""Names of the parts of `by_metrics`."""


def by_outcome(outcome: int, metrics: Mapping[str, float], weights: OfflineRewardConfig) -> dict[str, float]:
    """The fall of the loss, or a number for the outcome: SUCCESS 1, NEUTRAL 0, REGRESSION -0.5, ABORTED -1.

    Args:
        outcome: A value of `ReportOutcome`.
        metrics: Of the report. A loss change that is there decides, also where it is 0.
        weights: The numbers.

    Returns:
        Name to reward, in the order of `OUTCOME_PARTS`.

    Raises:
        ContractError: The outcome is unknown, or unspecified where the report tells no loss; a metric is not finite.
    """
    kind = _known(outcome)
    for key in ("loss_delta", "loss_delta_total"):
        if key in metrics:
            return {"loss": float(gain(_metric(metrics, key))), "outcome": 0.0}
    if kind is ReportOutcome.UNSPECIFIED:
        raise ContractError("a field report without an outcome and without loss_delta is worth nothing known")
    worth = {
        ReportOutcome.SUCCESS: weights.outcome_success,
        ReportOutcome.NEUTRAL: weights.outcome_neutral,
        ReportOutcome.REGRESSION: weights.outcome_regression,
        ReportOutcome.ABORTED: weights.outcome_aborted,
    }
    return {"loss": 0.0, "outcome": worth[kind]}


def by_metrics(outcome: int, metrics: Mapping[str, float], weights: OfflineRewardConfig) -> dict[str, float]:
    """What an adaptation did, weighed.

    `10 success + 40 accuracy_delta + 0.3 / max(resource, 0.1) + 3 stability - 2 failures - max(seconds - 5, 0)`

    Args:
        outcome: A value of `ReportOutcome`.
        metrics: Of the report; the part of a metric that is missing is 0.
        weights: The numbers.

    Returns:
        Name to reward, in the order of `METRIC_PARTS`; the reward is their sum.

    Raises:
        ContractError: The outcome is unknown, or a metric is not finite.
    """
    succeeded = _known(outcome) is ReportOutcome.SUCCESS
    usage = max(_metric(metrics, "resource_usage"), weights.resource_min)
    excess_s = max(_metric(metrics, "duration_ms") / 1000.0 - weights.duration_free_s, 0.0)
    return {
        "success": weights.success_bonus if succeeded else 0.0,
        "accuracy": weights.accuracy_weight * _metric(metrics, "accuracy_delta"),
        "efficiency": weights.efficiency_weight / usage if "resource_usage" in metrics else 0.0,
        "stability": weights.stability_weight * _metric(metrics, "stability_score"),
        "failures": -weights.failure_cost * _metric(metrics, "failure_count"),
        "duration": -weights.duration_cost_per_s * excess_s,
    }


def _known(outcome: int) -> ReportOutcome:
    try:
        return ReportOutcome(outcome)
    except ValueError:
        raise ContractError(
            f"a field report's outcome is one of {[int(one) for one in ReportOutcome]}, not {outcome}"
        ) from None


def _metric(metrics: Mapping[str, float], key: str) -> float:
    """A metric of a report; 0 where it is missing."""
    value = float(metrics.get(key, 0.0))
    if not math.isfinite(value):
        raise ContractError(f"the metric {key} of a field report is {value}, not a finite number")
    return value
