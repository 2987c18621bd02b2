"""The span `simic.trainer.train_step` of each training step, for OpenTelemetry.

OpenTelemetry is an optional extra (`simic[otel]`). Tracing is asked for by OpenTelemetry's own variable
`OTEL_TRACES_EXPORTER` (`otlp`, `console`, …); without it, with `none` in it, or with `OTEL_SDK_DISABLED=true`, nothing
of it is imported and nobody watches. The other variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER`, `OTEL_BSP_…`) are read by OpenTelemetry itself. `otlp` means OTLP over HTTP, which the extra
brings, unless `OTEL_EXPORTER_OTLP_PROTOCOL` (or `…_TRACES_PROTOCOL`) says `grpc`.

Asked for and not to be had is no reason to end a run: the variables may be the whole machine's. Then nobody watches,
and `note` says why, for the log.

Spans go out in batches from a thread of OpenTelemetry; what its queue cannot hold is dropped there. Only a sampled
share is worth exporting where steps take milliseconds: `OTEL_TRACES_SAMPLER=traceidratio` with
`OTEL_TRACES_SAMPLER_ARG=0.01`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from types import TracebackType
from typing import Any, Final, Protocol, Self

from esper_simic.errors import UnavailableError
from esper_simic.telemetry import ErrorText, NullObserver, Phase, StepObserver

SPAN: Final = "simic.trainer.train_step"
EXCEPTION: Final = "exception"
"""Name of the event that OpenTelemetry's conventions have for an error, with attributes `exception.…`."""

INSTALL: Final = "pip install 'simic[otel]'"


class Span(Protocol):
    """What is used of an OpenTelemetry span."""

    def set_attribute(self, key: str, value: Any) -> None:
        """Attach a value."""
        ...

    def add_event(self, name: str, attributes: Any = None) -> None:
        """Note that something happened now."""
        ...

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Say how it ended, if not well."""
        ...

    def end(self) -> None:
        """It ends now."""
        ...


class Tracer(Protocol):
    """What is used of an OpenTelemetry tracer."""

    def start_span(self, name: str, *, attributes: Any = None) -> Span:
        """Begin a span now."""
        ...


class SpanObserver:
    """Tells a tracer of each training step. A `StepObserver`.

    Attributes of the span: `step`, `batch_size`, `loss`, `grad_norm`, `conservative_mode`; an event for each phase, and
    `exception` with type, message and stack trace where it was given up for an error.

    Args:
        tracer: Where spans begin.
        error_status: What OpenTelemetry calls a failure (`StatusCode.ERROR`).
    """

    def __init__(self, tracer: Tracer, error_status: Any) -> None:
        self._tracer, self._error_status = tracer, error_status
        self._span: Span | None = None

    def begun(self, *, step: int, batch_size: int) -> None:
        """See `StepObserver`; a step that was neither done nor failed is ended as failed."""
        self.failed("the next step began before this one had ended")
        self._span = self._tracer.start_span(SPAN, attributes={"step": step, "batch_size": batch_size})

    def passed(self, phase: Phase) -> None:
        """See `StepObserver`."""
        if self._span is not None:
            self._span.add_event(phase.value)

    def done(self, *, loss: float, grad_norm: float, conservative_mode: bool) -> None:
        """See `StepObserver`."""
        span, self._span = self._span, None
        if span is not None:
            span.set_attribute("loss", loss)
            span.set_attribute("grad_norm", grad_norm)
            span.set_attribute("conservative_mode", conservative_mode)
            span.end()

    def failed(self, reason: str, error: ErrorText | None = None) -> None:
        """See `StepObserver`."""
        span, self._span = self._span, None
        if span is not None:
            if error is not None:
                told = {"type": error.kind, "message": error.message, "stacktrace": error.trace}
                span.add_event(EXCEPTION, {f"{EXCEPTION}.{key}": text for key, text in told.items()})
            span.set_status(self._error_status, reason)
            span.end()


class Tracing:
    """The lifetime of tracing in one process.

    Attributes:
        observer: Who watches steps; nobody, unless tracing was asked for and is there.
        note: Why nobody watches although it was asked for; empty otherwise.

    Args:
        observer: See there.
        note: See there.
        close: Called once, at the end: export what is left.
    """

    def __init__(
        self, observer: StepObserver | None = None, note: str = "", close: Callable[[], None] | None = None
    ) -> None:
        self.observer: StepObserver = observer or NullObserver()
        self.note = note
        self._close = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The span of a step that ended the process would never end, so never be exported.
            self.observer.failed(str(error), ErrorText.of(error))
        self.close()

    def close(self) -> None:
        """Export what is left, within OpenTelemetry's own limit (30 s when nobody takes it); twice is harmless.

        Call it when everything else is done and told, so that a collector that hangs delays nothing.
        """
        close, self._close = self._close, None
        if close is not None:
            close()


def tracing(environment: Mapping[str, str], instance: str) -> Tracing:
    """Trace as the environment asks.

    Args:
        environment: Usually `os.environ`.
        instance: Which process this is, such as `learner-0`; `service.instance.id` of its spans.
    """
    exporters = exporter_names(environment)
    if not exporters:
        return Tracing()
    try:
        api, sdk = import_module("opentelemetry.trace"), import_module("opentelemetry.sdk.trace")
        resources = import_module("opentelemetry.sdk.resources")
        export = import_module("opentelemetry.sdk.trace.export")
        made = [_exporter(name) for name in exporters]
    except (ImportError, UnavailableError) as error:
        return Tracing(note=f"OTEL_TRACES_EXPORTER asks for traces, but there are none: {error}; {INSTALL}")
    named = {} if _is_named(environment) else {"service.name": "simic"}
    resource = resources.Resource.create(named | {"service.instance.id": instance})
    # Not the global provider: other libraries of this process are none of ours.
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in made:
        provider.add_span_processor(export.BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("simic")
    return Tracing(SpanObserver(tracer, api.StatusCode.ERROR), close=provider.shutdown)


def exporter_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the exporters that the environment asks for, as their packages register them."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    asked = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",")]
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", ""
    )
    otlp = "otlp_proto_grpc" if protocol.strip() == "grpc" else "otlp_proto_http"
    return tuple(otlp if name == "otlp" else name for name in asked if name not in ("", "none"))


def _is_named(environment: Mapping[str, str]) -> bool:
    attributes = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return bool(environment.get("OTEL_SERVICE_NAME")) or "service.name=" in attributes


def _exporter(name: str) -> Any:
    found = tuple(metadata.entry_points(group="opentelemetry_traces_exporter", name=name))
    if not found:
        raise UnavailableError(f"no exporter {name!r} is installed")
    return found[0].load()()
