"""What a learner tells the world about its work: names, counts that add up, and who may watch a step.

Nothing here decides anything: a run learns the same with and without it.
"""

from __future__ import annotations

from esper_simic.telemetry.catalogue import (
    CATALOGUE,
    PROTOTYPE_NAMES,
    find,
    tensorboard_tag,
    unknown,
)
from esper_simic.telemetry.counts import HistogramCounts, StepHistograms, Totals
from esper_simic.telemetry.metric import Kind, Metric
from esper_simic.telemetry.observers import (
    ErrorText,
    NullObserver,
    Observers,
    Phase,
    StepObserver,
    TimingObserver,
)

__all__ = [
    "CATALOGUE",
    "PROTOTYPE_NAMES",
    "ErrorText",
    "HistogramCounts",
    "Kind",
    "Metric",
    "NullObserver",
    "Observers",
    "Phase",
    "StepHistograms",
    "StepObserver",
    "TimingObserver",
    "Totals",
    "find",
    "tensorboard_tag",
    "unknown",
]
