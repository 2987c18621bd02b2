"""Judging what a replayed record did beside what it says.

Digests decide, whatever the fingerprints are: while every one was equal, the state is the learner's to the bit. The
first one that is not is a divergence under an equal fingerprint. Under another one it only ends the exactness, and from
there on metrics are compared within a tolerance, step by step, and tensors at the checkpoints on disk, from which the
replay then goes on, so that rounding does not add up from one to the next.

A way of computing that promises no equal bits (`promises_bits`) is another matter: then no step is a divergence. Those
beyond the tolerance are counted, and the largest relative difference of a metric is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from esper_simic.errors import ContractError, UnavailableError
from esper_simic.events import CheckpointStaged, LearnerRecovered, LearnerStepped, StepFailed
from esper_simic.fingerprint import promises_bits
from esper_simic.learner_state import LearnerState
from supervisor.journal import Record
from supervisor.playback.compare import (
    is_next_to_nothing,
    is_tensor_near,
    is_value_near,
    metric_differences,
    tensor_differences,
    value_differences,
)
from supervisor.playback.report import CheckpointComparison, Divergence, EventLine, LargestDifference
from supervisor.playback.summaries import summary
from supervisor.playback.survey import OnDisk
from supervisor.roles.fold import Folded, event_of, read_state

EVENTS_MAX: Final = 200
"""Events kept since the last equal comparison; of more, the oldest are counted only."""


class Compared(NamedTuple):
    """Two digests of the same thing."""

    what: Literal["parameters", "state"]
    recorded: str
    computed: str


def digests_of(folded: Folded) -> list[Compared]:
    """The digests that a record holds, each beside the one that was computed."""
    event, report = folded.event, folded.report
    compared: list[Compared] = []
    if not isinstance(event, LearnerStepped | StepFailed | CheckpointStaged | LearnerRecovered):
        return compared
    if isinstance(event, LearnerStepped | StepFailed) and report is not None:
        compared.append(Compared("parameters", event.digest, report.digest))
    if event.state_digest is not None and folded.state_digest is not None:
        compared.append(Compared("state", event.state_digest, folded.state_digest))
    return compared


@dataclass(slots=True)
class Tally:
    """Comparisons that went well."""

    steps_by_digest: int = 0
    steps_by_tolerance: int = 0
    steps_beyond: int = 0
    """Of a way that promises no equal bits."""
    largest: LargestDifference | None = None
    states_equal: int = 0
    metrics_differing: int = 0
    """Steps with equal digests and other metrics."""
    metrics_differing_first: str = ""


@dataclass(slots=True)
class Judge:
    """Compares record by record, and remembers what happened since the last equal comparison."""

    fingerprint_here: dict[str, str]
    tally: Tally = field(default_factory=Tally)
    is_exact: bool = True
    """Whether the state is the learner's to the bit, as far as was compared."""
    equal_position: int | None = None
    _since_equal: deque[EventLine] = field(default_factory=lambda: deque(maxlen=EVENTS_MAX))
    _events: int = 0

    def begin(self) -> None:
        """The state is that of a checkpoint: exact again, and nothing before it matters."""
        self.is_exact = True
        self._clear()

    def note(self, record: Record) -> None:
        """Remember a record that is about to be folded."""
        self._since_equal.append(
            EventLine(record.position, record.time_ns, record.kind, summary(event_of(record)))
        )
        self._events += 1

    def judge(self, record: Record, folded: Folded, fingerprint: Mapping[str, str]) -> Divergence | None:
        """Compare what a record did with what it says.

        Args:
            record: The record; `note` was told of it.
            folded: What it did.
            fingerprint: Under which it was recorded.

        Returns:
            The divergence, if this is one.
        """
        compared = digests_of(folded)
        unequal = next((one for one in compared if one.recorded != one.computed), None)
        if unequal is not None:
            is_comparable = (
                promises_bits(fingerprint) and fingerprint == self.fingerprint_here and self.is_exact
            )
            self.is_exact = False
            if is_comparable:
                return self._divergence(record, folded, fingerprint, unequal.what, *unequal[1:])
            return self._judge_by_tolerance(record, folded, fingerprint)
        if compared:
            self._equal(record, folded, compared)
        return None

    def error(self, record: Record, error: Exception, fingerprint: Mapping[str, str]) -> Divergence:
        """What a record that cannot be folded at all is."""
        folded = Folded(event_of(record))
        return self._divergence(record, folded, fingerprint, "error", summary(folded.event), str(error))

    def _equal(self, record: Record, folded: Folded, compared: list[Compared]) -> None:
        tally = self.tally
        tally.states_equal += sum(one.what == "state" for one in compared)
        if isinstance(folded.event, LearnerStepped | StepFailed) and folded.report is not None:
            tally.steps_by_digest += 1
        if isinstance(folded.event, LearnerStepped) and folded.report is not None:
            common = folded.event.metrics.keys() & folded.report.metrics.keys()
            differing = metric_differences(
                {name: folded.event.metrics[name] for name in common},
                {name: folded.report.metrics[name] for name in common},
            )
            if differing:
                tally.metrics_differing += 1
                names = ", ".join(one.name for one in differing)
                tally.metrics_differing_first = (
                    tally.metrics_differing_first or f"step {folded.event.step}: {names}"
                )
        self.equal_position = record.position
        self._clear()

    def _judge_by_tolerance(
        self, record: Record, folded: Folded, fingerprint: Mapping[str, str]
    ) -> Divergence | None:
        event, report = folded.event, folded.report
        if not isinstance(event, LearnerStepped) or report is None:
            return None
        self._note_largest(event, report.metrics)
        outside = metric_differences(event.metrics, report.metrics, is_within_tolerance=True)
        if outside and not promises_bits(fingerprint):
            self.tally.steps_beyond += 1
            return None
        if outside:
            names = ", ".join(one.name for one in outside)
            return self._divergence(record, folded, fingerprint, "metrics", names, "outside the tolerance")
        self.tally.steps_by_tolerance += 1
        self.equal_position = record.position
        self._clear()
        return None

    def _note_largest(self, event: LearnerStepped, computed: Mapping[str, float]) -> None:
        largest = self.tally.largest
        for one in metric_differences(event.metrics, computed):
            is_more = largest is None or one.relative > largest.metric.relative
            if is_more and not is_next_to_nothing(one):
                largest = LargestDifference(event.step, one)
        self.tally.largest = largest

    def _clear(self) -> None:
        self._since_equal.clear()
        self._events = 0

    def _divergence(
        self,
        record: Record,
        folded: Folded,
        fingerprint: Mapping[str, str],
        what: Literal["parameters", "state", "metrics", "error"],
        recorded: str,
        computed: str,
    ) -> Divergence:
        event, report = folded.event, folded.report
        metrics = []
        if isinstance(event, LearnerStepped) and report is not None:
            metrics = metric_differences(event.metrics, report.metrics)
        return Divergence(
            position=record.position,
            time_ns=record.time_ns,
            kind=record.kind,
            step=int(record.header.get("step", 0)),
            what=what,
            recorded=recorded,
            computed=computed,
            equal_position=self.equal_position,
            since_equal=list(self._since_equal),
            events_left_out=self._events - len(self._since_equal),
            metrics=metrics,
            fingerprint_recorded=dict(fingerprint),
            fingerprint_here=self.fingerprint_here,
        )


def compare_checkpoint(found: OnDisk, state: LearnerState, *, is_exact: bool) -> CheckpointComparison:
    """A checkpoint on disk beside the state that was computed at its position.

    Args:
        found: The checkpoint.
        state: The state.
        is_exact: Whether every bit must be equal; else within the tolerance.
    """
    name, position, step = found.directory.name, found.position, found.step
    try:
        _, recorded = read_state(found.directory)
    except (ContractError, UnavailableError) as error:
        return CheckpointComparison(name=name, position=position, step=step, is_equal=False, error=str(error))
    tensors = tensor_differences(recorded.tensors, state.tensors)
    values = list(value_differences(_plain(recorded), _plain(state)))
    is_equal = not tensors and not values
    is_near = all(map(is_tensor_near, tensors)) and all(map(is_value_near, values))
    return CheckpointComparison(
        name=name,
        position=position,
        step=step,
        is_equal=is_equal or (is_near and not is_exact),
        tensors=len(recorded.tensors),
        tensor_differences=tensors,
        value_differences=values,
    )


def _plain(state: LearnerState) -> dict[str, Any]:
    return {"numbers": state.numbers, "addresses": state.addresses}
