"""What field reports are worth; none of the contract's outcomes ever crashes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.config_rewards import OfflineRewardConfig
from esper_simic.errors import ContractError
from esper_simic.rewards import ReportOutcome
from esper_simic.rewards.offline import METRIC_PARTS, OUTCOME_PARTS, by_metrics, by_outcome

WEIGHTS = OfflineRewardConfig()
KNOWN = [one for one in ReportOutcome if one is not ReportOutcome.UNSPECIFIED]


def worth(rule, outcome, **metrics):
    return sum(rule(outcome, metrics, WEIGHTS).values())


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (ReportOutcome.SUCCESS, 1.0),
        (ReportOutcome.NEUTRAL, 0.0),
        (ReportOutcome.REGRESSION, -0.5),
        (ReportOutcome.ABORTED, -1.0),
    ],
)
def test_without_a_loss_the_outcome_decides(outcome, expected):
    """The trap: a value DEGRADED, which the contract does not have, was read here."""
    assert worth(by_outcome, outcome) == expected
    assert worth(by_outcome, outcome, tamiyo_latency_ms=3.0) == expected


@pytest.mark.parametrize("outcome", list(ReportOutcome))
@pytest.mark.parametrize("key", ["loss_delta", "loss_delta_total"])
def test_a_falling_loss_is_worth_its_fall_whatever_the_outcome(outcome, key):
    assert worth(by_outcome, outcome, **{key: -0.25}) == 0.25
    assert worth(by_outcome, outcome, **{key: 0.25}) == -0.25
    assert worth(by_outcome, outcome, **{key: 0.0}) == 0.0, "known to be 0 is not unknown"


def test_the_report_s_own_change_goes_before_that_of_its_window():
    assert worth(by_outcome, 1, loss_delta=-1.0, loss_delta_total=-7.0) == 1.0


def test_metrics_by_hand():
    """10 + 40 * 0.05 + 0.3 / 0.5 + 3 * 0.8 - 2 * 2 - (7 - 5)"""
    metrics = {
        "accuracy_delta": 0.05,
        "resource_usage": 0.5,
        "stability_score": 0.8,
        "failure_count": 2,
        "duration_ms": 7000.0,
    }
    assert worth(by_metrics, ReportOutcome.SUCCESS, **metrics) == pytest.approx(10 + 2 + 0.6 + 2.4 - 4 - 2)
    assert worth(by_metrics, ReportOutcome.REGRESSION, **metrics) == pytest.approx(2 + 0.6 + 2.4 - 4 - 2)


def test_what_a_report_does_not_tell_is_worth_nothing():
    assert worth(by_metrics, ReportOutcome.ABORTED) == 0.0
    assert worth(by_metrics, ReportOutcome.SUCCESS) == 10.0
    assert worth(by_metrics, ReportOutcome.SUCCESS, duration_ms=5000.0) == 10.0
    assert worth(by_metrics, ReportOutcome.NEUTRAL, resource_usage=0.0) == pytest.approx(3.0), "0.3 / 0.1"


@given(
    st.sampled_from(KNOWN),
    st.dictionaries(
        st.sampled_from(
            (
                "loss_delta",
                "loss_delta_total",
                "accuracy_delta",
                "resource_usage",
                "stability_score",
                "failure_count",
                "duration_ms",
            )
        ),
        st.floats(-1e6, 1e6),
    ),
)
def test_every_outcome_with_any_metrics_is_worth_a_number(outcome, metrics):
    for rule, names in ((by_outcome, OUTCOME_PARTS), (by_metrics, METRIC_PARTS)):
        found = rule(outcome, metrics, WEIGHTS)
        assert tuple(found) == names
        assert all(math.isfinite(part) for part in found.values())


@pytest.mark.parametrize("rule", [by_outcome, by_metrics])
def test_what_the_contract_does_not_have_is_refused(rule):
    for outcome in (5, -1):
        with pytest.raises(ContractError, match=f"not {outcome}"):
            rule(outcome, {"loss_delta": 1.0}, WEIGHTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_refused(value):
    with pytest.raises(ContractError, match="the metric loss_delta of a field report is"):
        by_outcome(1, {"loss_delta": value}, WEIGHTS)
    with pytest.raises(ContractError, match="the metric accuracy_delta of a field report is"):
        by_metrics(1, {"accuracy_delta": value}, WEIGHTS)


def test_a_report_that_tells_nothing_is_refused():
    with pytest.raises(ContractError, match="without an outcome and without loss_delta"):
        by_outcome(ReportOutcome.UNSPECIFIED, {}, WEIGHTS)
