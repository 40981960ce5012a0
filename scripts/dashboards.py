"""Write deploy/grafana/dashboards from the tables below; tests check that they are current.

python scripts/dashboards.py

Grafana's Classic JSON, which every version imports. `scripts/check_dashboards.py` asks a real
Prometheus every query.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "deploy" / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_SERVER = '{job=~"$job", instance=~"$instance"}'
OF_MODEL = '{job=~"$job", instance=~"$instance", model_name=~"$model"}'
OF_ROUTER = '{job=~"$job", instance=~"$instance"}'
WIDTH, HEIGHT = 24, 8  # of Grafana's grid, and of a panel


@dataclass(frozen=True)
class Panel:
    """One picture. ``queries`` are (expression, legend); ``@`` stands for the chosen series."""

    title: str
    unit: str  # as Grafana names them
    text: str  # what it says, and what to do
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None


def rate(name: str, of: str = OF_MODEL, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({name}{of}[$__rate_interval]))"


def quantiles(name: str, of: str = OF_MODEL) -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({q / 100}, {rate(name + '_bucket', of, 'le')})", f"p{q}")
        for q in (50, 95, 99)
    ]


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def or_zero(expression: str) -> str:
    """Of what is not counted before it happens first, or not on this hardware."""
    return f"({expression}) or vector(0)"


def heat(title: str, text: str, name: str) -> Panel:
    query = (f"sum by (le) (increase({name}_bucket{OF_MODEL}[$__rate_interval]))", "{{le}}")
    return Panel(title, "short", text, [query], kind="heatmap", width=12)


BY_HANDLER = rate("http_request_duration_seconds_bucket", OF_SERVER, "le, handler")

SERVER: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Now",
        (
            Panel("Servers", "short", "That answer Prometheus.",
                  [(f"sum(up{OF_SERVER})", "")], "stat", 4),
            Panel("Running", "short", "Sequences in the running batch.",
                  [(f"sum(vllm:num_requests_running{OF_MODEL})", "")], "stat", 4),
            Panel("Waiting", "short", "Sequences in the queue. More than none for long: scale out.",
                  [(f"sum(vllm:num_requests_waiting{OF_MODEL})", "")], "stat", 4),
            Panel("Tokens out", "short", "A second.",
                  [(rate("vllm:generation_tokens_total"), "")], "stat", 4),
            Panel("First token, p95", "s", "What nineteen of twenty wait at most.",
                  [quantiles("vllm:time_to_first_token_seconds")[1]], "stat", 4),
            Panel("Cache used", "percentunit", "Above 95 %, sequences are preempted.",
                  [(f"max(vllm:kv_cache_usage_perc{OF_MODEL})", "")], "stat", 4, most=1),
        ),
    ),
    (
        "What users feel",
        (
            Panel("Time to the first token", "s", "Queue and prompt. See where the time goes.",
                  quantiles("vllm:time_to_first_token_seconds")),
            Panel("Time between tokens", "s", "How evenly text flows: smaller steps "
                  "(--max-num-batched-tokens), fewer sequences (--max-num-seqs), preemptions.",
                  quantiles("vllm:inter_token_latency_seconds")),
            Panel("Time of a completion", "s", "From arrival to end.",
                  quantiles("vllm:e2e_request_latency_seconds")),
            Panel("Completions", "reqps", "By how they ended. error and deadline: see the log.",
                  [(rate("vllm:request_success_total", by="finished_reason"),
                    "{{finished_reason}}"),
                   (rate("vllm:corrupted_requests_total"), "of these with NaN")], stacked=True),
            Panel("Answers", "reqps", "By status. 499: the client left.",
                  [(rate("http_requests_total", OF_SERVER, "status"), "{{status}}")],
                  stacked=True),
            Panel("Refused", "reqps", "By the bound that was reached.",
                  [(or_zero(rate("vllm:admission_rejections_total", by="reason")),
                    "{{reason}}")], stacked=True),
        ),
    ),
    (
        "Where the time goes",
        (
            Panel("Of a completion, on average", "s", "The queue: more replicas. Prompts: longer "
                  "ones, or fewer found in the cache? Answers: longer ones, or slower steps?",
                  [(mean(f"vllm:request_{name}_time_seconds"), name)
                   for name in ("queue", "prefill", "decode")], stacked=True),
            Panel("Who waits for what", "short", "Sequences in the queue, on average: for places "
                  "(--max-num-seqs), blocks (the cache), a prefix that another computes, others' "
                  "prompts, or the step under way.",
                  [(or_zero(rate("vllm:queue_wait_seconds_total", by="reason")), "{{reason}}")],
                  stacked=True),
            Panel("Running and waiting", "short", "Sequences.",
                  [(f"sum(vllm:num_requests_running{OF_MODEL})", "running"),
                   (f"sum(vllm:num_requests_waiting{OF_MODEL})", "waiting")]),
            Panel("Tokens", "short", "A second. Prompts that are found cost nothing.",
                  [(rate("vllm:prompt_tokens_by_source_total", by="source"), "prompt, {{source}}"),
                   (rate("vllm:generation_tokens_total"), "generated")]),
            Panel("Tokens of a step", "short", "On average. Many: long prompts, or many streams.",
                  [(mean("vllm:iteration_tokens_total"), "tokens")]),
            Panel("Steps", "ops", "A second, and those that failed.",
                  [(rate("vllm:iteration_tokens_total_count"), "steps"),
                   (or_zero(rate("vllm:rank_step_failures_total")), "failed on a rank")]),
        ),
    ),
    (
        "The cache",
        (
            Panel("Used", "percentunit", "Share of blocks, by server.",
                  [(f"vllm:kv_cache_usage_perc{OF_MODEL}", "{{instance}}")], most=1),
            Panel("Prompt tokens found", "percentunit", "A fall is a changed system prompt, or a "
                  "restart. More: a router, or what is the same at the front of prompts.",
                  [(f"{rate('vllm:prefix_cache_hits_total')}"
                    f" / {rate('vllm:prefix_cache_queries_total')}", "found")], most=1),
            Panel("Preemptions", "ops", "Work that is done twice: fewer --max-num-seqs, or more "
                  "memory.", [(rate("vllm:num_preemptions_total"), "preempted")]),
        ),
    ),
    (
        "What is asked for",
        (
            heat("Prompts", "Tokens.", "vllm:request_prompt_tokens"),
            heat("Answers", "Tokens.", "vllm:request_generation_tokens"),
        ),
    ),
    (
        "The process",
        (
            Panel("Event loop lag", "s", "How late its thread is. Above 50 ms streams stutter.",
                  quantiles("ruvon_event_loop_lag_seconds", OF_SERVER)),
            Panel("Lines beside the queue", "short", "Requests and work that wait elsewhere.",
                  [(f"sum(ruvon_{name}{OF_SERVER})", name.replace("_", " "))
                   for name in ("arriving", "reading", "compiling", "background_responses",
                                "kept_streams")]),
            Panel("Connections", "short", "That are open, and refusals a second.",
                  [(f"sum(ruvon_connections{OF_SERVER})", "open"),
                   (rate("ruvon_connections_refused_total", OF_SERVER), "refused")]),
            Panel("Processors", "short", "In use.",
                  [(f"rate(process_cpu_seconds_total{OF_SERVER}[$__rate_interval])",
                    "{{instance}}")]),
            Panel("Memory", "bytes", "Of each server; it should not grow for days.",
                  [(f"process_resident_memory_bytes{OF_SERVER}", "{{instance}}")]),
            Panel("Files and log lines", "short", "Share of file descriptors in use, and log lines "
                  "that were lost.",
                  [(f"max(process_open_fds{OF_SERVER} / process_max_fds{OF_SERVER})", "files"),
                   (f"sum(increase(ruvon_log_lines_dropped_total{OF_SERVER}[$__rate_interval]))",
                    "lines lost")]),
            Panel("GPU", "ops", "Steps beyond a captured graph, and kernels compiled late.",
                  [(or_zero(rate("vllm:graph_misses_total")), "graph misses"),
                   (or_zero(rate("vllm:kernel_compilations_total")), "compilations")], width=12),
            Panel("Time to answer, p95", "s", "By path, streams to their end.",
                  [(f"histogram_quantile(0.95, {BY_HANDLER})", "{{handler}}")], width=12),
        ),
    ),
)  # fmt: skip

ROUTER: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Replicas",
        (
            Panel("Take requests", "short", "1 or 0. 0 for long: that replica's own log.",
                  [(f"ruvon_router_replica_up{OF_ROUTER}", "{{replica}}")]),
            Panel("Requests in flight", "short", "Sent to each and not ended.",
                  [(f"ruvon_router_replica_in_flight{OF_ROUTER}", "{{replica}}")]),
            Panel("Load", "short", "Those, and what others have sent.",
                  [(f"ruvon_router_replica_load{OF_ROUTER}", "{{replica}}")]),
            Panel("Why they were chosen", "reqps", "prefix: has the prompt cached; load: has the "
                  "least to do; session and held: has what the request goes on with.",
                  [(rate("ruvon_router_choices_total", OF_ROUTER, "reason"), "{{reason}}")],
                  stacked=True),
            Panel("Tried elsewhere", "reqps", "Requests that a replica refused or lost.",
                  [(or_zero(rate("ruvon_router_retries_total", OF_ROUTER, "replica")),
                    "{{replica}}")], stacked=True),
            Panel("Started again", "short", "Within the interval, by why.",
                  [(or_zero(f"sum by (why) (increase(ruvon_router_restarts_total{OF_ROUTER}"
                            "[$__rate_interval]))"), "{{why}}")]),
        ),
    ),
    (
        "Requests",
        (
            Panel("Answers", "reqps", "By status. 499: the client left; 502: lost in mid-stream.",
                  [(rate("ruvon_router_requests_total", OF_ROUTER, "status"), "{{status}}")],
                  stacked=True),
            Panel("Time to the first byte", "s", "Replica and router.",
                  quantiles("ruvon_router_first_byte_seconds", OF_ROUTER)),
            Panel("Time to answer", "s", "Streams to their end.",
                  quantiles("ruvon_router_request_duration_seconds", OF_ROUTER)),
            Panel("Prompt tokens found of those expected", "percentunit", "Well below 1: replicas "
                  "forget what the router believes cached.",
                  [(f"({rate('ruvon_router_cached_tokens_total', OF_ROUTER)}"
                    f" / ({rate('ruvon_router_promised_tokens_total', OF_ROUTER)} > 0))"
                    " or vector(0)", "found")]),
            Panel("Remembered", "short", "Pieces of prompts that each is believed to hold.",
                  [(f"ruvon_router_replica_prefixes{OF_ROUTER}", "{{replica}}")]),
            Panel("Connections", "short", "Of clients.",
                  [(f"sum(ruvon_router_connections{OF_ROUTER})", "open")]),
        ),
    ),
)  # fmt: skip


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel at its place."""
    targets = [
        {
            "datasource": SOURCE,
            "expr": expression,
            "legendFormat": legend,
            "refId": chr(ord("A") + k),
            **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
        }
        for k, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if panel.kind == "stat" else HEIGHT},
        "fieldConfig": {"defaults": defaults(panel), "overrides": []},
        "options": OPTIONS[panel.kind],
        "targets": targets,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "graphMode": "area",
        "colorMode": "value",
    },
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "yAxis": {"unit": "short"},
        "tooltip": {"mode": "single"},
    },
}


def defaults(panel: Panel) -> dict[str, Any]:
    """How values are drawn."""
    told: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        told["max"] = panel.most
    if panel.kind == "timeseries":
        told["custom"] = {
            "fillOpacity": 30 if panel.stacked else 5,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return told


def placed(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """All panels, in lines under the titles of their rows."""
    numbers, y = count(1), 0
    for title, panels in rows:
        yield {
            "id": next(numbers), "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }  # fmt: skip
        x, y, height = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            made = panel_json(panel, next(numbers), x, y)
            yield made
            x, height = x + panel.width, made["gridPos"]["h"]
        y += height


def variable(name: str, label: str, metric: str) -> dict[str, Any]:
    """A choice among the values of a label of ``metric``."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def dashboard(
    uid: str, title: str, rows: Sequence[tuple[str, Sequence[Panel]]], variables: Sequence[Any]
) -> dict[str, Any]:
    """A dashboard in Grafana's Classic JSON."""
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}}
    return {
        "uid": uid,
        "title": title,
        "tags": ["ruvon", "llm"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [datasource, *variables]},
        "annotations": {"list": []},
        "panels": list(placed(rows)),
    }


def dashboards() -> dict[str, dict[str, Any]]:
    """All of them, by the names of their files."""
    up = "ruvon_router_replica_up"
    running = "vllm:num_requests_running"
    return {
        "ruvon.json": dashboard(
            "ruvon", "ruvon", SERVER,
            [variable("job", "job", running), variable("instance", "instance", running),
             variable("model", "model_name", running)],
        ),
        "ruvon-router.json": dashboard(
            "ruvon-router", "ruvon: the router", ROUTER,
            [variable("job", "job", up), variable("instance", "instance", up)],
        ),
    }  # fmt: skip


def render(made: dict[str, Any]) -> str:
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    for name, made in dashboards().items():
        (FOLDER / name).write_text(render(made), encoding="utf-8")
        print(f"Wrote {FOLDER / name}")
