"""The catalogue against the names that are demanded, counts against a slow truth, observers against a manual clock."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_simic.errors import ContractError
from esper_simic.telemetry import (
    CATALOGUE,
    PROTOTYPE_NAMES,
    ErrorText,
    HistogramCounts,
    Kind,
    NullObserver,
    Observers,
    Phase,
    StepHistograms,
    StepObserver,
    TimingObserver,
    Totals,
    find,
    tensorboard_tag,
    unknown,
)

BY_NAME = {metric.name: metric for metric in CATALOGUE}

DEMANDED = {
    "simic.trainer.policy_loss": ("gauge", "simic_trainer_policy_loss"),
    "simic.trainer.value_loss": ("gauge", "simic_trainer_value_loss"),
    "simic.trainer.grad_norm": ("histogram", "simic_trainer_grad_norm"),
    "simic.trainer.training_time_ms": ("histogram", "simic_trainer_training_duration_seconds"),
    "simic.trainer.vtrace_time_ms": ("histogram", "simic_trainer_vtrace_duration_seconds"),
    "simic.trainer.ewc_penalty": ("gauge", "simic_trainer_ewc_penalty"),
    "simic.trainer.curriculum_stage": ("gauge", "simic_trainer_curriculum_stage"),
    "simic.trainer.conservative_mode": ("counter", "simic_trainer_conservative_mode_total"),
    "simic.buffer.size": ("gauge", "simic_buffer_size"),
    "simic.buffer.memory_mb": ("gauge", "simic_buffer_memory_bytes"),
    "simic.buffer.ttl_cleanups": ("counter", "simic_buffer_ttl_cleanups_total"),
    "simic.buffer.expired_removed": ("counter", "simic_buffer_expired_removed_total"),
    "simic.sampling.batch_time_ms": ("gauge", "simic_sampling_batch_duration_seconds"),
}
"""Names that others wait for: (kind, Prometheus name)."""

ALSO_DEMANDED = {
    "approx_kl": "simic.trainer.approx_kl",
    "entropy": "simic.trainer.entropy",
    "head_entropy.blueprint": "simic.trainer.head_entropy",
    "learning_rate.policy": "simic.trainer.learning_rate",
    "learning_rate.value": "simic.trainer.learning_rate",
    "mean_rho": "simic.trainer.importance_ratio",
    "explained_variance": "simic.trainer.explained_variance",
    "policy_lag": "simic.trainer.policy_lag",
    "clip_fraction": "simic.trainer.clip_fraction",
    "buffer_evicted": "simic.buffer.evictions",
    "refused.too_old": "simic.trainer.refusals",
    "conservative_mode": "simic.trainer.conservative_mode_active",
}
"""Report key -> metric."""

REPORTED = (
    "total policy_loss value_loss entropy mean_rho clip_fraction approx_kl explained_variance mean_advantage "
    "mean_value learning_rate.policy learning_rate.value grad_norm entropy_coefficient reward_deviation policy_lag "
    "policy_lag_max replay_age buffer_size episodic_return episodic_length episodic_accuracy episodic_parameters "
    "refused.too_old refused.frame.malformed checkpoint.step checkpoint.age_s checkpoint.failures admission_paused "
    "quarantined inexact recovery.done recovery.total recovery.seconds_left"
).split()
"""Every key of a learner's progress report today."""


@pytest.mark.parametrize("name", DEMANDED)
def test_a_demanded_name_has_its_kind_and_its_prometheus_name(name: str) -> None:
    kind, prometheus = DEMANDED[name]
    assert (BY_NAME[name].kind, BY_NAME[name].prometheus_name) == (kind, prometheus)


@pytest.mark.parametrize("key", ALSO_DEMANDED)
def test_what_else_is_demanded_is_taken_from_the_report(key: str) -> None:
    found = find(key)
    assert found is not None
    metric, label = found
    assert metric.name == ALSO_DEMANDED[key]
    assert label == key.partition(".")[2]


def test_every_key_of_a_report_is_somebodys() -> None:
    assert unknown(REPORTED) == frozenset()
    assert unknown(["nonsense", "nonsense.x", "head_entropy.", "policy_loss"]) == {
        "nonsense",
        "nonsense.x",
        "head_entropy.",
    }


def test_names_of_the_prototype_lead_to_metrics_that_there_are() -> None:
    assert set(PROTOTYPE_NAMES.values()) <= set(BY_NAME)
    assert not set(PROTOTYPE_NAMES) & set(BY_NAME)


def test_no_name_tag_or_source_stands_twice() -> None:
    for column in (
        [metric.name for metric in CATALOGUE],
        [metric.prometheus_name for metric in CATALOGUE],
        [metric.source for metric in CATALOGUE],
        [metric.tag for metric in CATALOGUE if metric.tag],
    ):
        assert len(set(column)) == len(column)


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_a_row_is_whole(metric) -> None:
    assert re.fullmatch(r"simic(\.[a-z]+(_[a-z]+)*){2}", metric.name)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric.prometheus_name)
    assert re.fullmatch(r"[A-Z1].*\.", metric.description)
    assert metric.unit
    assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
    assert bool(metric.label) == metric.is_family
    assert ("{}" in metric.tag) == (metric.is_family and bool(metric.tag))
    # A unit of the name is in the name's Prometheus form a base unit.
    assert not metric.prometheus_name.endswith(("_ms", "_mb", "_s"))
    assert metric.prometheus_name.endswith("_total") == (metric.kind is Kind.COUNTER)


def test_base_units() -> None:
    assert BY_NAME["simic.trainer.training_time_ms"].in_base_unit(350.0) == 0.35
    memory = BY_NAME["simic.buffer.memory_mb"]
    assert memory.in_base_unit(3_000_001 * memory.per_source) == 3_000_001
    assert BY_NAME["simic.trainer.grad_norm"].in_base_unit(0.7) == 0.7


def test_tags_of_families_and_of_what_is_not_drawn() -> None:
    assert tensorboard_tag("head_entropy.op") == "losses/entropy_op"
    assert tensorboard_tag("learning_rate.value") == "charts/learning_rate_value"
    assert tensorboard_tag("refused.too_old") == ""
    assert tensorboard_tag("unheard_of") == ""


# -- histograms --------------------------------------------------------------------------------------------------------

BOUNDS = (0.5, 1.0, 10.0)

values = st.floats(-1e6, 1e6) | st.sampled_from([*BOUNDS, 0.0, math.nan, math.inf, -math.inf])


def counted(numbers: list[float]) -> HistogramCounts:
    counts = HistogramCounts.empty(BOUNDS)
    for number in numbers:
        counts = counts.add(number)
    return counts


@given(st.lists(values))
def test_every_value_falls_into_the_bucket_whose_upper_bound_is_the_first_not_below_it(numbers) -> None:
    counts = counted(numbers)
    finite = [number for number in numbers if math.isfinite(number)]
    edges = (-math.inf, *BOUNDS, math.inf)
    assert counts.counts == tuple(
        sum(low < number <= high for number in finite) for low, high in itertools.pairwise(edges)
    )
    assert counts.count == len(finite)
    assert counts.not_finite == len(numbers) - len(finite)
    assert counts.total == pytest.approx(math.fsum(finite), rel=1e-9, abs=1e-6)


@given(st.lists(values), st.lists(values))
def test_merging_is_counting_both(first, second) -> None:
    merged, both = counted(first).merge(counted(second)), counted(first + second)
    assert (merged.counts, merged.not_finite) == (both.counts, both.not_finite)
    assert merged.total == pytest.approx(both.total, rel=1e-9, abs=1e-6)


@given(st.lists(values))
def test_plain_values_and_bytes_bring_it_back(numbers) -> None:
    counts = counted(numbers)
    assert HistogramCounts.from_builtins(json.loads(json.dumps(counts.to_builtins()))) == counts
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(counts), type=HistogramCounts) == counts


def test_other_bounds_do_not_add_up() -> None:
    with pytest.raises(ContractError, match="do not add up"):
        counted([1.0]).merge(HistogramCounts.empty((1.0, 2.0)))


@pytest.mark.parametrize("bounds", [(), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_bounds_must_rise(bounds) -> None:
    with pytest.raises(ValueError, match="must rise"):
        HistogramCounts.empty(bounds)


@pytest.mark.parametrize(
    "change",
    [{"counts": [1, 2]}, {"counts": [1, 2, 3, -4]}, {"not_finite": -1}, {"total": "much"}, {"bounds": None}],
)
def test_what_is_no_histogram_is_refused(change) -> None:
    wrong = counted([1.0]).to_builtins() | change
    with pytest.raises(ContractError, match="no histogram"):
        HistogramCounts.from_builtins(wrong)
    # Whoever decodes messages hears of it as of any other message that is not what it should be.
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=HistogramCounts)


def test_the_budgets_are_bounds_so_that_the_share_within_them_is_exact() -> None:
    for name, budget in (
        ("simic.trainer.training_time_ms", 500.0),
        ("simic.trainer.vtrace_time_ms", 50.0),
        ("simic.trainer.grad_norm", 10.0),
    ):
        assert budget in BY_NAME[name].bounds


def test_a_step_goes_into_the_histograms_of_what_it_measured() -> None:
    histograms = StepHistograms()
    for norm in (0.02, 0.2, 400.0):
        histograms = histograms.followed({"grad_norm": norm, "policy_loss": 9.0, "training_time_ms": 7.0})
    assert set(histograms.by_source) == {"grad_norm", "training_time_ms", "vtrace_time_ms"}
    norms = histograms.by_source["grad_norm"]
    assert norms.counts[-1] == 1
    assert norms.counts[bisect.bisect_left(norms.bounds, 0.2)] == 1
    assert norms.total == pytest.approx(400.22)
    assert histograms.by_source["training_time_ms"].count == 3
    assert histograms.by_source["vtrace_time_ms"].count == 0
    assert StepHistograms().by_source["grad_norm"].count == 0


# -- totals ------------------------------------------------------------------------------------------------------------


def test_totals_go_on_where_an_earlier_life_ended() -> None:
    totals = Totals()
    totals = totals.followed(1, {"refused.too_old": 2.0, "policy_loss": 1.0}, {"grad_norm": counted([1.0])})
    totals = totals.followed(1, {"refused.too_old": 5.0}, {"grad_norm": counted([1.0, 2.0])})
    assert totals.counters() == {"refused.too_old": 5.0}
    totals = totals.followed(2, {}, {})
    assert totals.counters() == {"refused.too_old": 5.0}
    totals = totals.followed(
        2, {"refused.too_old": 1.0, "refused.malformed": 1.0}, {"grad_norm": counted([9.0])}
    )
    assert totals.counters() == {"refused.too_old": 6.0, "refused.malformed": 1.0}
    assert totals.histograms()["grad_norm"] == counted([1.0, 2.0, 9.0])
    assert totals.followed(4, {"refused.too_old": 1.0}, {}).counters()["refused.too_old"] == 7.0


def test_an_earlier_life_that_speaks_late_counts_no_more() -> None:
    totals = Totals().followed(2, {"refused.too_old": 1.0}, {})
    assert totals.followed(1, {"refused.too_old": 100.0}, {}) == totals


def test_what_the_learners_state_counts_itself_is_not_added_up() -> None:
    totals = (
        Totals().followed(1, {"conservative_entries": 3.0}, {}).followed(2, {"conservative_entries": 3.0}, {})
    )
    assert totals.counters() == {}


def test_a_report_without_a_counter_takes_nothing_back() -> None:
    totals = Totals().followed(1, {"refused.too_old": 4.0}, {"grad_norm": counted([1.0])}).followed(1, {}, {})
    assert totals.counters() == {"refused.too_old": 4.0}
    assert totals.histograms()["grad_norm"].count == 1


lives = st.lists(st.tuples(st.booleans(), st.lists(st.floats(0.0, 100.0), max_size=4)), max_size=12)


@given(lives)
def test_totals_only_grow_and_end_at_everything_that_was_counted(told) -> None:
    """Each entry is a report; a true flag begins a new life before it. What one life counts only grows."""
    of_life: list[float] = []
    totals, life, everything, before = Totals(), 1, 0, 0
    for is_new, numbers in told:
        if is_new:
            life, of_life = life + 1, []
        of_life = of_life + numbers
        everything += len(numbers)
        totals = totals.followed(life, {"refused.x": float(len(of_life))}, {"grad_norm": counted(of_life)})
        count = totals.histograms()["grad_norm"].count
        assert before <= count == totals.counters()["refused.x"] == everything
        before = count


# -- observers ---------------------------------------------------------------------------------------------------------


class Scripted:
    """A clock that reads what was laid down for it."""

    def __init__(self, *readings_s: float) -> None:
        self.readings_s = list(readings_s)

    def __call__(self) -> float:
        return self.readings_s.pop(0)


def step(observer: StepObserver, *phases: Phase) -> None:
    observer.begun(step=7, batch_size=32)
    for phase in phases:
        observer.passed(phase)
    observer.done(loss=1.5, grad_norm=0.5, conservative_mode=False)


def test_a_phase_lasts_from_what_was_told_before_it() -> None:
    timing = TimingObserver(Scripted(10.0, 10.001, 10.003, 10.007, 10.015, 10.031, 10.063))
    assert timing.milliseconds() == {}
    step(timing, *Phase)
    assert timing.milliseconds() == pytest.approx(
        {
            "sampling_time_ms": 1.0,
            "forward_time_ms": 2.0,
            "vtrace_time_ms": 4.0,
            "backward_time_ms": 8.0,
            "optimizer_time_ms": 16.0,
            "training_time_ms": 63.0,
        }
    )
    assert unknown(timing.milliseconds()) == frozenset()


def test_minibatches_count_together() -> None:
    timing = TimingObserver(Scripted(0.0, 1.0, 3.0, 7.0, 15.0, 15.0))
    step(timing, Phase.FORWARD, Phase.BACKWARD, Phase.FORWARD, Phase.BACKWARD)
    measured = timing.milliseconds()
    assert (measured["forward_time_ms"], measured["backward_time_ms"]) == (5000.0, 10000.0)


def test_only_the_newest_step_is_shown_and_only_once_it_ended() -> None:
    timing = TimingObserver(Scripted(0.0, 1.0, 2.0, 2.0, 5.0))
    step(timing, Phase.SAMPLING)
    timing.begun(step=8, batch_size=32)
    assert timing.milliseconds() == {"sampling_time_ms": 1000.0, "training_time_ms": 2000.0}
    timing.failed("the loss is not finite")
    assert timing.milliseconds() == {"training_time_ms": 3000.0}


def test_what_is_told_outside_of_a_step_is_dropped() -> None:
    timing = TimingObserver(Scripted())
    timing.passed(Phase.FORWARD)
    timing.done(loss=0.0, grad_norm=0.0, conservative_mode=False)
    timing.failed("")
    assert timing.milliseconds() == {}


def test_a_step_that_never_ended_is_forgotten() -> None:
    timing = TimingObserver(Scripted(0.0, 1.0, 10.0, 12.0))
    timing.begun(step=1, batch_size=32)
    timing.passed(Phase.FORWARD)
    step(timing)
    assert timing.milliseconds() == {"training_time_ms": 2000.0}


class Telling:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def begun(self, *, step: int, batch_size: int) -> None:
        self.told.append(("begun", step, batch_size))

    def passed(self, phase: Phase) -> None:
        self.told.append(("passed", phase))

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        self.told.append(("done", loss, grad_norm, conservative_mode))

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        self.told.append(("failed", reason, error))


def test_several_observers_are_told_the_same() -> None:
    first, second = Telling(), Telling()
    both = Observers(first, NullObserver(), second)
    step(both, Phase.FORWARD)
    error = ErrorText("Kind", "message", "trace")
    both.failed("why", error)
    assert (
        first.told
        == second.told
        == [
            ("begun", 7, 32),
            ("passed", Phase.FORWARD),
            ("done", 1.5, 0.5, False),
            ("failed", "why", error),
        ]
    )
