"""A replay's report in words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from supervisor.playback.compare import METRIC_FLOOR, METRIC_TOLERANCE, TENSOR_TOLERANCE
from supervisor.playback.report import CheckpointComparison, Divergence, ReplayReport

EVENTS_SHOWN_MAX: Final = 40
TENSORS_SHOWN_MAX: Final = 20
NEAR_SHOWN_MAX: Final = 3
"""Of tensors that are within the tolerance."""

VALUES_SHOWN_MAX: Final = 20

DRIFT: Final = (
    "rounding alone comes to that: differences in the last bit grow with every update (one thread against two, digits "
    "preset: after 128). Begin with a later checkpoint, or replay where it was recorded"
)


def words(report: ReplayReport) -> list[str]:
    """Lines for people; the verdict is the last but for the divergence."""
    lines = [*_surroundings(report), *report.notes]
    if report.stopped is not None:
        lines += list(_stopped(report))
    lines += [line for comparison in report.checkpoints for line in _checkpoint(comparison)]
    lines.append(_verdict(report))
    if report.divergence is not None:
        lines += list(_divergence(report.divergence))
    return lines


def _surroundings(report: ReplayReport) -> Iterator[str]:
    if report.audited is not None:
        audited = report.audited
        torn = f", a torn tail of {audited.torn_tail_bytes} bytes" if audited.torn_tail_bytes else ""
        yield (
            f"every byte read: {audited.records:,} records, {audited.bytes:,} bytes in {audited.segments} segments, "
            f"sound{torn}"
        )
    if report.fingerprint_differences:
        yield "recorded under another fingerprint than this one:"
        for key, (recorded, here) in report.fingerprint_differences.items():
            yield f"  {key}: recorded {recorded or 'nothing'}, here {here or 'nothing'}"
        yield (
            f"where digests differ, metrics are compared within {METRIC_TOLERANCE:g} of themselves or "
            f"{METRIC_FLOOR:g}, tensors at checkpoints within {TENSOR_TOLERANCE:g} of the largest element of their "
            f"kind; the replay goes on from each"
        )
    if report.inexact_way:
        yield f"recorded in a way that promises no equal bits ({report.inexact_way}): digests decide nothing here"
    for crossing in report.crossings:
        yield f"record {crossing.position}, after step {crossing.step}: {crossing.reason}"
        yield (
            f"  went on from checkpoint {crossing.checkpoint} (record {crossing.resumed_at}, step "
            f"{crossing.resumed_step}); what stands between was not replayed"
            if crossing.checkpoint
            else "  no good checkpoint after it is on disk: the replay ends here"
        )


def _stopped(report: ReplayReport) -> Iterator[str]:
    stopped = report.stopped
    if stopped is None:
        return
    place = f"record {stopped.position}" if stopped.position is not None else "not in the journal"
    yield f"stopped {'before' if stopped.is_before else 'after'} step {stopped.step} ({place})"
    if stopped.digest:
        yield f"  digest {stopped.digest}"
    if stopped.failure:
        yield f"  it failed: {stopped.failure}"
    for name, value in sorted(stopped.metrics.items()):
        yield f"  {name} {value:.8g}"


def _verdict(report: ReplayReport) -> str:
    failed = f" ({report.steps_failed:,} failed, as recorded)" if report.steps_failed else ""
    steps = f"{report.steps:,} step{'' if report.steps == 1 else 's'} replayed{failed}"
    origin = "" if report.origin == "start" else f" from {report.origin}"
    speed = f"{report.seconds:.1f} s"
    if report.times_as_fast is not None:
        speed += f", {report.times_as_fast:.1f} times as fast as the run"
    match report.outcome:
        case "equal":
            return f"{steps}{origin}, all equal ({speed})"
        case "within_tolerance":
            return (
                f"{steps}{origin}: {report.steps_by_digest:,} equal, {report.steps_by_tolerance:,} within the "
                f"tolerance{_largest(report)} ({speed})"
            )
        case "drifted":
            return (
                f"{steps}{origin}: {report.steps_by_digest:,} equal, {report.steps_by_tolerance:,} within the "
                f"tolerance, {report.steps_beyond:,} beyond it{_largest(report)}: DRIFTED, as this way may ({speed})"
            )
        case "incomplete":
            return f"{steps}{origin}, all equal, but not all there are ({speed})"
        case "damaged":
            found = "; ".join(f"{one.segment}:{one.offset}: {one.reason}" for one in report.damage)
            return f"{steps}{origin}, then the journal is DAMAGED: {found}"
        case "divergent":
            good = report.steps_by_digest + report.steps_by_tolerance
            near = " or near" if report.steps_by_tolerance else ""
            return f"{steps}{origin}, {good:,} of them equal{near}: DIVERGENT ({speed})"


def _largest(report: ReplayReport) -> str:
    if report.largest is None:
        return ""
    step, metric = report.largest.step, report.largest.metric
    return f"; largest relative difference of a metric {metric.relative:.1e} ({metric.name} of step {step})"


def _divergence(found: Divergence) -> Iterator[str]:
    place = f"{found.step} (record {found.position}, {found.kind})"
    if found.what == "metrics":
        yield f"FIRST STEP OUTSIDE THE TOLERANCE: {place}: {found.recorded}"
        yield "  " + DRIFT
    else:
        yield f"FIRST DIVERGENT STEP: {place}"
        yield f"  {found.what:<10} recorded {found.recorded}"
        yield f"  {'':<10} computed {found.computed}"
    yield from _fingerprints(found)
    if found.metrics:
        yield "  metrics that differ:"
        for metric in found.metrics:
            yield (
                f"    {metric.name:<24} recorded {_number(metric.recorded)}  computed {_number(metric.computed)}  "
                f"relative {metric.relative:.1e}"
            )
    since = (
        "the beginning" if found.equal_position is None else f"the last equal record, {found.equal_position}"
    )
    yield f"  events since {since}:"
    left_out = found.events_left_out + max(0, len(found.since_equal) - EVENTS_SHOWN_MAX)
    if left_out:
        yield f"    ... {left_out} earlier ones"
    for event in found.since_equal[-EVENTS_SHOWN_MAX:]:
        yield f"    {event.position:>8}  {_time(event.time_ns)}  {event.kind:<19} {event.summary}"
    if found.checkpoint is not None:
        yield from (f"  {line}" for line in _checkpoint(found.checkpoint))
    else:
        yield f"  no tensors to compare: {found.note}"


def _fingerprints(found: Divergence) -> Iterator[str]:
    recorded, here = found.fingerprint_recorded, found.fingerprint_here
    yield f"  fingerprint recorded {_flat(recorded)}"
    yield f"  {'':<11} here     {'the same' if recorded == here else _flat(here)}"


def _checkpoint(found: CheckpointComparison) -> Iterator[str]:
    place = f"checkpoint {found.name} (record {found.position}, step {found.step})"
    if found.error:
        yield f"{place} cannot be compared: {found.error}"
        return
    tensors, values = found.tensor_differences, found.value_differences
    if not tensors and not values:
        yield f"{place}: all {found.tensors} tensors equal to the bit"
        return
    near = ", within the tolerance" if found.is_equal else ""
    yield f"{place}: {len(tensors)} of {found.tensors} tensors and {len(values)} numbers differ{near}"
    shown = NEAR_SHOWN_MAX if found.is_equal else TENSORS_SHOWN_MAX
    for tensor in sorted(tensors, key=lambda one: -one.of_kind)[:shown]:
        yield (
            f"  {tensor.name} {tensor.shape}: {tensor.reason}"
            if tensor.reason
            else f"  {tensor.name} {tensor.shape}: {tensor.elements_differing} of {tensor.elements} elements, "
            f"max abs {tensor.max_abs:.2e}, max relative {tensor.max_relative:.2e}"
        )
    if len(tensors) > shown:
        yield f"  ... {len(tensors) - shown} more tensors"
    for value in values[:VALUES_SHOWN_MAX]:
        yield f"  {value.path}: recorded {value.recorded}, computed {value.computed}"
    if len(values) > VALUES_SHOWN_MAX:
        yield f"  ... {len(values) - VALUES_SHOWN_MAX} more numbers"


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.8g}"


def _flat(fingerprint: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in fingerprint.items() if value)


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
