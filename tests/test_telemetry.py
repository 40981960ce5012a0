"""Metric names are API, and so is the shape of a log line."""

from __future__ import annotations

import json
import logging

import pytest
import structlog

from ruvon.telemetry import (
    FIRST_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    HttpMetrics,
    Metrics,
    Totals,
    configure_logging,
    one_two_five,
    stats_line,
)

NAMES = {
    "counter": {
        "admission_rejections", "generation_tokens", "num_preemptions", "prefix_cache_hits",
        "prefix_cache_queries", "prompt_tokens", "prompt_tokens_by_source", "prompt_tokens_cached",
        "request_success",
    },
    "gauge": {
        "cache_config_info", "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting",
        "num_requests_waiting_by_reason",
    },
    "histogram": {
        "e2e_request_latency_seconds", "inter_token_latency_seconds", "iteration_tokens_total",
        "request_decode_time_seconds", "request_generation_tokens",
        "request_inference_time_seconds", "request_max_num_generation_tokens",
        "request_params_max_tokens", "request_params_n", "request_prefill_kv_computed_tokens",
        "request_prefill_time_seconds", "request_prompt_tokens", "request_queue_time_seconds",
        "request_time_per_output_token_seconds", "time_to_first_token_seconds",
    },
}  # fmt: skip


@pytest.fixture
def metrics():
    made = Metrics("m", max_model_len=1000)
    made.describe_cache(block_size=16, num_gpu_blocks=8)
    return made


def lines(metrics):
    return dict(
        line.rsplit(" ", 1)
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    )


def finish(metrics, **changes):
    metrics.record_finished(
        **{
            "reason": "stop", "num_prompt": 10, "num_output": 5, "num_cached": 4, "max_tokens": 16,
            "n": 1, "queue": 0.1, "prefill": 0.2, "decode": 0.4, "total": 0.7,
        }
        | changes
    )  # fmt: skip


def test_names_and_types_are_those_of_vllm(metrics):
    types = {}
    for line in metrics.render().decode().splitlines():
        if line.startswith("# TYPE vllm:") and "_created" not in line:
            name, kind = line.removeprefix("# TYPE vllm:").split()
            types.setdefault(kind, set()).add(
                name.removesuffix("_total") if kind == "counter" else name
            )
    assert types == NAMES


def test_every_name_is_served_twice(metrics):
    finish(metrics)
    found = lines(metrics)
    own = {name for name in found if name.startswith("ruvon_")}
    assert {name.replace("vllm:", "ruvon_", 1) for name in found if name not in own} == own


def test_finished_requests(metrics):
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
    structlog.reset_defaults()
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


def test_what_others_count_is_read_when_asked_for(metrics):
    misses = [0]
    metrics.watch("graph_misses", "Steps.", lambda: misses[0])
    misses[0] = 3
    found = lines(metrics)
    assert [found[name] for name in found if name.startswith("ruvon_graph_misses_total")] == ["3.0"]
