"""Where an update failed: a line in the learner's log and an event of its span, and nothing in its journal."""

from __future__ import annotations

import gc
import io
import json
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_simic.events import StepFailed
from esper_simic.step_report import Attempt, attempt
from esper_simic.telemetry import ErrorText
from esper_simic.updates import engine as engine_module
from esper_simic.updates.batch import Batch
from esper_simic.updates.update import Terms, Updated
from supervisor.roles import learner as role
from supervisor.roles import step_log
from supervisor.roles.step_log import EVENT, StepLog
from supervisor.tracing import SpanObserver, Tracing
from tests.roles.test_learner_main import living
from tests.supervisor.test_tracing import ERROR, MemoryTracer


def where_it_breaks(error: Exception) -> Updated:
    raise error.with_traceback(None)


def tried(error: Exception) -> Attempt:
    return attempt(lambda: where_it_breaks(error), lambda: 0)


def text_of(error: Exception) -> ErrorText:
    found = tried(error).error
    assert found is not None
    return found


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


NOT_FINITE = FloatingPointError("loss inf")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NO_CPU_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

# -- what an attempt tells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (NOT_FINITE, "FloatingPointError", "not finite: loss inf"),
        (NO_MEMORY, "torch.OutOfMemoryError", f"out of memory: {NO_MEMORY}"),
        (NO_CPU_MEMORY, "RuntimeError", f"out of memory: {NO_CPU_MEMORY}"),
    ],
)
def test_a_failure_tells_where_it_happened(error: Exception, kind: str, reason: str) -> None:
    made = tried(error)
    assert made.failure == reason
    assert made.error is not None
    assert made.error[:2] == (kind, str(error))
    assert made.error.trace.startswith("Traceback (most recent call last):\n")
    assert "in where_it_breaks\n    raise error.with_traceback(None)\n" in made.error.trace
    assert made.error.trace.rstrip().endswith(f"{kind}: {error}")


def test_what_it_came_of_is_told_too() -> None:
    error = FloatingPointError("loss nan")
    error.__cause__ = ZeroDivisionError("0 / 0")
    assert text_of(error).trace.startswith(
        "ZeroDivisionError: 0 / 0\n\nThe above exception was the direct cause"
    )


def test_an_update_that_was_made_tells_no_error() -> None:
    assert attempt(lambda: Updated(0.0, 0.0, 0.0, 0.0, None, {}), lambda: 0).error is None


def test_tensors_of_the_frames_it_went_through_are_given_back() -> None:
    """After one for want of memory they are what has to go."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def update() -> Updated:
        large = torch.zeros(8)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError(f"no room beside {large.numel()}")

    gc.disable()
    try:
        made = attempt(update, lambda: 0)
        assert kept[0]() is None
    finally:
        gc.enable()
    assert made.error is not None


# -- the log -----------------------------------------------------------------------------------------------------------


def test_a_line_says_which_update_why_and_where() -> None:
    out = io.StringIO()
    log = StepLog(out)
    began = datetime.now(UTC)
    log.begun(step=7, batch_size=32)
    log.failed("not finite: loss inf", text_of(NOT_FINITE))
    (line,) = lines(out)
    assert began <= datetime.fromisoformat(line.pop("timestamp")) <= datetime.now(UTC)
    assert list(line)[-1] == "traceback"
    assert line.pop("traceback") == text_of(NOT_FINITE).trace
    assert line == {
        "level": "error",
        "event": EVENT,
        "step": 7,
        "batch_size": 32,
        "reason": "not finite: loss inf",
        "exception_type": "FloatingPointError",
    }


def test_updates_that_were_made_are_not_logged_and_a_failure_without_error_has_no_traceback() -> None:
    out = io.StringIO()
    log = StepLog(out)
    log.begun(step=1, batch_size=8)
    log.done(loss=1.0, grad_norm=1.0, conservative_mode=False)
    assert out.getvalue() == ""
    log.begun(step=2, batch_size=8)
    log.failed("why")
    assert lines(out)[0].keys() == {"timestamp", "level", "event", "step", "batch_size", "reason"}


def test_after_so_many_tracebacks_lines_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "TRACES_MAX", 2)
    out = io.StringIO()
    log = StepLog(out)
    for step in range(1, 5):
        log.begun(step=step, batch_size=8)
        log.failed("why", text_of(NOT_FINITE))
    assert ["traceback" in line for line in lines(out)] == [True, True, False, False]
    assert [line.get("trace_left_out", False) for line in lines(out)] == [False, False, True, True]
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


class Full(io.StringIO):
    """A file on a disk that is full at first."""

    refusals = 2

    def write(self, text: str) -> int:
        if self.refusals:
            self.refusals -= 1
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_line_that_cannot_be_written_ends_nothing_and_is_counted() -> None:
    out = Full()
    log = StepLog(out)
    for step in range(1, 5):
        log.begun(step=step, batch_size=8)
        log.failed("why")
    assert [(line["step"], line.get("lost")) for line in lines(out)] == [(3, 2), (4, None)]


# -- in a learner ------------------------------------------------------------------------------------------------------


def test_a_learner_whose_update_fails_tells_its_log_and_its_span_and_the_journal_the_reason_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracer = MemoryTracer()
    monkeypatch.setattr(role, "tracing", lambda *_: Tracing(SpanObserver(tracer, ERROR)))

    def fails(batch: Batch, terms: Terms) -> Updated:
        return where_it_breaks(NOT_FINITE)

    monkeypatch.setattr(engine_module, "impala_update", fails)
    with living(tmp_path / "run") as life:
        life.begin()
        life.until_ready()
        life.actor.hello()
        life.teach(4)
        life.until(lambda: life.records(StepFailed))
        life.stop()
        (failed,) = [record.header_as(StepFailed) for record in life.records(StepFailed)]
        raw = b"".join(path.read_bytes() for path in (life.run_dir / "journal").rglob("*.log"))
    assert failed.reason == "not finite: loss inf"
    assert b"Traceback" not in raw
    assert b"where_it_breaks" not in raw
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert (line["step"], line["reason"], line["level"]) == (failed.step, failed.reason, "error")
    assert "in where_it_breaks\n" in line["traceback"]
    (span,) = tracer.spans
    assert (span.status, span.ends) == ((ERROR, failed.reason), 1)
    assert span.exceptions[0]["exception.stacktrace"] == line["traceback"]
