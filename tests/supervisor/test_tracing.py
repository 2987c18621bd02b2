"""Spans through a tracer kept in memory, whose methods are OpenTelemetry's; and through the real one where it is."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest

from esper_simic.telemetry import ErrorText, NullObserver, Phase
from supervisor import tracing as module
from supervisor.tracing import EXCEPTION, SPAN, SpanObserver, Tracing, exporter_names, tracing

ERROR = "StatusCode.ERROR"


@dataclass
class MemorySpan:
    name: str
    attributes: dict[str, Any]
    events: list[str] = field(default_factory=list)
    exceptions: list[dict[str, str]] = field(default_factory=list)
    status: tuple[Any, str | None] | None = None
    ends: int = 0

    def set_attribute(self, key: str, value: Any) -> None:
        assert not self.ends
        self.attributes[key] = value

    def add_event(self, name: str, attributes: Any = None) -> None:
        assert not self.ends
        self.events.append(name)
        if name == EXCEPTION:
            self.exceptions.append(attributes)

    def set_status(self, status: Any, description: str | None = None) -> None:
        assert not self.ends
        self.status = (status, description)

    def end(self) -> None:
        self.ends += 1


@dataclass
class MemoryTracer:
    spans: list[MemorySpan] = field(default_factory=list)

    def start_span(self, name: str, *, attributes: Any = None) -> MemorySpan:
        self.spans.append(MemorySpan(name, dict(attributes or {})))
        return self.spans[-1]


def test_a_step_is_a_span_with_its_attributes_and_events() -> None:
    tracer = MemoryTracer()
    observer = SpanObserver(tracer, ERROR)
    observer.begun(step=12, batch_size=32)
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER):
        observer.passed(phase)
    assert tracer.spans[0].ends == 0
    observer.done(loss=1.25, grad_norm=0.5, conservative_mode=True)
    (span,) = tracer.spans
    assert span.name == SPAN == "simic.trainer.train_step"
    assert span.attributes == {
        "step": 12,
        "batch_size": 32,
        "loss": 1.25,
        "grad_norm": 0.5,
        "conservative_mode": True,
    }
    assert span.events == ["forward_pass", "backward_pass", "optimizer_step"]
    assert (span.status, span.ends) == (None, 1)


def test_a_step_that_was_given_up_says_why() -> None:
    tracer = MemoryTracer()
    observer = SpanObserver(tracer, ERROR)
    observer.begun(step=1, batch_size=8)
    observer.failed("the loss is not finite")
    observer.done(loss=0.0, grad_norm=0.0, conservative_mode=False)
    (span,) = tracer.spans
    assert (span.status, span.ends) == ((ERROR, "the loss is not finite"), 1)
    assert "loss" not in span.attributes


BROKEN = ErrorText("torch.OutOfMemoryError", "no room", "Traceback …\ntorch.OutOfMemoryError: no room\n")


def test_the_error_of_a_step_that_was_given_up_is_an_event_as_the_conventions_have_it() -> None:
    tracer = MemoryTracer()
    observer = SpanObserver(tracer, ERROR)
    observer.begun(step=1, batch_size=8)
    observer.passed(Phase.FORWARD)
    observer.failed("out of memory: no room", BROKEN)
    (span,) = tracer.spans
    assert span.events == ["forward_pass", "exception"]
    assert span.exceptions == [
        {
            "exception.type": "torch.OutOfMemoryError",
            "exception.message": "no room",
            "exception.stacktrace": BROKEN.trace,
        }
    ]
    assert (span.status, span.ends) == ((ERROR, "out of memory: no room"), 1)


def test_the_span_of_a_step_that_ends_the_process_is_ended_with_its_error_before_the_last_export() -> None:
    tracer, ends = MemoryTracer(), list[int]()
    traced = Tracing(SpanObserver(tracer, ERROR), close=lambda: ends.append(tracer.spans[0].ends))
    with pytest.raises(ValueError, match="broken"), traced:
        traced.observer.begun(step=1, batch_size=8)
        raise ValueError("broken")
    (span,) = tracer.spans
    assert ends == [1]
    assert span.status == (ERROR, "broken")
    assert span.exceptions[0]["exception.type"] == "ValueError"
    assert "raise ValueError" in span.exceptions[0]["exception.stacktrace"]


def test_a_step_that_never_ended_ends_as_failed_when_the_next_begins() -> None:
    tracer = MemoryTracer()
    observer = SpanObserver(tracer, ERROR)
    observer.begun(step=1, batch_size=8)
    observer.begun(step=2, batch_size=8)
    observer.done(loss=0.0, grad_norm=0.0, conservative_mode=False)
    first, second = tracer.spans
    assert first.status is not None
    assert first.status[0] == ERROR
    assert (first.ends, second.ends, second.status) == (1, 1, None)


def test_outside_of_a_step_nothing_is_told() -> None:
    tracer = MemoryTracer()
    observer = SpanObserver(tracer, ERROR)
    observer.passed(Phase.FORWARD)
    observer.failed("")
    assert tracer.spans == []


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ()),
        ({"OTEL_TRACES_EXPORTER": "none"}, ()),
        ({"OTEL_TRACES_EXPORTER": " "}, ()),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "True"}, ()),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp_proto_http",)),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp, console",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            ("otlp_proto_http", "console"),
        ),
    ],
)
def test_the_environment_says_where_spans_go(environment: dict[str, str], names: tuple[str, ...]) -> None:
    assert exporter_names(environment) == names


def test_not_asked_for_nothing_is_imported_and_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "import_module", None)
    with tracing({}, "learner-0") as traced:
        assert isinstance(traced.observer, NullObserver)
        assert traced.note == ""


ASKED = {"OTEL_TRACES_EXPORTER": "console"}


def test_asked_for_and_not_installed_the_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with tracing(ASKED, "learner-0") as traced:
        assert isinstance(traced.observer, NullObserver)
        assert "OTEL_TRACES_EXPORTER" in traced.note
        assert "pip install 'simic[otel]'" in traced.note


@dataclass
class Provider:
    resource: dict[str, str]
    shutdown_on_exit: bool
    exporters: list[Any] = field(default_factory=list)
    tracer: MemoryTracer = field(default_factory=MemoryTracer)
    shutdowns: int = 0

    def add_span_processor(self, processor: tuple[str, Any]) -> None:
        self.exporters.append(processor)

    def get_tracer(self, name: str) -> MemoryTracer:
        assert name == "simic"
        return self.tracer

    def shutdown(self) -> None:
        self.shutdowns += 1


@dataclass
class EntryPoint:
    exporter: object

    def load(self) -> Any:
        return lambda: self.exporter


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[Provider]:
    """OpenTelemetry's modules, with as much in them as is used; and the providers that were made."""
    made: list[Provider] = []

    def provider(**arguments: Any) -> Provider:
        made.append(Provider(**arguments))
        return made[-1]

    parts: dict[str, dict[str, Any]] = {
        "opentelemetry.trace": {"StatusCode": types.SimpleNamespace(ERROR=ERROR)},
        "opentelemetry.sdk.trace": {"TracerProvider": provider},
        "opentelemetry.sdk.resources": {"Resource": types.SimpleNamespace(create=dict)},
        "opentelemetry.sdk.trace.export": {"BatchSpanProcessor": lambda exporter: ("batch", exporter)},
    }
    modules = {name: types.SimpleNamespace(**content) for name, content in parts.items()}
    monkeypatch.setattr(module, "import_module", modules.__getitem__)
    found = {"console": (EntryPoint("the console"),)}

    def entry_points(*, group: str, name: str) -> tuple[EntryPoint, ...]:
        assert group == "opentelemetry_traces_exporter"
        return found.get(name, ())

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    return made


def test_asked_for_and_installed_every_step_goes_to_the_exporter(providers: list[Provider]) -> None:
    with tracing(ASKED, "learner-0") as traced:
        (provider,) = providers
        assert provider.exporters == [("batch", "the console")]
        assert provider.resource == {"service.name": "simic", "service.instance.id": "learner-0"}
        assert not provider.shutdown_on_exit
        traced.observer.begun(step=1, batch_size=32)
        traced.observer.failed("why")
        assert provider.tracer.spans[0].status == (ERROR, "why")
        assert provider.shutdowns == 0
    assert provider.shutdowns == 1
    traced.close()
    assert provider.shutdowns == 1


@pytest.mark.parametrize(
    "naming",
    [{"OTEL_SERVICE_NAME": "mine"}, {"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=mine"}],
)
def test_a_name_that_the_environment_gives_stands(providers: list[Provider], naming: dict[str, str]) -> None:
    tracing(ASKED | naming, "learner-0").close()
    assert "service.name" not in providers[0].resource


def test_an_exporter_that_is_not_installed_is_named(providers: list[Provider]) -> None:
    traced = tracing({"OTEL_TRACES_EXPORTER": "console,zipkin"}, "learner-0")
    assert "'zipkin'" in traced.note
    assert isinstance(traced.observer, NullObserver)
    assert providers == []


def test_the_real_library_takes_the_spans() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason="the optional extra is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # type: ignore[import-not-found, unused-ignore]
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # type: ignore[import-not-found, unused-ignore]
        InMemorySpanExporter,
    )
    from opentelemetry.trace import StatusCode  # type: ignore[import-not-found, unused-ignore]

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observer = SpanObserver(provider.get_tracer("simic"), StatusCode.ERROR)
    observer.begun(step=3, batch_size=32)
    for phase in Phase:
        observer.passed(phase)
    observer.done(loss=1.5, grad_norm=0.25, conservative_mode=False)
    observer.begun(step=4, batch_size=32)
    observer.failed("not finite", BROKEN)
    done, failed = exporter.get_finished_spans()
    provider.shutdown()
    assert (done.name, dict(done.attributes)) == (
        SPAN,
        {"step": 3, "batch_size": 32, "loss": 1.5, "grad_norm": 0.25, "conservative_mode": False},
    )
    assert [event.name for event in done.events] == [phase.value for phase in Phase]
    assert done.status.is_ok
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "not finite")
    assert [(event.name, event.attributes["exception.stacktrace"]) for event in failed.events] == [
        ("exception", BROKEN.trace)
    ]


@pytest.mark.skipif(
    not metadata.entry_points(group="opentelemetry_traces_exporter"), reason="no exporter here"
)
def test_the_real_library_is_opened_and_closed_as_the_environment_asks() -> None:
    code = """
import os
from supervisor.tracing import tracing
with tracing(os.environ, "learner-0") as traced:
    assert traced.note == "", traced.note
    traced.observer.begun(step=5, batch_size=32)
    traced.observer.done(loss=1.0, grad_norm=1.0, conservative_mode=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ASKED, capture_output=True, text=True, check=True
    )
    assert SPAN in done.stdout
    assert "learner-0" in done.stdout
