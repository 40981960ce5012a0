"""What an engine counts, as plain numbers, and the periodic log line made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ruvon.telemetry.finished import Finished

REASONS = ("stop", "length", "abort", "error", "deadline")  # why a sequence is over


@dataclass(slots=True)
class Totals:
    """Since the start, but for what runs and waits, which is of this moment."""

    prompt_tokens: int = 0
    prompt_cached: int = 0  # of them found in the prefix cache
    output_tokens: int = 0
    queried: int = 0
    cached: int = 0
    preempted: int = 0
    corrupted: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    waits: dict[str, float] = field(default_factory=dict)  # seconds by what was waited for
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0

    def take(self, finished: Finished) -> None:
        """A completion has ended."""
        self.finished[finished.reason] += 1
        self.corrupted += finished.corrupted
        for reason, seconds in finished.waits.items():
            self.waits[reason] = self.waits.get(reason, 0.0) + seconds

    def prompt_tokens_by_source(self) -> dict[str, int]:
        """Where prompts' keys and values came from."""
        computed = self.prompt_tokens - self.prompt_cached
        return {"local_compute": computed, "local_cache_hit": self.prompt_cached}


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
