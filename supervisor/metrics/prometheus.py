"""A run's metrics as Prometheus reads them: the page behind `/metrics`.

Names, kinds and units come from `esper_simic.telemetry.CATALOGUE`; nothing else is shown, and nothing of the process's
global registry. `show` replaces what is shown as one value, so a page read meanwhile is of one moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from esper_simic.telemetry import CATALOGUE, HistogramCounts, Kind, Metric, find
from supervisor.metrics.endpoint import Page

NOT_FINITE: Final = "simic_telemetry_not_finite_values_total"
"""Values that no histogram could take, by metric."""


class _Shown(NamedTuple):
    metrics: Mapping[str, float]
    histograms: Mapping[str, HistogramCounts]


class PrometheusExporter(Collector):
    """Shows the newest metrics of a run.

    Args:
        run: What tells this run from others, such as `{"run_id": …, "preset": …}`, shown as `simic_run_info`.
    """

    def __init__(self, run: Mapping[str, str]) -> None:
        self._run = dict(run)
        self._shown = _Shown({}, {})
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def show(self, metrics: Mapping[str, float], histograms: Mapping[str, HistogramCounts]) -> None:
        """Show these from now on.

        Args:
            metrics: Values by report key, counters summed over the learner's lives (`Totals.counters`). Keys that the
                catalogue does not know are not shown.
            histograms: By source (`Totals.histograms`).
        """
        self._shown = _Shown(dict(metrics), dict(histograms))

    def page(self, accept: str) -> Page:
        """All of it, in the format that the reader asks for by its `Accept` header."""
        encode, content_type = choose_encoder(accept)
        return Page(content_type, encode(self._registry))

    def describe(self) -> Iterator[Family]:
        """Nothing ahead: what there is depends on the run."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """Every metric that has a value, as the client library wants it."""
        shown = self._shown
        yield InfoMetricFamily("simic_run", "The run that is shown here.", self._run)
        by_metric: dict[str, list[tuple[str, float]]] = {}
        for key, value in shown.metrics.items():
            found = find(key)
            if found is not None:
                metric, label = found
                by_metric.setdefault(metric.name, []).append((label, value))
        for metric in CATALOGUE:
            if metric.kind is Kind.HISTOGRAM:
                counts = shown.histograms.get(metric.source)
                if counts is not None:
                    yield _histogram(metric, counts)
            elif values := by_metric.get(metric.name):
                yield _values(metric, values)
        yield _not_finite(shown.histograms)


def _values(metric: Metric, values: list[tuple[str, float]]) -> Family:
    of_kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    labels = [metric.label] if metric.is_family else []
    family = of_kind(metric.prometheus_name, metric.description, labels=labels)
    for label, value in values:
        family.add_metric([label] if labels else [], metric.in_base_unit(value * metric.per_source))
    return family


def _histogram(metric: Metric, counts: HistogramCounts) -> Family:
    """Prometheus counts each bucket together with all below it."""
    buckets, below = [], 0
    for bound, count in zip(counts.bounds, counts.counts, strict=False):
        below += count
        buckets.append((repr(metric.in_base_unit(bound)), float(below)))
    buckets.append(("+Inf", float(counts.count)))
    return HistogramMetricFamily(
        metric.prometheus_name,
        metric.description,
        buckets=buckets,
        sum_value=metric.in_base_unit(counts.total),
    )


def _not_finite(histograms: Mapping[str, HistogramCounts]) -> Family:
    family = CounterMetricFamily(
        NOT_FINITE, "Values that were not finite, which no histogram could take.", labels=["metric"]
    )
    for metric in CATALOGUE:
        if metric.source in histograms:
            family.add_metric([metric.name], float(histograms[metric.source].not_finite))
    return family
