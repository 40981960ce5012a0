"""Metric names are API, and so is the shape of a log line."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
from serving import open_server

import ruvon
from ruvon.telemetry.collectors import (
    FIRST_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    one_two_five,
)
from ruvon.telemetry.finished import Finished
from ruvon.telemetry.logs import PATIENCE, Sink, configure_logging
from ruvon.telemetry.metrics import HttpMetrics, Metrics
from ruvon.telemetry.totals import Totals, stats_line

REFERENCE = Path(ruvon.__file__).parent.parent / "docs" / "reference" / "metrics.md"
BY_RUNNERS = ("graph_misses", "kernel_compilations", "rank_step_failures")


@pytest.fixture
def metrics():
    made = Metrics("m", max_model_len=1000)
    made.describe_cache(block_size=16, num_gpu_blocks=8)
    made.describe_ranks(2)
    return made


def lines(metrics):
    return dict(
        line.rsplit(" ", 1)
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    )


def finish(metrics, **changes):
    ended = Finished(
        reason="stop", num_prompt=10, num_output=5, num_cached=4, max_tokens=16, n=1,
        arrived_at=9.0, queue=0.1, prefill=0.2, decode=0.4, waits={"places": 0.1},
    )  # fmt: skip
    metrics.record_finished(replace(ended, **changes))


def types(text):
    """The metrics of a page: name → kind."""
    lines = [line.split() for line in text.splitlines() if line.startswith("# TYPE")]
    return {name: kind for _, _, name, kind in lines if not name.endswith("_created")}


async def test_the_reference_lists_what_is_served():
    server = await open_server()
    for name in BY_RUNNERS:
        server.service.metrics.watch(name, "Counted elsewhere.", lambda: 0)
    served = types((await server.get("/metrics")).body.decode())
    of_server = types(server.state.http.render().decode())
    await server.stack.aclose()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", REFERENCE.read_text(), re.MULTILINE)
    theirs = {name.removeprefix("vllm:"): kind for name, kind in served.items() if ":" in name}
    assert dict(rows) == theirs | of_server
    assert len(rows) == len(dict(rows))


def test_every_name_is_served_twice(metrics):
    finish(metrics)
    served = types(metrics.render().decode())
    assert served.pop("ruvon_iteration_tokens") == "histogram"  # a name in _total is a counter's
    own = {name.removeprefix("ruvon_") for name in served if ":" not in name}
    theirs = {name.removeprefix("vllm:") for name in served if ":" in name}
    assert theirs - own == {"iteration_tokens_total"}
    assert all(served[f"vllm:{name}"] == served[f"ruvon_{name}"] for name in own)


def test_finished_requests(metrics):
    for _ in range(2):
        metrics.record_prompt(num_prompt=10, num_cached=4)
    finish(metrics)
    finish(metrics, reason="length", num_output=1)
    found, base = lines(metrics), '{engine="0",model_name="m"}'
    assert found[f"vllm:prompt_tokens_total{base}"] == "20.0"
    assert found[f"vllm:prompt_tokens_cached_total{base}"] == "8.0"
    source = '{engine="0",model_name="m",source="local_compute"}'
    assert found[f"vllm:prompt_tokens_by_source_total{source}"] == "12.0"
    reason = '{engine="0",finished_reason="length",model_name="m"}'
    assert found[f"vllm:request_success_total{reason}"] == "1.0"
    assert found[f"vllm:request_inference_time_seconds_sum{base}"].startswith("1.2")
    per_token = "vllm:request_time_per_output_token_seconds"
    assert found[f"{per_token}_count{base}"] == "1.0"  # one token has no time per token
    assert found[f"{per_token}_sum{base}"] == "0.1"


def test_steps_and_tokens(metrics):
    metrics.record_step(
        num_tokens=12, num_running=3, num_waiting=2, kv_usage=0.25, num_cached=4, num_queried=10,
        num_preempted=1,
    )  # fmt: skip
    metrics.record_first_token(0.004)
    metrics.record_inter_token(0.002)
    metrics.record_rejection("max_num_queued_reqs")
    found, base = lines(metrics), '{engine="0",model_name="m"}'
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 10, "prefix_cache_hits_total": 4, "num_preemptions_total": 1,
        "generation_tokens_total": 2, "iteration_tokens_total_sum": 12,
    }  # fmt: skip
    assert {name: float(found[f"vllm:{name}{base}"]) for name in expected} == expected
    waiting = 'vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"}'
    assert found[waiting] == "2.0"
    rejected = 'vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"}'
    assert found[rejected] == "1.0"
    config = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="8"}'
    assert found[config] == "1.0"


def test_many_equal_intervals_count_as_so_many_observations(metrics):
    metrics.record_inter_token(0.0025, 3)  # a bucket holds its own bound
    metrics.record_inter_token(0.0026)
    metrics.record_inter_token(1000.0, 2)
    name, base = "vllm:inter_token_latency_seconds", 'engine="0",model_name="m"}'
    found = {key: float(value) for key, value in lines(metrics).items()}
    buckets = [
        found[f'{name}_bucket{{engine="0",le="{bound}",model_name="m"}}']
        for bound in ("0.001", "0.0025", "0.005", "80.0", "+Inf")
    ]
    assert buckets == [0, 3, 4, 4, 6]
    assert found[f"{name}_count{{{base}"] == 6
    assert found[f"{name}_sum{{{base}"] == pytest.approx(2000.0101)
    assert metrics.totals.output_tokens == 6


@pytest.mark.parametrize("buckets", [TOKEN_LATENCY_BUCKETS, FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS])
def test_buckets_resolve_milliseconds(buckets):
    assert list(buckets) == sorted(set(buckets))
    assert sum(bucket <= 0.01 for bucket in buckets) >= 4


def test_length_buckets_end_with_the_context():
    assert one_two_five(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert one_two_five(0) == one_two_five(1) == (1,)


def test_http_metrics():
    http = HttpMetrics()
    http.record("/health", "GET", "200", 0.001)
    labels = 'handler="/health",method="GET",status="200"'
    assert f"http_requests_total{{{labels}}} 1.0" in http.render().decode()


def test_the_stats_line_is_about_the_time_since_the_last():
    before = Totals(prompt_tokens=100, output_tokens=10, queried=100, cached=0)
    now = Totals(
        prompt_tokens=300, output_tokens=60, queried=200, cached=50, running=2, kv_usage=0.5
    )
    assert stats_line(before, now, 10) == {
        "prompt_tok_s": 20.0,
        "output_tok_s": 5.0,
        "running": 2,
        "waiting": 0,
        "kv_cache_pct": 50.0,
        "prefix_hit_pct": 50.0,
    }
    assert stats_line(before, before, 10)["prefix_hit_pct"] == 0


@pytest.fixture
def stderr(capsys):
    """Lines on stderr so far; what logging was is put back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield lambda: capsys.readouterr().err.splitlines()
    logging.root.handlers, logging.root.level = handlers, level


def test_json_lines_elsewhere_than_on_a_terminal(stderr):
    configure_logging("info", "auto")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("hello", number=1)
        logging.getLogger("library").warning("beware of %s", "dogs")
    structlog.get_logger().debug("unseen")
    logging.getLogger("library").info("unseen")
    try:
        raise ValueError("oops")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    ours, theirs, failed = map(json.loads, stderr())
    assert ours.items() >= {
        "event": "hello", "number": 1, "request_id": "r1", "level": "info",
    }.items()  # fmt: skip
    assert theirs.items() >= {
        "event": "beware of dogs", "logger": "library", "level": "warning", "request_id": "r1",
    }.items()  # fmt: skip
    assert "ValueError: oops" in failed["exception"]


def test_console_lines(stderr):
    configure_logging("warning", "console")
    structlog.get_logger().info("unseen")
    structlog.get_logger().warning("hello", number=1)
    logging.getLogger("library").error("beware")
    ours, theirs = stderr()
    assert ours.endswith("number=1")
    assert "beware" in theirs


def test_a_request_s_line_is_short_for_people(stderr):
    configure_logging("info", "console")
    structlog.get_logger().info("request", status=200, client="10.0.0.7", user_agent="curl/8")
    structlog.get_logger().info("hello", client="10.0.0.7")
    short, hello = stderr()
    assert short.endswith("status=200")
    assert hello.endswith("client=10.0.0.7")


@pytest.mark.parametrize("given", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": ""}])
def test_a_terminal_that_wants_no_colours_gets_none(given, stderr, monkeypatch):
    monkeypatch.setattr(Sink, "isatty", lambda sink: True)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.setenv(name, given.get(name, ""))
    configure_logging("info", "console")
    structlog.get_logger("t").info("hello")
    (line,) = stderr()
    assert ("\x1b[" in line) == (given == {"NO_COLOR": ""})


def test_console_lines_tell_an_error_and_not_what_was_asked(stderr):
    configure_logging("warning", "console")
    prompt = "what nobody else should read"
    try:
        raise ValueError(len(prompt))
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    lines = "\n".join(stderr())
    assert "ValueError: 28" in lines
    assert prompt not in lines


class Refuses(io.StringIO):
    """A stream that fails whatever is written."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "no space"), ValueError("closed")])
def test_a_stream_that_fails_costs_lines_and_nothing_else(error):
    sink = Sink(Refuses(error))
    sink.write("lost\n")
    assert sink.dropped == 1


def test_no_stderr_at_all(monkeypatch, stderr):
    monkeypatch.setattr("sys.stderr", None)
    sink = configure_logging()
    structlog.get_logger().info("lost")
    logging.getLogger("library").error("lost")
    assert sink.dropped == 2


@pytest.fixture
def pipe():
    """A pipe's end to read, and the other as a text stream."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reader, os.fdopen(writing, "w") as writer:
        yield reader, writer


def test_a_reader_that_left(pipe):
    reader, writer = pipe
    sink = Sink(writer)
    sink.write("kept \ud800\n")  # what no encoding holds is written as an escape
    assert reader.read(100) == b"kept \\ud800\n"
    reader.close()
    sink.write("lost\n")
    assert sink.dropped == 1


def test_a_reader_that_stopped_reading_holds_nobody(pipe, monkeypatch):
    reader, writer = pipe
    sink, waits = Sink(writer), []
    poll = sink._poll.poll
    monkeypatch.setattr(sink, "_poll", SimpleNamespace(poll=lambda ms: waits.append(ms) or poll(0)))
    for _ in range(1000):
        sink.write("x" * 999 + "\n")
    dropped = sink.dropped
    assert waits[-dropped:] == [PATIENCE] + [0] * (dropped - 1)  # the first waits for all
    assert dropped > 900
    reader.read(1 << 20)
    sink.write("again\n")
    assert reader.read(100).endswith(b"again\n")
    assert sink.dropped == dropped


def test_what_others_count_is_read_when_asked_for(metrics):
    misses = [0]
    metrics.watch("graph_misses", "Steps.", lambda: misses[0])
    misses[0] = 3
    found = lines(metrics)
    assert [found[name] for name in found if name.startswith("ruvon_graph_misses_total")] == ["3.0"]
