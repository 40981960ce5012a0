"""Requests as OpenTelemetry spans and GenAI metrics, for who installs ``ruvon[otel]``.

A request is told once it is over, from times that the engine has kept anyway; one of the SDK's
threads sends it. The SDK's own variables count (``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``,
``OTEL_EXPORTER_OTLP_HEADERS`` ...). Names: OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ruvon import __version__
from ruvon.errors import ConfigError
from ruvon.telemetry.finished import Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace.export import SpanExporter

REQUEST_BOUNDS = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is over. ``attributes`` are the span's own, by the conventions' names."""

    operation: str  # chat, text_completion, embeddings
    model: str  # "" while none is loaded
    headers: Mapping[str, str]
    began_at: float  # seconds, monotonic
    seconds: float
    error: str | None = None
    finished: Finished | None = None  # the completion that ended last
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Tracing:
    """Where calls are told. Everything is recorded from the event loop's thread."""

    def __init__(
        self, exporter: SpanExporter | None, reader: MetricReader | None, instance: str = ""
    ) -> None:
        """``instance`` tells processes of one service apart."""
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {"service.name": "ruvon", "service.version": __version__}
        if instance:
            named["service.instance.id"] = instance
        resource = Resource.create(named).merge(OTELResourceDetector().detect())
        self._spans = self._metrics = None
        self._context = TraceContextTextMapPropagator()
        if exporter is not None:
            self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._spans.add_span_processor(BatchSpanProcessor(exporter))
            self._tracer = self._spans.get_tracer("ruvon", __version__)
        if reader is not None:
            self._metrics = MeterProvider([reader], resource, shutdown_on_exit=False)
            self._make_histograms()

    def _make_histograms(self) -> None:
        assert self._metrics is not None
        meter = self._metrics.get_meter("ruvon", __version__)
        self._histograms = {
            name: meter.create_histogram(
                f"gen_ai.server.{name}", "s", help, explicit_bucket_boundaries_advisory=bounds
            )
            for name, help, bounds in (
                ("request.duration", "Time to answer.", REQUEST_BOUNDS),
                ("time_to_first_token", "Time to the first token.", FIRST_TOKEN_BOUNDS),
                ("time_per_output_token", "Time of a token after the first.", TOKEN_BOUNDS),
            )
        }

    def record(self, call: Call) -> str | None:
        """Tell of a call; returns the id of its trace, if there is one."""
        if self._metrics is not None:
            self._measure(call)
        return None if self._spans is None else self._trace(call)

    def _measure(self, call: Call) -> None:
        labels = common(call)
        self._histograms["request.duration"].record(call.seconds, labels)
        last = call.finished
        if last is None or not last.num_output:
            return
        self._histograms["time_to_first_token"].record(last.queue + last.prefill, labels)
        if last.num_output > 1:
            per_token = last.decode / (last.num_output - 1)
            self._histograms["time_per_output_token"].record(per_token, labels)

    def _trace(self, call: Call) -> str:
        from opentelemetry.trace import (
            SpanKind,
            Status,
            StatusCode,
            format_trace_id,
            set_span_in_context,
        )

        epoch = time.time_ns() - time.monotonic_ns()
        root = self._tracer.start_span(
            f"{call.operation} {call.model}".rstrip(),
            context=self._context.extract(call.headers),
            kind=SpanKind.SERVER,
            attributes={**common(call), **call.attributes},
            start_time=epoch + nanoseconds(call.began_at),
        )
        within = set_span_in_context(root)
        for name, begin, end, attributes in phases(call.finished):
            self._tracer.start_span(
                name,
                context=within,
                attributes=attributes,
                start_time=epoch + nanoseconds(begin),
            ).end(epoch + nanoseconds(end))
        if call.error is not None:
            root.set_status(Status(StatusCode.ERROR, call.error))
        root.end(epoch + nanoseconds(call.began_at + call.seconds))
        return str(format_trace_id(root.get_span_context().trace_id))

    def close(self) -> None:
        """Send what is left. Takes as long as whoever receives it."""
        for provider in (self._spans, self._metrics):
            if provider is not None:
                provider.shutdown()


def common(call: Call) -> dict[str, Any]:
    """What spans and metrics both tell."""
    told = {
        "gen_ai.operation.name": call.operation,
        "gen_ai.provider.name": "ruvon",
    }
    if call.model:
        told |= {"gen_ai.request.model": call.model, "gen_ai.response.model": call.model}
    return told if call.error is None else told | {"error.type": call.error}


def phases(last: Finished | None) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """A completion's queue, prefill and decode, as far as it came: name, begin, end, attributes."""
    if last is None:
        return
    started_at = last.arrived_at + last.queue
    waits = {f"ruvon.waited_for.{reason}": seconds for reason, seconds in last.waits.items()}
    yield "queue", last.arrived_at, started_at, {"ruvon.started_before": last.num_before} | waits
    if last.num_chunks:
        chunks = {"ruvon.prompt_steps": last.num_chunks, "ruvon.cached_tokens": last.num_cached}
        yield "prefill", started_at, started_at + last.prefill, chunks
    if last.num_output:
        after = {"ruvon.output_tokens": last.num_output, "ruvon.preemptions": last.num_preempted}
        yield "decode", started_at + last.prefill, last.ended_at, after


def nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)


def open_tracing(traces: str | None, metrics: str | None, instance: str) -> Tracing | None:
    """What sends to these addresses, such as ``http://localhost:4318/v1/traces``; None where there
    are none. Raises ConfigError where the SDK is not installed."""
    if traces is None and metrics is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    except ImportError as error:
        name = "otlp_traces_endpoint" if traces is not None else "otlp_metrics_endpoint"
        raise ConfigError(f"{name} needs the extra otel: pip install 'ruvon[otel]'") from error
    exporter = None if traces is None else OTLPSpanExporter(traces)
    reader = None
    if metrics is not None:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(metrics))
    return Tracing(exporter, reader, instance)
