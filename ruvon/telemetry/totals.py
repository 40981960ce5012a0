"""The numbers behind the periodic log line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Totals:
    """Plain numbers behind the stats line; reading Prometheus objects back is not their purpose."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    queried: int = 0
    cached: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


def stats_line(before: Totals, now: Totals, seconds: float) -> dict[str, float | int]:
    """The numbers of the periodic log line: rates since ``before``, and the present state."""
    queried = now.queried - before.queried
    return {
        "prompt_tok_s": round((now.prompt_tokens - before.prompt_tokens) / seconds, 1),
        "output_tok_s": round((now.output_tokens - before.output_tokens) / seconds, 1),
        "running": now.running,
        "waiting": now.waiting,
        "kv_cache_pct": round(100 * now.kv_usage, 1),
        "prefix_hit_pct": round(100 * (now.cached - before.cached) / queried, 1) if queried else 0,
    }
