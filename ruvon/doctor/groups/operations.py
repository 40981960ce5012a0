"""What operators look at: health, metrics, version."""

from __future__ import annotations

import re

from ruvon.doctor.ask import check_answered, post_chat
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect, expect_equal
from ruvon.doctor.probe import Probe, Reply

SAMPLE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(\{.*\})? [^ ]+( [0-9]+)?")


async def _metrics(probe: Probe) -> str:
    reply = await probe.get("/metrics")
    check_answered(reply)
    return reply.body.decode()


async def _get(probe: Probe, path: str) -> Reply:
    reply = await probe.get(path)
    check_answered(reply)
    return reply


@optional
async def health(probe: Probe) -> None:
    """GET /health is 200."""
    await _get(probe, "/health")


@optional
async def ready(probe: Probe) -> None:
    """GET /ready is 200."""
    await _get(probe, "/ready")


@optional
async def live(probe: Probe) -> None:
    """GET /live is 200."""
    await _get(probe, "/live")


@optional
async def version(probe: Probe) -> None:
    """GET /version is JSON with a version."""
    expect((await _get(probe, "/version")).json.get("version"), "a version", "none")


@optional
async def openapi(probe: Probe) -> None:
    """GET /openapi.json describes the chat endpoint."""
    paths = (await _get(probe, "/openapi.json")).json["paths"]
    expect("/v1/chat/completions" in paths, "/v1/chat/completions", list(paths))


@optional
async def metrics_format(probe: Probe) -> None:
    """GET /metrics is in Prometheus' text format."""
    for line in (await _metrics(probe)).splitlines():
        fits = not line or line.startswith("#") or SAMPLE.fullmatch(line)
        expect(fits, "name{labels} value", line)


@optional
async def metrics_content_type(probe: Probe) -> None:
    """Its Content-Type says so."""
    kind = (await _get(probe, "/metrics")).headers.get("Content-Type", "none")
    expect(re.match("text/plain|application/openmetrics-text", kind), "text/plain", kind)


@optional
async def metrics_typed(probe: Probe) -> None:
    """Every metric has a type."""
    text = await _metrics(probe)
    typed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    named = set(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)", text, re.MULTILINE))
    bases = {re.sub("_(bucket|sum|count|created|total|info)$", "", name) for name in named}
    untyped = {b for b in bases if not any(t.startswith(b) for t in typed)}
    expect_equal(untyped, set(), "metrics without a type")


@optional
async def metrics_of_vllm(probe: Probe) -> None:
    """Dashboards made for vLLM find their names."""
    text = await _metrics(probe)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
             "prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_bucket",
             "e2e_request_latency_seconds_bucket", "request_success_total")  # fmt: skip
    missing = [name for name in names if f"vllm:{name}" not in text]
    expect_equal(missing, [], "names that are missing")


@optional
async def metrics_count(probe: Probe) -> None:
    """A request raises the count of generated tokens."""
    before = await _generated(probe, 1)
    check_answered(await post_chat(probe, again=70, max_tokens=3))
    after = await _generated(probe, 2)
    expect(after > before, f"more than {before:g}", after)


async def _generated(probe: Probe, again: int) -> float:
    reply = await probe.ask("GET", "/metrics", again=again)
    check_answered(reply)
    pattern = r"^\S*(?:generation_tokens_total|tokens_predicted_total)(?:\{.*\})? (\S+)"
    values = re.findall(pattern, reply.body.decode(), re.MULTILINE)
    expect(values, "a counter of generated tokens", "none")
    return sum(map(float, values))


CHECKS = collect("operations", globals())
