"""Requests as OpenTelemetry tells them: in the SDK's memory, and over the wire."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web
from ports import free_port
from serving import Fails

from ruvon.config import EngineConfig, ServerConfig
from ruvon.errors import ConfigError
from ruvon.server.app import create_app
from ruvon.server.tracing import TRACING

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind, StatusCode

from ruvon.telemetry.tracing import Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "the launch code is 0451"


@pytest.fixture
def traced(serve, monkeypatch):
    """A server that tells its requests to memory; and what it has told so far."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    monkeypatch.setattr(
        "ruvon.server.app.open_tracing", lambda *given: Tracing(exporter, reader, "one")
    )

    async def make(*args, **options):
        server = await serve(*args, **options)

        def spans():
            assert server.app[TRACING]._spans.force_flush()
            return {span.name: span for span in exporter.get_finished_spans()}

        return server, spans, reader

    return make


async def test_a_request_is_a_tree_of_spans_within_its_caller_s(traced):
    server, spans, _ = await traced("Hello, you", max_num_seqs=1)
    body = {
        "messages": [{"role": "user", "content": SECRET}], "max_tokens": 8, "temperature": 0.5,
        "top_p": 0.9, "seed": 7, "stop": ["!"], "n": 1,
    }  # fmt: skip
    reply = await server.post("/v1/chat/completions", body, headers=CONTEXT)
    root, queue, prefill, decode = (
        spans()[name] for name in ("chat org/fake", "queue", "prefill", "decode")
    )
    assert (format(root.context.trace_id, "032x"), root.kind) == (TRACE, SpanKind.SERVER)
    assert format(root.parent.span_id, "016x") == PARENT
    assert all(span.parent.span_id == root.context.span_id for span in (queue, prefill, decode))
    assert root.start_time <= queue.start_time
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert decode.end_time <= root.end_time
    assert dict(root.attributes).items() >= {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "ruvon",
        "gen_ai.request.model": "org/fake", "gen_ai.response.model": "org/fake",
        "gen_ai.request.max_tokens": 8, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9, "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 1, "gen_ai.request.stop_sequences": ("!",),
        "gen_ai.response.id": reply.json["id"], "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": reply.json["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8, "gen_ai.usage.cache_read.input_tokens": 0,
        "http.response.status_code": 200, "url.path": "/v1/chat/completions",
        "ruvon.request_id": reply.headers["X-Request-Id"],
    }.items()  # fmt: skip
    assert prefill.attributes["ruvon.prompt_steps"] == 1
    assert root.resource.attributes["service.name"] == "ruvon"
    told = "".join(span.to_json() for span in spans().values())
    assert SECRET not in told
    assert "Hello" not in told


async def test_without_a_caller_s_context_a_trace_begins_here_and_the_log_names_it(traced, capsys):
    server, spans, _ = await traced("Hello")
    await server.complete("Hi", stream=True)
    root = spans()["text_completion org/fake"]
    assert root.parent is None
    assert f"trace_id={format(root.context.trace_id, '032x')}" in capsys.readouterr().out


async def test_failures_are_told_as_such(traced):
    server, spans, _ = await traced(runner=Fails("Hello"))
    await server.chat(stream=True)  # fails in mid-stream
    failed = spans()["chat org/fake"]
    assert (failed.status.status_code, failed.attributes["error.type"]) == (
        StatusCode.ERROR, "generation_failed",
    )  # fmt: skip
    await server.complete(max_tokens=-1)
    refused = spans()["text_completion org/fake"]
    assert refused.attributes["error.type"] == "invalid_value"
    assert refused.attributes["http.response.status_code"] == 400


async def test_while_no_model_is_there_none_is_named(traced):
    loading = threading.Event()
    server, spans, _ = await traced(start=lambda *given: loading.wait(), wait=False)
    await server.chat()
    loading.set()
    assert "gen_ai.request.model" not in spans()["chat"].attributes


async def test_what_is_asked_all_the_time_is_no_trace(traced):
    server, spans, _ = await traced("Hello")
    for path in ("/metrics", "/v1/models", "/nowhere", "/ready"):
        await server.get(path)
    assert spans() == {}


async def test_the_conventions_metrics(traced):
    server, _, reader = await traced("Hello")
    await server.chat()
    await server.chat(max_tokens=1)
    await server.post("/v1/embeddings", {"input": "Hi"})
    found = {}
    for of_resource in reader.get_metrics_data().resource_metrics:
        for scope in of_resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    operation = point.attributes["gen_ai.operation.name"]
                    found[metric.name, operation] = metric.unit, point.count
    assert found == {
        ("gen_ai.server.request.duration", "chat"): ("s", 2),
        ("gen_ai.server.request.duration", "embeddings"): ("s", 1),
        ("gen_ai.server.time_to_first_token", "chat"): ("s", 2),
        ("gen_ai.server.time_per_output_token", "chat"): ("s", 1),
    }


@pytest.fixture
async def collector():
    """A place that takes OTLP over HTTP: its address, and what has come."""
    received = []

    async def take(http):
        kind = {"traces": ExportTraceServiceRequest, "metrics": ExportMetricsServiceRequest}
        message = kind[http.match_info["kind"]]()
        message.ParseFromString(await http.read())
        received.append(message)
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/{kind}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", received
    await runner.cleanup()


async def test_what_is_left_is_sent_when_the_server_ends(serve, collector):
    url, received = collector
    config = ServerConfig(
        port=0, otlp_traces_endpoint=f"{url}/traces", otlp_metrics_endpoint=f"{url}/metrics"
    )
    server = await serve("Hello", server=config)
    await server.chat()
    await server.stack.aclose()
    (traces,) = (each for each in received if isinstance(each, ExportTraceServiceRequest))
    spans = traces.resource_spans[0].scope_spans[0].spans
    assert {span.name for span in spans} == {"chat org/fake", "queue", "prefill", "decode"}
    (metrics,) = (each for each in received if isinstance(each, ExportMetricsServiceRequest))
    assert len(metrics.resource_metrics[0].scope_metrics[0].metrics) == 3


async def test_a_collector_of_others_understands_all_of_it(serve, tmp_path):
    """Rotel, in Rust, where it is installed (``pip install rotel``)."""
    program = Path(pytest.importorskip("rotel").__file__).with_name("rotel-agent")
    grpc, http = free_port(), free_port()
    command = [
        program, "start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log",
        "metrics", "--debug-log-verbosity", "detailed", "--pid-file", tmp_path / "pid",
        "--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}",
    ]  # fmt: skip
    rotel = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert b"Starting Rotel" in await rotel.stdout.readline()
    url = f"http://127.0.0.1:{http}/v1"
    config = ServerConfig(
        port=0, otlp_traces_endpoint=f"{url}/traces", otlp_metrics_endpoint=f"{url}/metrics"
    )
    server = await serve("Hello", server=config)
    reply = await server.chat("Hi", seed=7)
    await server.post("/v1/chat/completions", {"messages": 7}, headers=CONTEXT)
    await server.stack.aclose()
    rotel.terminate()
    told = (await rotel.communicate())[0].decode()
    for name in ("chat org/fake", "queue", "prefill", "decode"):
        assert re.search(rf"Name +: {name}$", told, re.MULTILINE), told
    assert re.search(rf"Trace ID +: {TRACE}\n +Parent ID +: {PARENT}", told)
    assert f"gen_ai.response.id: Str({reply.json['id']})" in told
    assert "gen_ai.request.seed: Int(7)" in told
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        assert f"Name: gen_ai.server.{name}" in told


@pytest.mark.parametrize("name", ["otlp_traces_endpoint", "otlp_metrics_endpoint"])
def test_without_the_extra_the_setting_is_refused_by_name(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=rf"{name} needs the extra otel: .*ruvon\[otel\]"):
        create_app(EngineConfig(), ServerConfig(**{name: "http://127.0.0.1:4318/v1/traces"}))


@pytest.mark.parametrize("url", ["localhost:4317", "grpc://localhost:4317", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL"):
        ServerConfig(otlp_traces_endpoint=url)
