"""What a load came to: the numbers of `ruvon bench serve`, and its table.

A result has the fields of `vllm bench serve`, so that scripts and dashboards which read those read
these. Its times are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ruvon.bench import Sample

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def summarize(
    samples: Sequence[Sample],
    duration: float,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The numbers of a run, under the names `vllm bench serve` writes. ``goodput`` maps a metric
    to the milliseconds within which a request counts as good."""
    done = [sample for sample in samples if not sample.error]
    num_input = sum(sample.num_input for sample in done)
    num_output = sum(sample.num_output for sample in done)
    result = {
        "duration": duration,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": _num_good(done, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": _peak_rate(done),
        "max_concurrent_requests": _peak_concurrency(done),
    }
    for metric, values in _series(done).items():
        result |= _statistics(metric, values, percentiles)
    return result


def _series(done: Sequence[Sample]) -> dict[str, list[float]]:
    return {
        "ttft": [sample.ttft for sample in done],
        "tpot": [sample.tpot for sample in done if sample.num_output > 1],
        "itl": [gap for sample in done for gap in sample.gaps],
        "e2el": [sample.latency for sample in done],
    }


def _statistics(metric: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    ms = np.array(values or [0.0]) * 1e3
    named = {f"p{point:g}_{metric}_ms": float(np.percentile(ms, point)) for point in percentiles}
    return {
        f"mean_{metric}_ms": float(ms.mean()),
        f"median_{metric}_ms": float(np.median(ms)),
        f"std_{metric}_ms": float(ms.std()),
        **named,
    }


def _num_good(done: Sequence[Sample], limits: Mapping[str, float]) -> int:
    def good(sample: Sample) -> bool:
        seconds = {"ttft": sample.ttft, "tpot": sample.tpot, "e2el": sample.latency}
        return all(seconds[metric] * 1e3 <= limit for metric, limit in limits.items())

    return sum(map(good, done))


def _peak_rate(done: Sequence[Sample]) -> float:
    """Most chunks that arrived within one second of the clock."""
    seconds = [int(moment) for sample in done for moment in sample.arrivals]
    return float(np.unique(seconds, return_counts=True)[1].max()) if seconds else 0.0


def _peak_concurrency(done: Sequence[Sample]) -> int:
    edges = [(sample.started, 1) for sample in done] + [(sample.ended, -1) for sample in done]
    running = np.cumsum([step for _, step in sorted(edges)])
    return int(running.max()) if edges else 0


WIDTH = 50
ROWS = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "max_concurrency": "Maximum request concurrency:",
    "request_rate": "Request rate configured (RPS):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s):",
    "max_concurrent_requests": "Peak concurrent requests:",
    "total_token_throughput": "Total token throughput (tok/s):",
}


def render(result: Mapping[str, Any], metrics: Sequence[str] = ("ttft", "tpot", "itl")) -> str:
    """The table that everybody pastes."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    for name, label in ROWS.items():
        value = result.get(name)
        if value is not None and value != "inf":
            lines.append(_row(label, value))
    for metric in metrics:
        lines.append(f"{METRICS[metric]:-^{WIDTH}}")
        lines += [_row(label, value) for label, value in _metric_rows(result, metric)]
    return "\n".join([*lines, "=" * WIDTH])


def _metric_rows(result: Mapping[str, Any], metric: str) -> Iterable[tuple[str, float]]:
    for name, value in result.items():
        statistic, _, rest = name.partition("_")
        if rest == f"{metric}_ms" and statistic != "std":
            yield f"{statistic.capitalize()} {metric.upper()} (ms):", value


def _row(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"
